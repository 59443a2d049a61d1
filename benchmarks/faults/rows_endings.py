"""Rows 39 to 41: ended by a limit, killed among the files of the end, killed inside an accumulation window."""

import csv
import shutil
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Trial, row
from benchmarks.faults.judge import load
from cifar_lightning.runs.folder import RunFolder

_STEPS_PER_EPOCH, _STEPS = 30, 90


@row(39, "ended by max_time or max_steps, resumed with more")
def ended_by_a_limit(trial: Trial) -> str:
    """Inside an epoch and at its end; the time is up at the 47th batch, by the clock of Lightning's Timer."""
    flags = trial.subject.trainer_flags
    for number in (46, 59):
        out = trial.place / f"time{number}"
        done = trial.fit(out, acts=f"time-up@train:{number}", extra=flags(max_time="01:00:00:00"))
        if trial.worked(f"max_time in step {number + 1}", done):
            if not trial.subject.is_plain:
                trial.expect("max_time" in done.stdout, "it is not reported that the time ended the run")
            trial.kept(load(trial.subject.last(out))["global_step"] == number + 1, f"not saved at step {number + 1}")
            if trial.worked("resumed without a limit", trial.resume_with(out, max_time=None)):
                trial.ended_like_the_reference(f"max_time in step {number + 1}", out)
    for steps in (45, 60):
        out = trial.place / f"steps{steps}"
        if trial.worked(f"max_steps {steps}", trial.fit(out, extra=flags(max_steps=steps))):
            trial.worked(f"resumed with {_STEPS}", trial.resume_with(out, max_steps=_STEPS))
            _trained_the_rest(trial, f"max_steps {steps}", out)
    return "by time: bitwise; by steps: exactly those that were left, one row an epoch, the schedule of the new total"


def _trained_the_rest(trial: Trial, what: str, out: Path) -> None:
    step = load(trial.subject.last(out))["global_step"]
    trial.kept(step == _STEPS, f"{what}: ended after step {step} and not {_STEPS}")
    if trial.subject.is_plain:
        return
    tables = []
    for run in (out, trial.bench.reference.out):
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    ours, theirs = tables
    steps = [[(line["epoch"], line["step"]) for line in lines] for lines in tables]
    trial.kept(steps[0] == steps[1], f"{what}: epochs and steps {steps[0]}")
    trial.expect(ours[-1]["lr"] == theirs[-1]["lr"], f"{what}: the learning rate ends at {ours[-1]['lr']}")
    trial.expect("nan" not in (out / "metrics.csv").read_text(encoding="utf-8"), f"{what}: NaN in metrics.csv")


@row(40, "killed between any two files of the end of a run, --resume", plain=False)
def killed_at_the_end(trial: Trial) -> str:
    """Once by a signal; then each state that a kill leaves: the first results are there, the others are not."""
    out = trial.place / "killed"
    done = trial.fit(out, acts="SIGKILL@file:9", epochs=1, workers=0)
    trial.expect(done.status < 0, f"not killed: exit status {done.status}")
    trial.expect(trial.subject.last(out).exists() and not (out / "report.html").exists(), "killed in another place")
    trial.worked("resume", trial.resume(out))
    _is_complete(trial, "killed by a signal", out)
    whole = RunFolder(trial.bench.reference.out)
    results = sorted(filter(Path.exists, whole.files_by("test")), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(results):
        out = Path(shutil.copytree(whole.path, trial.place / f"before{number}"))
        for later in results[number:]:
            (out / later.name).unlink()
        trial.worked(f"without {file.name} and later files", trial.resume(out))
        _is_complete(trial, f"killed before {file.name}", out, whole.path)
        shutil.rmtree(out)
    return f"{len(results)} places: every missing file is made"


def _is_complete(trial: Trial, what: str, out: Path, whole: Path | None = None) -> None:
    names = {path.name for path in trial.bench.reference.out.iterdir() if path.is_file()}
    missing = [name for name in names if not (out / name).exists()]
    trial.kept(not missing, f"{what}: {', '.join(missing)} missing")
    if whole is not None and not missing:
        for name in ("test_metrics.json", "confusion_matrix.csv"):
            trial.kept((out / name).read_bytes() == (whole / name).read_bytes(), f"{what}: another {name}")


@row(41, "killed inside an accumulation window, validation inside the epoch")
def killed_inside_a_window(trial: Trial) -> str:
    """Windows of 2 batches, a validation after every 5; also where only best.ckpt, of inside a window, is there."""
    extra: list[Any] = trial.subject.trainer_flags(accumulate_grad_batches=2, val_check_interval=5)
    whole = trial.place / "whole"
    trial.worked("the whole run", trial.fit(whole, extra=extra))
    for acts in ("SIGKILL@train:46", "SIGKILL@train:51", "SIGTERM@train:50", "SIGTERM@val:20"):
        out = trial.place / acts.replace("@", "_").replace(":", "_")
        trial.fit(out, extra=extra, acts=acts)
        if trial.worked(f"{acts}, resume", trial.resume(out, extra=extra)):
            fault = trial.bench.difference(out, whole)
            trial.kept(not fault, f"{acts}: {fault}")
    out = trial.killed(trial.place / "best", acts="SIGKILL@train:6", extra=extra, every=20)
    if not trial.subject.is_plain:
        trial.reported("only best.ckpt is there", trial.resume(out), "best.ckpt", "--init_weights", status=2)
    return "bitwise; a checkpoint of inside a window is refused"
