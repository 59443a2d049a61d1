"""How tests start the real program, in a new process or in this one where it must fail; and decode without workers."""

import atexit
import functools
import json
import os
import select
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
TINY = ["--data.dataset", "synthetic", "--data.image_size", "16", "--batch_size", "500"]
TINY += ["--model.model_kwargs", "{widths: [4, 8, 8]}", "--trainer.accelerator", "cpu"]


def start(*arguments, cwd, check=True, program=REPO / "train.py", **variables):
    """Run `train.py`, or another program, in a new process with one thread: tests do not fight for cores.

    Unless a variable of Python itself is given, the process is a fork of one that has imported the libraries.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **variables}
    environment.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    command = [str(program), *map(str, arguments)]
    of_python = {name for name in variables if name.startswith("PYTHON")} - {"PYTHONPATH"}
    if not of_python and sys.platform == "linux":
        done = _warm().run(command, cwd, environment)
    else:
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300
        )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class _Warm:
    """A process of `warm_start.py`."""

    def __init__(self):
        self._replies, replies = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        self._process = subprocess.Popen(
            [sys.executable, str(REPO / "tests" / "warm_start.py"), str(replies)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=[replies],
            encoding="utf-8",
        )
        os.close(replies)
        atexit.register(self._process.stdin.close)

    def run(self, command, cwd, environment):
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: Path(folder, name) for name in ("stdout", "stderr")}
            for path in streams.values():
                path.touch()
            request = {"command": command, "cwd": str(cwd), "environment": environment}
            request |= {name: str(path) for name, path in streams.items()}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            assert select.select([self._replies], [], [], 300)[0], f"{command} runs for more than 300 s"
            status = int(os.read(self._replies, 16))
            output = (path.read_text(encoding="utf-8") for path in streams.values())
            return subprocess.CompletedProcess(command, status, *output)


@functools.cache
def _warm():
    return _Warm()


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


def decode_here(monkeypatch):
    """Decode images in a thread of this process: starting a worker for each of many small tests takes minutes."""

    @contextmanager
    def workers(num, prepare=None, *arguments):
        if prepare is not None:
            prepare(*arguments)
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(image_decoding, "_workers", workers)
