"""Bench of the fault rows: starting programs, the reference run, checks, and the table.

"Clearly reported": exit status not 0, at most 3 lines on stderr that name the thing, no traceback. "Not lost": the last
good checkpoint loads and at most one save interval is trained again.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import python_path
from benchmarks.faults.judge import Done, differences, load, unclear
from benchmarks.faults.sabotage import NOTES
from benchmarks.faults.subjects import Subject

TIMEOUT_S = 240
_POLL_S = 0.005


class Skipped(Exception):
    """Raised if this machine cannot inject a fault; the message has the reason."""


@dataclass
class Trial:
    """One execution of a row, with its folder and the failed checks.

    Attributes:
        bench: Shared by all rows.
        place: An empty folder.
        faults: Failed checks; the row is handled if there are none.
        not_lost: Whether no work was lost; None if not checked.
        clear: Whether failures were reported clearly; None if nothing failed.
    """

    bench: "Bench"
    place: Path
    faults: list[str] = field(default_factory=list)
    not_lost: bool | None = None
    clear: bool | None = None

    @property
    def subject(self) -> Subject:
        """The program under test."""
        return self.bench.subject

    def expect(self, is_so: bool, fault: str) -> bool:
        """Add a fault unless a condition holds; return the condition."""
        if not is_so:
            self.faults.append(fault)
        return is_so

    def reported(self, what: str, done: Done, *names: str, status: int | None = None) -> bool:
        """Expect a clear failure that names some words, with that exit status if one is given."""
        fault = unclear(done, *names)
        self.clear = self.clear is not False and not fault
        if not fault and status is not None and done.status != status:
            fault = f"exit status {done.status} and not {status}"
        return self.expect(not fault, f"{what}: {fault}")

    def refused(self, what: str, done: Done, *names: str) -> bool:
        """Expect a failure. Ours must also report it clearly; for the peer that is only recorded."""
        if not self.subject.is_plain:
            return self.reported(what, done, *names)
        self.clear = self.clear is not False and not unclear(done, *names)
        return self.expect(done.status != 0, f"{what}: exit status 0")

    def worked(self, what: str, done: Done) -> bool:
        """Expect exit status 0."""
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
        return self.expect(done.status == 0, f"{what}: exit status {done.status} ({last[0].strip()[:120]})")

    def kept(self, is_so: bool, fault: str) -> bool:
        """Expect that no work was lost."""
        self.not_lost = self.not_lost is not False and is_so
        return self.expect(is_so, fault)

    def run(self, arguments: Sequence[Any], **kwargs: Any) -> Done:
        """Run the subject in this row's folder; see `Bench.run`."""
        return self.bench.run(arguments, **{"cwd": self.place, **kwargs})

    def fit(self, out: Path, *, acts: str | None = None, env: Any = None, **settings: Any) -> Done:
        """Train on the images that all rows share, into a folder."""
        return self.run(self.bench.fit(out, **settings), acts=acts, env=env)

    def resume(self, out: Path, *, acts: str | None = None, env: Any = None, **settings: Any) -> Done:
        """Resume a training on the images that all rows share."""
        return self.run(self.bench.resume(out, **settings), acts=acts, env=env)

    def resume_with(self, out: Path, **settings: Any) -> Done:
        """Resume a training with other settings of the Trainer."""
        flags = self.subject.trainer_flags(**settings)
        return self.resume(out, extra=flags) if self.subject.is_plain else self.resume(out, changed=flags)

    def killed(self, out: Path, acts: str = "SIGKILL@train:47", **kwargs: Any) -> Path:
        """Train until the process is killed there: by default in its second epoch, two steps after a checkpoint."""
        done = self.fit(out, acts=acts, **kwargs)
        if done.status >= 0:
            raise RuntimeError(f"{acts} was not reached: exit status {done.status}, {done.stderr.strip()[-200:]}")
        return out

    def ended_like_the_reference(self, what: str, out: Path) -> bool:
        """Expect the same last.ckpt and metrics.csv as the reference run."""
        fault = self.bench.difference(out)
        return self.kept(not fault, f"{what}: {fault}")


# -- what is shared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The run without faults.

    Attributes:
        out: Its folder.
        training_s: Seconds from its first to its last checkpoint.
    """

    out: Path
    training_s: float


class Bench:
    """The images, the runs and the folder that the rows share.

    Args:
        folder: All runs and images are below it.
        subject: The program under test.
        data: Class folders of real images for the runs that are compared bit by bit; by default drawn ones.
        kills: Number of SIGKILLs of row 1.
        popen: Starts each program.
    """

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        *,
        data: Path | None = None,
        kills: int = 5,
        popen: Callable[..., subprocess.Popen] = subprocess.Popen,
    ) -> None:
        self.folder, self.subject, self.data, self.kills, self._popen = folder, subject, data, kills, popen
        self._lock = threading.RLock()
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False

    # -- starting the subject

    def start(
        self,
        arguments: Sequence[Any],
        *,
        cwd: Path,
        acts: str | None = None,
        env: dict[str, Any] | None = None,
        prefix: Sequence[str] = (),
        program: Path | None = None,
    ) -> subprocess.Popen:
        """Start a program in a process group of its own; what it prints goes to files, which no orphan holds open.

        Args:
            arguments: Its arguments.
            cwd: Its folder; made where it is missing.
            acts: Faults to inject; see `sabotage.py`.
            env: More environment variables.
            prefix: What comes before the command.
            program: A Python file; the subject's by default.
        """
        before = ["-m", "benchmarks.faults.sabotage", acts] if acts else []
        command = [*prefix, sys.executable, *before, program or self.subject.program, *arguments]
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
        }
        variables |= {"CIFAR_LIGHTNING_CACHE": str(self.folder / "user_cache"), NOTES: str(cwd), **(env or {})}
        variables.pop("CIFAR_LIGHTNING_RUN_DIR", None)
        cwd.mkdir(parents=True, exist_ok=True)
        number = len(list(cwd.glob("stdout.*")))
        files = [(cwd / f"{name}.{number}").open("wb") for name in ("stdout", "stderr")]
        with files[0], files[1]:
            if self._is_stopped:
                raise RuntimeError("stopped")
            process = self._popen(
                [a if isinstance(a, bytes) else str(a) for a in command],
                cwd=cwd,
                env={name: value if isinstance(value, bytes) else str(value) for name, value in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                start_new_session=True,
            )
        process.printed = tuple(file.name for file in files)
        self._running.add(process)
        return process

    def stop(self) -> None:
        """Kill all running programs and refuse to start others, so that the rows end and unmount."""
        self._is_stopped = True
        for process in tuple(self._running):
            if process.poll() is None:
                kill_group(process)

    def wait(self, process: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> Done:
        """Wait for the end of a process and kill the rest of its group.

        Raises:
            RuntimeError: It does not end.
        """
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise RuntimeError(f"no end after {timeout_s:.0f} s") from None
        kill_group(process)
        self._running.discard(process)
        stdout, stderr = (Path(name).read_text(encoding="utf-8", errors="replace") for name in process.printed)
        return Done(status, stdout, stderr)

    def run(self, arguments: Sequence[Any], **kwargs: Any) -> Done:
        """Run the subject in a new process to its end; see `start`."""
        return self.wait(self.start(arguments, **kwargs))

    # -- the images and runs that are compared

    @functools.cached_property
    def drawn(self) -> Path:
        """Class folders of drawn images: 600 to train on; 101 to test on, which 2 and 3 processes share unevenly."""
        from benchmarks.faults.images import draw_class_folders

        with self._lock:
            return draw_class_folders(self.folder / "drawn", num_train=600, num_test=101)

    @functools.cached_property
    def images(self) -> Path:
        """The images of the runs that are compared bit by bit: a copy of `--data`, or the drawn ones."""
        with self._lock:
            if self.data is None:
                return self.drawn
            return Path(shutil.copytree(self.data, self.folder / "images", dirs_exist_ok=True))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Settings with which an epoch has 30 steps."""
        num_train = 600 if self.data is None else sum(1 for _ in (self.images / "train").glob("*/*"))
        return {"batch_size": -(-num_train * 9 // 10 // 30), "size": 16 if self.data is None else 32}

    def fit(self, out: Any, **settings: Any) -> list[Any]:
        """Return the arguments of a training on `images`."""
        return self.subject.fit(self.images, out, **{**self.settings, **settings})

    def resume(self, out: Any, **settings: Any) -> list[Any]:
        """Return the arguments that resume it."""
        return self.subject.resume(self.images, out, **{**self.settings, **settings})

    @property
    def reference(self) -> Reference:
        """The run without faults, trained at the first access."""
        with self._lock:
            return self._reference

    @functools.cached_property
    def _reference(self) -> Reference:
        out = self.folder / "reference" / "run"
        process = self.start(self.fit(out), cwd=out.parent)
        last = self.subject.last(out)
        wait_for(last.exists, process)
        first_s = time.time()
        done = self.wait(process)
        if done.status != 0:
            raise RuntimeError(f"the reference run failed: {done.stderr.strip()[-300:]}")
        return Reference(out, last.stat().st_mtime - first_s)

    @property
    def finished(self) -> Path:
        """A finished run on the drawn images."""
        if self.data is None:
            return self.reference.out
        with self._lock:
            return self._finished

    @functools.cached_property
    def _finished(self) -> Path:
        out = self.folder / "finished" / "run"
        done = self.run(self.subject.fit(self.drawn, out, epochs=1), cwd=out.parent)
        if done.status != 0:
            raise RuntimeError(f"the run to be tested failed: {done.stderr.strip()[-300:]}")
        return out

    def copy_of_reference(self, place: Path) -> Path:
        """Return a copy of the reference run, for a row that damages it."""
        return Path(shutil.copytree(self.reference.out, place / "run"))

    def difference(self, out: Path, whole: Path | None = None) -> str:
        """Return how a run's end differs from a whole run's, by default the reference's; empty if all is equal."""
        whole = whole or self.reference.out
        last, theirs = self.subject.last(out), self.subject.last(whole)
        if not last.exists():
            return "no last.ckpt"
        one, other = load(last), load(theirs)
        if self.subject.is_plain:  # its loops count repeated steps; only weights and optimizer are compared
            one, other = ({key: tree[key] for key in ("state_dict", "optimizer_states")} for tree in (one, other))
        names = differences(one, other)
        if names:
            return f"last.ckpt differs in {len(names)} values, such as {names[0]}"
        if not self.subject.is_plain:
            ours, unbroken = ((run / "metrics.csv").read_bytes() for run in (out, whole))
            return "" if ours == unbroken else "metrics.csv differs"
        return ""


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process group with SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(
    is_there: Callable[[], bool], process: subprocess.Popen, timeout_s: float = TIMEOUT_S, poll_s: float = _POLL_S
) -> bool:
    """Wait until a condition holds or the process has ended; return the condition."""
    until = time.monotonic() + timeout_s
    while not is_there():
        if process.poll() is not None or time.monotonic() > until:
            return is_there()
        time.sleep(poll_s)
    return True


# -- the table -----------------------------------------------------------------------------------------------------

Perform = Callable[[Trial], str]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        number: Its number.
        what: The fault.
        perform: Injects it, adds failed checks to the trial and returns what was observed, in a few words.
        is_for_plain: Whether it applies to plain Lightning.
    """

    number: int
    what: str
    perform: Perform
    is_for_plain: bool


ROWS: dict[int, Row] = {}


def row(number: int, what: str, *, plain: bool = True) -> Callable[[Perform], Perform]:
    """Add a function to the table."""

    def enter(perform: Perform) -> Perform:
        ROWS[number] = Row(number, what, perform, plain)
        return perform

    return enter
