"""Add finished runs to a results file: the measurements with their command, hardware and commit.

    python -m benchmarks.accuracy.record smallnet_cpu runs/smallnet_cpu/1    benchmarks/results/smallnet_cpu.json
    python -m benchmarks.accuracy.record smallnet_cpu runs/smallnet_cpu/1 --note "other programs were running"

A run that is there already is not added twice; one that has not ended, or was tested on other images than the file's
runs, is refused. Each line keeps the settings of its config at the run's commit: the tables and the list of wanted runs
count those of the present config alone, and of each seed the newest.
"""

import argparse
import csv
import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import CONFIGS, RESULTS, ROOT
from benchmarks.hardware import hardware_name
from cifar_lightning.cli.flags import ALIASES
from cifar_lightning.runs.contents import read_test_metrics
from cifar_lightning.runs.environment import inexact_resumes
from cifar_lightning.settings.roles import flat_settings

_ENDED_BY = ("epochs", "max_steps", "max_time", "early_stopping")  # not by a signal, nor by a callback
_NOT_OF_A_RESULT = ("--config", "--data.root", "--run_dir", "--seed_everything", "--data.seed")
_AS_FOLDERS = "--data.dataset folder"  # a config's own images, unpacked


def summarize(run: Path, recipe: str, note: str) -> dict[str, Any]:
    """Return one run of a config as a line of a results file, from the run's own files.

    Raises:
        SystemExit: Its training has not ended, or not with the settings of a config.
    """
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    if (environment.get("ended") or {}).get("by") not in _ENDED_BY:
        raise SystemExit(f"{run}: its training has not ended; resume it with fit --resume {run}.")
    moved = moves(run, environment)
    metrics = read_test_metrics(run / "test_metrics.json")
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    timing = [
        {k: float(v) for k, v in row.items()} for row in csv.DictReader((run / "timing.csv").open(encoding="utf-8"))
    ]
    elapsed_s = sum(row["elapsed_s"] for row in timing)
    if math.isnan(elapsed_s):
        note = note or "some of an epoch was not timed"
    note = "; ".join([*([note] if note else []), *moved])
    return {
        "commit": environment["commit"],
        "dirty": environment["dirty"],
        "flags": other_flags(environment["command"]),
        "seed": config["seed_everything"],
        "data_seed": config["data"]["seed"],
        "settings": trained_settings(environment, recipe, config),
        "epochs": len(timing),
        "test_accuracy": metrics["accuracy"],
        "test_accuracy_interval_95": metrics["accuracy_interval_95"],
        "num_test_images": metrics["num_images"],
        "elapsed_s": None if math.isnan(elapsed_s) else elapsed_s,
        "train_images_per_s": [round(row["train_images_per_s"], 1) for row in timing],
        "peak_memory_mb": max(row["peak_memory_mb"] for row in timing),
        "hardware": hardware_name(environment),
        "precision": environment["precision"],
        "torch": environment["versions"]["torch"],
        "lightning": environment["versions"]["lightning"],
        "test_sha256": split["sha256"]["test"],  # depends on the order of the images
        "dataset": split["dataset"].partition(":")[0],
        "note": note,
    }


def moves(run: Path, environment: dict[str, Any]) -> list[str]:
    """Return the processors and precisions that a run moved to, as not every precision is fast on every processor.

    Raises:
        SystemExit: The run was resumed with another flag, which no single command repeats.
    """
    resumed = environment.get("resumed", [])
    if any(set(one["changed"]) - {"trainer.precision"} for one in resumed):
        raise SystemExit(f"{run}: it was resumed with other flags, which no single command repeats.")
    precisions = [
        f"{one['changed']['trainer.precision']} from epoch {one['epoch'] + 1} on" for one in resumed if one["changed"]
    ]
    return inexact_resumes(environment) + precisions


def other_flags(command: list[str]) -> str:
    """Return the flags that a run had next to its config, except folders and seeds."""
    flags: list[list[str]] = []
    for word in command[command.index("fit") + 1 :]:
        if word.startswith("--"):
            flags.append([word])
        else:
            flags[-1].append(word)
    names = [flag[0].partition("=")[0] for flag in flags]
    kept = [
        flag
        for name, flag in zip(names, flags, strict=True)
        if name not in _NOT_OF_A_RESULT and not name.startswith("--checkpoint.") and " ".join(flag) != _AS_FOLDERS
    ]
    return shlex.join(word for flag in kept for word in flag)


def committed_settings(commit: str, recipe: str) -> dict[str, Any]:
    """Return what a config contains at a commit."""
    command = ["git", "-C", str(ROOT), "show", f"{commit}:configs/{recipe}.yaml"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{recipe}: there is no such config at commit {commit} ({done.stderr.strip()}).")
    return yaml.safe_load(done.stdout)


def trained_settings(environment: dict[str, Any], recipe: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config contains at a run's commit, if the run has trained with it.

    Where the checkout had changes, it is compared with the run's config.yaml, but for what the flags have set.
    """
    settings = committed_settings(environment["commit"], recipe)
    if not environment["dirty"]:
        return settings
    names = (word[2:].partition("=")[0] for word in environment["command"] if word.startswith("--"))
    given = {ALIASES.get(name, name) for name in names}.union(
        *(one["changed"] for one in environment.get("resumed", []))
    )
    trained = flat_settings(config)
    for name, value in flat_settings(settings).items():
        if name not in given and trained.get(name, value) != value:
            raise SystemExit(
                f"{recipe}: the run was trained with {name} {trained[name]}, and commit {environment['commit']} has "
                f"{value}; commit the config before it is trained."
            )
    return settings


def present_settings(recipe: str) -> dict[str, Any]:
    """Return what a config contains."""
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))


def results_of(recipe: str) -> list[dict[str, Any]]:
    """Return the newest recorded run of each seed of the present config, for each set of flags and each machine.

    The runs of `benchmarks.speed.speedrun` have no flags and are left out.
    """
    path = RESULTS / f"{recipe}.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    settings = present_settings(recipe) if lines else {}
    runs = [line for line in lines if "flags" in line and line["settings"] == settings]
    return _newest(runs, "flags", "hardware", "seed", "data_seed")


def comparable(lines: list[dict[str, Any]], recipe: str, compiled: bool = False) -> list[dict[str, Any]]:
    """Return the newest whole run of each seed of the present speed config and of each peer.

    With `compiled` those with --model.compile.
    """
    settings = present_settings(recipe)
    settings["model"] |= {"compile": True} if compiled else {}
    runs = [line for line in lines if "accuracy" in line and line["recipe"] == recipe]
    runs = [line for line in runs if line["who"] != "ours" or line.get("settings") == settings]
    return _newest(runs, "who", "precision", "hardware", "seed")


def _newest(lines: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [*{tuple(line[key] for key in keys): line for line in lines}.values()]


def add_runs(recipe: str, runs: Sequence[Path], note: str) -> None:
    """Add runs to a config's results file and print its name."""
    path = RESULTS / f"{recipe}.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for run in runs:
        line = summarize(run, recipe, note)
        alike = [old for old in lines if old.get("dataset") == line["dataset"]]
        if any(old["test_sha256"] != line["test_sha256"] for old in alike):
            raise SystemExit(f"{run}: was tested on other images than the runs in {path}.")
        keys = ("commit", "flags", "seed", "data_seed", "hardware")
        if not any(all(old.get(key) == line[key] for key in keys) for old in lines):
            lines.append(line)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} runs")


def main() -> None:
    """Add the runs and print the file's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the config and so of the results file")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--note", default="", help="remark on the results")
    args = parser.parse_args()
    add_runs(args.name, args.runs, args.note)


if __name__ == "__main__":
    main()
