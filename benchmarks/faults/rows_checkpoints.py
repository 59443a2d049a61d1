"""Rows 10 to 13, 26, 30, 31 and 38: checkpoints that are damaged, malicious, of another model, old or moved."""

import csv
import os
import random
import shutil
import time
from pathlib import Path

from benchmarks.faults.bench import Trial, row
from benchmarks.faults.images import small_set
from benchmarks.faults.judge import Done, Payload, last_resume, load

_SEED = 11


def _resume_past_damage(trial: Trial, what: str, out: Path, *damaged: str) -> None:
    """Expect that a run resumes with a warning for each damaged checkpoint and ends like the reference."""
    done = trial.resume(out)
    if trial.subject.is_plain:
        trial.kept(done.status == 0, f"{what}: {_last_line(done)}")
        return
    if trial.worked(what, done):
        for name in damaged:
            trial.expect(name in done.stderr, f"{what}: no warning names {name}")
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        trial.expect(len(lines) <= 3, f"{what}: {len(lines)} lines on stderr")
        trial.ended_like_the_reference(what, out)


def _last_line(done: Done) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines() or [""]
    return f"exit status {done.status} ({lines[-1].strip()[:120]})"


@row(10, "truncated last.ckpt")
def truncated(trial: Trial) -> str:
    """Half of last.ckpt; then half of every checkpoint."""
    out = trial.killed(trial.place / "run")
    _halve(trial.subject.last(out))
    every = Path(shutil.copytree(out, trial.place / "every"))
    _resume_past_damage(trial, "last.ckpt cut to half", out, "last.ckpt")
    for path in trial.subject.checkpoints(every).glob("*.ckpt"):
        _halve(path)
    trial.reported("every checkpoint cut to half", trial.resume(every), "last.ckpt")
    return "warning, resumed from the previous one, bitwise equal; all damaged: refused"


def _halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _flip(path: Path, rng: random.Random) -> None:
    """Flip a bit of a random byte in the middle half of a file, where the tensors are."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


@row(11, "a flipped byte in a checkpoint")
def flipped(trial: Trial) -> str:
    """In last.ckpt, for resume; in best.ckpt, for test and export."""
    rng, out = random.Random(_SEED), trial.killed(trial.place / "run")
    _flip(trial.subject.last(out), rng)
    if trial.subject.is_plain:
        done = trial.resume(out)
        trial.reported("resume", done)
        return "refused"
    _resume_past_damage(trial, "last.ckpt flipped", out, "last.ckpt")
    run = trial.bench.copy_of_reference(trial.place / "finished")
    _flip(run / "checkpoints" / "best.ckpt", rng)
    trial.reported("test", trial.run(["test", run]), "best.ckpt")
    trial.reported("export", trial.run(["export", run, "--format", "safetensors"]), "best.ckpt")
    trial.expect(not (run / "model.safetensors").exists(), "export left a file")
    return "refused by test and export; resume warns and uses the previous one, bitwise equal"


@row(12, "checkpoint with a malicious pickle")
def malicious(trial: Trial) -> str:
    """Through every flag that loads a checkpoint."""
    import torch

    marker, run = trial.place / "payload_ran", trial.bench.copy_of_reference(trial.place / "finished")
    evil = trial.place / "evil.ckpt"
    torch.save({**load(trial.subject.last(run)), "extra": Payload(marker)}, evil)
    if trial.subject.is_plain:
        ways = {"--ckpt_path": [*trial.bench.fit(trial.place / "new", epochs=4), "--ckpt_path", evil]}
    else:
        small = ["--trainer.limit_train_batches", 1]
        ways = {
            "--ckpt_path": [*trial.bench.fit(trial.place / "new1"), "--ckpt_path", evil, *small],
            "--init_weights": [*trial.bench.fit(trial.place / "new2"), "--init_weights", evil, *small],
        }
        shutil.copy(evil, run / "checkpoints" / "best.ckpt")
        ways["test"] = ["test", run]
    for name, arguments in ways.items():
        done = trial.run(arguments)
        trial.expect(not marker.exists(), f"{name}: the payload ran")
        trial.refused(name, done, "evil.ckpt" if name != "test" else "best.ckpt")
    return f"refused by {', '.join(ways)}; the payload did not run"


@row(13, "the same command twice, then --resume")
def twice(trial: Trial) -> str:
    """A killed run: the same command must not change it, and `--resume` must resume it."""
    out = trial.killed(trial.place / "run")
    last = trial.subject.last(out)
    before, step = last.read_bytes(), load(last)["global_step"]
    again = trial.fit(out)
    if not trial.kept(last.exists() and last.read_bytes() == before, "the second start overwrote the first run"):
        return ""
    if trial.subject.is_plain:
        trial.expect(again.status != 0, "the same command trains from scratch in the same folder without a message")
        return "refused"
    trial.reported("the same --run_dir", again, "--resume", status=2)
    command = trial.subject.fit(small_set(trial.place / "few"), None, workers=0, epochs=1, batch_size=54)
    for _ in range(2):
        trial.worked("without --run_dir", trial.run(command))
    numbers = sorted(path.name for path in (trial.place / "runs" / "smallnet").glob("*"))
    trial.expect(numbers == ["1", "2"], f"two runs without --run_dir are in {numbers}")
    done = trial.resume(out)
    trial.worked("resume", done)
    trial.expect(last_resume(out).get("step") == step, f"not resumed at step {step}")
    trial.ended_like_the_reference("resume", out)
    return "a new number each time, a chosen folder is refused, --resume resumes"


@row(26, "checkpoint with another class count")
def other_classes(trial: Trial) -> str:
    """Ten classes in the checkpoint, three in the images."""
    data, last = small_set(trial.place / "three"), trial.subject.last(trial.bench.reference.out)
    settings = {"batch_size": 18, "epochs": 4, "workers": 0}
    if trial.subject.is_plain:
        ways = {"--ckpt_path": ("Size([10", "Size([3")}
    else:
        ways = dict.fromkeys(("--ckpt_path", "--init_weights"), ("10x16", "3x16"))
    for number, (way, (theirs, ours)) in enumerate(ways.items()):
        done = trial.run([*trial.subject.fit(data, trial.place / f"new{number}", **settings), way, last])
        if trial.reported(way, done, theirs, ours):
            lines = done.stderr.strip().splitlines()
            trial.expect(len(lines) <= 2, f"{way}: {len(lines)} lines")
            trial.expect(theirs in lines[0] and ours in lines[0], f"{way}: not in the first line: {lines[0]}")
    return "one line with both class counts, one with the remedy"


@row(30, "another number of epochs on resume")
def other_epochs(trial: Trial) -> str:
    """More than planned, and fewer than already trained."""
    run = trial.bench.copy_of_reference(trial.place)
    last, before = trial.subject.last(run), trial.subject.last(run).read_bytes()
    if trial.subject.is_plain:
        done = trial.resume(run, epochs=5)
        trial.worked("5 epochs instead of 3", done)
        trial.expect("OneCycle" in done.stdout + done.stderr, "the schedule is not reported")
        return "rescheduled"
    fewer = trial.run(["fit", "--resume", run, "--epochs", 2])
    trial.reported("fewer than done", fewer, "--epochs 2", status=2)
    trial.kept(last.read_bytes() == before, "the refused resume changed last.ckpt")
    done = trial.run(["fit", "--resume", run, "--epochs", 4])
    if trial.worked("4 epochs instead of 3", done):
        trial.expect(last_resume(run)["changed"] == {"trainer.max_epochs": 4}, "the change is not in environment.json")
        trial.expect("max_epochs 4" in done.stdout and "OneCycle" in done.stdout, "epochs or schedule not reported")
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        trial.kept(len(rows) == 4, f"{len(rows)} rows in metrics.csv and not 4")
        # The recomputed schedule anneals to its end, far below the learning rate at the resume.
        trial.expect(float(rows[-1]["lr"]) < 1e-5, f"the learning rate ends at {rows[-1]['lr']}")
        trial.kept(load(last)["global_step"] == 120, "not all steps were trained")
    return "more: rescheduled and reported; fewer than already trained: refused"


_ODD_HPARAMS = """
import functools, pathlib
import lightning.pytorch as pl, numpy as np
from cifar_lightning import ImageClassifier, ImageDataModule, SmallNet
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
data = ImageDataModule("folder", pathlib.Path({data!r}), batch_size=20, num_workers=0)
model = ImageClassifier(model=SmallNet(3, widths=(4, 4, 4)), num_classes=3, lr=np.float64(0.01))
model.save_hyperparameters({{"path": pathlib.Path("x"), "size": np.int64(3), "part": functools.partial(print, 1)}})
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_checkpointing=False, plugins=[DurableCheckpointIO()])
trainer.fit(model, datamodule=data)
trainer.save_checkpoint("odd.ckpt", weights_only=False)
"""
_ODD_HPARAMS_PLAIN = """
import functools, pathlib
import lightning.pytorch as pl, numpy as np, torch
from benchmarks.faults.plain import PlainClassifier
from torch.utils.data import DataLoader, TensorDataset
model = PlainClassifier(3, np.float64(0.01))
model.save_hyperparameters({{"path": pathlib.Path("x"), "size": np.int64(3), "part": functools.partial(print, 1)}})
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_checkpointing=False)
trainer.fit(model, DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 3), batch_size=4))
trainer.save_checkpoint("odd.ckpt")
"""


@row(31, "odd values in hparams")
def odd_hparams(trial: Trial) -> str:
    """A path, NumPy numbers and a partial from Python; then unusual YAML on the command line."""
    is_plain, data = trial.subject.is_plain, small_set(trial.place / "few")
    script = trial.place / "odd.py"
    text = _ODD_HPARAMS_PLAIN if is_plain else _ODD_HPARAMS
    script.write_text(text.format(data=str(data)), encoding="utf-8")
    done = trial.run([], program=script)
    if trial.worked("from Python", done):
        _loads(trial, "from Python", trial.place / "odd.ckpt")
    if not is_plain:
        odd = ["--model.model_kwargs", "{widths: !!set {8, 16, 32}, dropout: 1e-1}", "--batch_size", 54]
        arguments = trial.subject.fit(data, trial.place / "run", workers=0, epochs=1)
        done = trial.run([*arguments, *odd])
        if done.status == 0:
            _loads(trial, "from the command line", trial.subject.last(trial.place / "run"))
        else:
            trial.reported("from the command line", done, "model_kwargs", status=2)
    return "loads with weights_only=True"


def _loads(trial: Trial, what: str, path: Path) -> None:
    try:
        hparams = load(path)["hyper_parameters"]
    except Exception as error:  # torch raises many types
        trial.kept(False, f"{what}: {' '.join(str(error).split())[:120]}")
    else:
        trial.kept(float(hparams["lr"]) == 0.01, f"{what}: lr is {hparams['lr']}")


@row(38, "clock jumps, a run folder copied elsewhere")
def moved(trial: Trial) -> str:
    """The clock goes back while a run trains; the run is killed and moved, and the clock goes ahead."""
    out = trial.killed(trial.place / "run", acts="clock-back@batch:12,SIGKILL@train:47")
    elsewhere = trial.place / "else where" / "moved"
    elsewhere.parent.mkdir()
    shutil.move(out, elsewhere)
    for number, path in enumerate(sorted(trial.subject.checkpoints(elsewhere).glob("*.ckpt"))):
        _touch(path, 86_400 * (number - 1))
    done = trial.resume(elsewhere, acts="clock-ahead@batch:3")
    trial.worked("resume", done)
    if trial.subject.is_plain:
        return "resume works; there is nothing to analyze"
    if done.status == 0:
        trial.ended_like_the_reference("resume", elsewhere)
        (elsewhere / "report.html").unlink(missing_ok=True)
        trial.worked("analyze", trial.run(["analyze", elsewhere]))
        trial.expect((elsewhere / "report.html").exists(), "analyze wrote no report")
    return "resumed bitwise; analyze writes the report"


def _touch(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() + seconds, time.time() + seconds))
