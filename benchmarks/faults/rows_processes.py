"""Rows 16 to 18 and 50: several ranks with uneven numbers of images, one killed, all stopping together; launchers."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.faults.bench import Trial, kill_group, row, wait_for
from benchmarks.faults.judge import last_resume, load

_GONE_S = 60


@row(16, "2 and 3 ranks, uneven numbers of images")
def uneven_ranks(trial: Trial) -> str:
    """Test one run with 1, 2 and 3 processes: 101 images."""
    finished = trial.bench.finished
    if trial.subject.is_plain:
        return _uneven_ranks_of_plain(trial, finished)
    runs = {}
    for ranks in (1, 2, 3):
        run = Path(shutil.copytree(finished, trial.place / f"run{ranks}"))
        several = ["--trainer.strategy", "ddp"] if ranks > 1 else []
        done = trial.run(["test", run, "--trainer.devices", ranks, "--trainer.accelerator", "cpu", *several])
        trial.worked(f"{ranks} processes", done)
        counts = (run / "confusion_matrix.csv").read_bytes()
        runs[ranks] = counts, json.loads((run / "test_metrics.json").read_text(encoding="utf-8"))
    for ranks in (2, 3):
        trial.expect(runs[ranks][0] == runs[1][0], f"{ranks} processes: another confusion matrix")
        for name in ("accuracy", "loss", "ece", "num_images"):
            one, several = runs[1][1][name], runs[ranks][1][name]
            trial.expect(abs(one - several) <= 1e-6, f"{ranks} processes: {name} {several} and not {one}")
    return f"the same confusion matrix of {runs[1][1]['num_images']} images, means within 1e-6"


def _uneven_ranks_of_plain(trial: Trial, finished: Path) -> str:
    accuracies = []
    for ranks in (1, 2, 3):
        command = trial.bench.fit(trial.place / f"run{ranks}", devices=ranks)
        done = trial.run([*command, "--test", "--ckpt_path", finished / "last.ckpt"])
        trial.worked(f"{ranks} processes", done)
        found = re.search(r"test/acc\s*\W\s*([\d.]+)", done.stdout)
        accuracies.append(float(found[1]) if found else float("nan"))
    trial.expect(len(set(accuracies)) == 1, f"accuracies {accuracies} with 1, 2 and 3 processes")
    return "the same accuracy"


@row(17, "SIGKILL one rank")
def one_rank_killed(trial: Trial) -> str:
    """Rank 1; then, in another run, rank 0."""
    seconds = []
    for victim in (1, 0):
        out = trial.place / f"run{victim}"
        command = trial.bench.fit(out, devices=2, epochs=200, workers=0)
        process = trial.bench.start(command, cwd=trial.place)
        try:
            if not wait_for(trial.subject.last(out).exists, process):
                raise RuntimeError(f"two processes did not start: {trial.bench.wait(process).stderr.strip()[-300:]}")
            ranks = [process.pid, *_second_rank(process.pid)]
            os.kill(ranks[victim], signal.SIGKILL)
            began = time.monotonic()
            gone = _wait_until_gone(process, ranks)
            seconds.append(time.monotonic() - began)
            trial.expect(gone, f"rank {victim} killed: the other one still runs after {_GONE_S} s")
            status = process.poll()
            trial.expect(status not in (None, 0), f"rank {victim} killed: exit status {status}")
        finally:
            kill_group(process)
        trial.kept(bool(load(trial.subject.last(out))), f"rank {victim} killed: no checkpoint")
        if victim == 1 and not trial.subject.is_plain:
            done = trial.run(["fit", "--resume", out, "--epochs", _epochs_left(out)])
            trial.worked("resume on two processes", done)
            trial.kept(last_resume(out).get("step", 0) > 0, "not resumed")
    return f"both gone after {seconds[0]:.0f} and {seconds[1]:.0f} s; resume works"


def _epochs_left(out: Path) -> int:
    """Return the number of epochs that ends a run after the current epoch and one more."""
    return load(out / "checkpoints" / "last.ckpt")["epoch"] + 2


def _second_rank(parent: int) -> list[int]:
    """Return the process id of rank 1, a child of rank 0."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            is_child = f"PPid:\t{parent}\n" in (path.parent / "status").read_text()
            if is_child and b"LOCAL_RANK=1" in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} processes of a second rank")
    return found


def _wait_until_gone(process: subprocess.Popen, pids: list[int]) -> bool:
    """Wait until processes have ended; return whether they have in time."""
    until = time.monotonic() + _GONE_S
    while time.monotonic() < until:
        # Our child counts until it can be reaped: a process whose first thread has ended also looks like a zombie.
        if process.poll() is not None and not any(_is_running(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def _is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@row(18, "early stop on 2 ranks")
def early_stop(trial: Trial) -> str:
    """No validation improves by `min_delta`; each process notes the epochs that it begins."""
    if trial.subject.is_plain:
        extra = ["--patience", 1]
    else:
        extra = ["--early_stopping.patience", 1, "--early_stopping.min_delta", 0.99, "--model.pct_start", 0.05]
    epochs, out = 12, trial.place / "run"
    arguments = trial.bench.fit(out, devices=2, epochs=epochs, workers=0, lr=1e-9 if trial.subject.is_plain else 0.01)
    acts = ",".join(f"note@epoch:{number}" for number in range(epochs))
    done = trial.run([*arguments, *extra], acts=acts)
    trial.worked("two processes", done)
    begun = [(trial.place / f"rank{rank}").read_text() for rank in (0, 1)]
    trial.expect(begun[0] == begun[1], f"epochs begun: {begun[0]} and {begun[1]}")
    trial.expect(int(begun[0]) < epochs, f"nothing stopped before epoch {epochs}")
    return f"both stop in epoch {begun[0]} of {epochs}"


@row(50, "Lightning's fork, notebook and spawn launchers")
def launchers(trial: Trial) -> str:
    """Two processes that each of them would start; ours must refuse it, the peer may also train."""
    names = ["ddp_spawn", "ddp_fork", "ddp_notebook"]
    if not trial.subject.is_plain:
        names.append("{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {start_method: spawn}}")
    for number, name in enumerate(names):
        out = trial.place / f"run{number}"
        if trial.subject.is_plain:
            extra = trial.subject.trainer_flags(strategy=name)
            if trial.worked(name, trial.fit(out, devices=2, epochs=1, workers=0, extra=extra)):
                trial.kept(bool(load(trial.subject.last(out))), f"{name}: no checkpoint")
            continue
        extra = ["--trainer.devices", 2, "--trainer.strategy", name]
        trial.reported(name, trial.fit(out, epochs=1, extra=extra), "--trainer.strategy", status=2)
        trial.expect(not out.exists(), f"{name}: {out.name} was made")
    return "trains" if trial.subject.is_plain else "refused before step 1"
