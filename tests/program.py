"""How tests start the real program, in a new process or in this one where it must fail; and decode without workers."""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cifar_lightning.cli import main as cli
from cifar_lightning.data import image_decoding

REPO = Path(__file__).parent.parent
TINY = ["--data.dataset", "synthetic", "--data.image_size", "16", "--batch_size", "100"]
TINY += ["--model.model_kwargs", "{widths: [4, 8, 8]}", "--trainer.accelerator", "cpu", "--data.limit", "1000"]


def start(*arguments, cwd, check=True, program=REPO / "train.py", **variables):
    """Run `train.py`, another file or a module (`-m`) in a new process, with one thread: tests do not fight for cores.

    Unless a variable of Python itself is given, the process is a fork of one that has imported the libraries.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **variables}
    environment.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    command = [sys.executable, str(program), *map(str, arguments)]
    of_python = {name for name in variables if name.startswith("PYTHON")} - {"PYTHONPATH"}
    begin = subprocess.Popen if of_python or sys.platform != "linux" else WarmProcess
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        with streams[0].open("wb") as stdout, streams[1].open("wb") as stderr:
            status = begin(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr).wait(600)
        done = subprocess.CompletedProcess(command, status, *(path.read_text(encoding="utf-8") for path in streams))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class WarmProcess:
    """A program in a process that `warm_start.py` forks; made, and used in part, as a `subprocess.Popen` is.

    Args:
        command: This Python, and a file or `-m MODULE`, with arguments.
        cwd: Its working directory.
        env: Its environment.
        stdout: A file with a name.
        stderr: Likewise.
        start_new_session: Whether it leads a process group.
    """

    def __init__(self, command, *, cwd, env, stdout, stderr, stdin=subprocess.DEVNULL, start_new_session=False):
        assert command[0] == sys.executable
        assert stdin == subprocess.DEVNULL
        self.args, self.returncode, self._heard = command, None, b""
        with tempfile.TemporaryDirectory() as folder:
            reports = os.path.join(folder, "process")
            os.mkfifo(reports)
            request = {"command": list(map(os.fsdecode, command[1:])), "cwd": os.fspath(cwd), "environment": dict(env)}
            request |= {"stdout": stdout.name, "stderr": stderr.name, "process": reports}
            server = _server()
            print(json.dumps(request | {"start_new_session": start_new_session}), file=server.stdin, flush=True)
            self._reports = open(reports, "rb", buffering=0)  # noqa: SIM115 - closed at the end of the process
            self.pid = self._hear(60)

    def _hear(self, timeout_s):
        """Return the next number that the process or its parent writes; None if there is none in time."""
        while b"\n" not in self._heard:
            if not select.select([self._reports], [], [], timeout_s)[0]:
                return None
            new = self._reports.read(64)
            assert new, f"{self.args}: warm_start.py has ended"
            self._heard += new
        number, _, self._heard = self._heard.partition(b"\n")
        return int(number)

    def poll(self):
        """Return the exit status, None before the end."""
        return self._ended_within(0)

    def wait(self, timeout=None):
        """Return the exit status.

        Raises:
            subprocess.TimeoutExpired: It does not end in time.
        """
        if self._ended_within(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended_within(self, timeout_s):
        if self.returncode is None:
            self.returncode = self._hear(timeout_s)
            if self.returncode is not None:
                self._reports.close()
        return self.returncode

    def terminate(self):
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)


def popen(command, **settings):
    """Start a program as `subprocess.Popen` does, where that is possible in a process that has the libraries."""
    is_warm = command[0] == sys.executable and sys.platform == "linux"
    return (WarmProcess if is_warm else subprocess.Popen)(command, **settings)


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, str(REPO / "tests" / "warm_start.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
    )
    atexit.register(server.stdin.close)
    return server


def fail(monkeypatch, capsys, tmp_path, *arguments):
    """Run a command line that must fail, in process; return its lines on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR_LIGHTNING_RUN_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3, lines
    assert list(tmp_path.glob("runs/*/*")) == []
    return "\n".join(lines)


def git(folder, *arguments):
    """Run git in a folder as a user without settings, whatever `GIT_DIR` is; return what it prints."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.check_output(["git", "-C", str(folder), *identity, *arguments], env=own, text=True).strip()


def resident_bytes():
    """Return the memory that this process has; on Linux alone."""
    import resource  # which Windows lacks

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def decode_here(monkeypatch):
    """Decode images in a thread of this process: starting a worker for each of many small tests takes minutes."""

    @contextmanager
    def workers(num, prepare=None, *arguments):
        if prepare is not None:
            prepare(*arguments)
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(image_decoding, "worker_pool", workers)
