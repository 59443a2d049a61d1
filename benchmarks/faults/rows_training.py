"""Rows 15, 27 to 29, 33 and 34: invalid settings, NaN losses, out of memory."""

import json

import yaml

from benchmarks.faults.bench import Trial, row
from benchmarks.faults.images import small_set
from benchmarks.faults.judge import load

_SETTINGS = {"epochs": 1, "batch_size": 18, "workers": 0}


@row(15, "NaN or Inf loss at step k")
def no_number(trial: Trial) -> str:
    """By a learning rate that overflows, and set to NaN in step 48, in the second epoch."""
    import torch

    out = trial.place / "overflow"
    trial.reported("--lr 1e25", trial.fit(out, lr=1e25, workers=0), "step", *_epoch(trial), status=1)
    out = trial.place / "step48"
    done = trial.fit(out, acts="note-updates@train:47,nan@batch:47", workers=0)
    trial.reported("in step 48", done, "step", *_epoch(trial, "epoch 2", "step 48"), status=1)
    trial.expect(not (trial.place / "updated").exists(), "the weights were updated by it")
    last = trial.subject.last(out)
    if trial.kept(last.exists(), "no checkpoint"):
        tree = load(last)
        finite = all(value.isfinite().all() for value in tree["state_dict"].values() if isinstance(value, torch.Tensor))
        trial.kept(finite, "last.ckpt is not finite")
        trial.kept(tree["global_step"] >= 45, f"last.ckpt is of step {tree['global_step']}")
    return "stops before the update, names epoch 2 and step 48, last checkpoint finite"


def _epoch(trial: Trial, *words: str) -> tuple[str, ...]:
    return () if trial.subject.is_plain else words or ("epoch",)


@row(27, "batch larger than the set")
def large_batch(trial: Trial) -> str:
    """With and without `drop_last`."""
    data = small_set(trial.place / "data")
    drop = "--drop_last" if trial.subject.is_plain else "--data.drop_last=true"
    for number, extra in enumerate(((), (drop,))):
        arguments = trial.subject.fit(data, trial.place / f"run{number}", epochs=1, batch_size=512, workers=0)
        trial.reported(" ".join(extra) or "by default", trial.run([*arguments, *extra]), "batch_size 512", status=2)
    return "exit 2, names the flag and the number of images"


@row(28, "no validation images but a monitor")
def nothing_to_monitor(trial: Trial) -> str:
    """A callback that monitors val/acc without a validation split."""
    data = small_set(trial.place / "data")
    arguments = trial.subject.fit(data, trial.place / "run", **_SETTINGS)
    if trial.subject.is_plain:
        arguments += ["--val_fraction", 0, "--patience", 3]
    else:
        watching = {"monitor": "val/acc", "mode": "max"}
        callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": watching}
        recipe = trial.place / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}), encoding="utf-8")
        arguments += ["--data.val_fraction", 0, "--config", recipe]
    done = trial.run(arguments, acts="note@batch:0")
    trial.reported("EarlyStopping on val/acc", done, "val")
    trial.expect(not (trial.place / "rank0").exists(), "a step was trained before")
    if not trial.subject.is_plain:
        arguments = trial.subject.fit(data, trial.place / "all", **_SETTINGS)
        done = trial.run([*arguments, "--data.val_fraction", 0])
        if trial.worked("no monitor", done):
            trial.expect("no validation" in done.stdout, "no monitor: not reported")
    return "refused before training; without a monitor it trains on all images and reports it"


@row(29, "unknown key, typo, negative/NaN/inf lr, batch size 0")
def wrong_flags(trial: Trial) -> str:
    """Each one alone."""
    if trial.subject.is_plain:
        return _wrong_flags_of_plain(trial)
    recipe = trial.place / "recipe.yaml"
    recipe.write_text("model:\n  learning_rate: 0.1\n", encoding="utf-8")
    wrong = {
        ("--modle.lr", "1"): ("--modle.lr", "--model.lr"),
        ("--trainer.max_epoch", "3"): ("--trainer.max_epoch", "did you mean"),
        ("--nonsense_without_a_neighbour", "3"): ("--nonsense_without_a_neighbour",),
        ("--config", str(recipe)): ("learning_rate",),
        ("--lr=-1",): ("lr -1",),
        ("--lr", "nan"): ("lr nan",),
        ("--lr", "inf"): ("lr inf",),
        ("--batch_size", "0"): ("batch_size 0",),
        ("--batch_size", "many"): ("batch_size", "many"),
    }
    for flags, names in wrong.items():
        trial.reported(" ".join(flags), trial.run(["fit", "--data.dataset", "synthetic", *flags]), *names, status=2)
    trial.expect(not (trial.place / "runs").exists(), "a run folder was left behind")
    return f"{len(wrong)} mistakes: exit 2, named, with the nearest valid flag"


def _wrong_flags_of_plain(trial: Trial) -> str:
    data = small_set(trial.place / "data")
    arguments = trial.subject.fit(data, trial.place / "run", **_SETTINGS)
    wrong = (["--epcohs", "1"], ["--lr=-1"], ["--lr", "nan"], ["--lr", "inf"], ["--batch_size", "0"])
    for flags in wrong:
        trial.reported(" ".join(flags), trial.run([*arguments, *flags]), flags[0].partition("=")[0].strip("-"))
    return "exit status not 0"


@row(33, "16-mixed without a GPU")
def half_precision(trial: Trial) -> str:
    """A GPU is hidden."""
    data, out = small_set(trial.place / "data"), trial.place / "run"
    flag = "--precision" if trial.subject.is_plain else "--trainer.precision"
    arguments = [*trial.subject.fit(data, out, **_SETTINGS), flag, "16-mixed"]
    done = trial.run(arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    if trial.worked("16-mixed", done):
        output = done.stdout + done.stderr
        if trial.subject.is_plain:
            trial.expect("bf16" in output, "the precision used is not reported")
            files = "".join(p.read_text() for kind in ("*.yaml", "*.json") for p in out.rglob(kind))
            trial.expect("bf16" in files, "the real precision is in no file of the run")
        else:
            trial.expect("32-true" in output and "16-mixed" in output, "the precision used is not reported")
            precision = json.loads((out / "environment.json").read_text(encoding="utf-8"))["precision"]
            trial.expect(precision == "32-true", f"environment.json has {precision}")
            config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
            trial.expect(config["trainer"]["precision"] == "32-true", "config.yaml has another precision")
    return "reports 32-true, which environment.json and config.yaml hold"


@row(34, "out of GPU memory")
def out_of_memory(trial: Trial) -> str:
    """In step 23 of a run that has checkpoints."""
    import torch

    is_real = torch.cuda.is_available() and not trial.subject.is_plain
    out = trial.place / "run"
    extra = ["--trainer.accelerator", "gpu"] if is_real else []
    done = trial.run([*trial.bench.fit(out, workers=0), *extra], acts="oom@batch:22")
    trial.reported("the run", done, "batch", "memory", status=1)
    last = trial.subject.last(out)
    if trial.kept(last.exists(), "no checkpoint"):
        step = load(last)["global_step"]
        trial.kept(step >= 20, f"last.ckpt is of step {step}")
    how = "" if is_real else " (simulated)"
    return f"suggests a batch size, checkpoints kept{how}"
