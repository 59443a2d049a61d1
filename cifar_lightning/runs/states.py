"""States of all runs below a folder, as the command `runs` lists them. Nothing in the folders is trusted."""

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, duration, percent, span
from cifar_lightning.runs.contents import read_config, read_environment, read_seeds, read_table, read_test_metrics
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.lock import is_locked

_DEPTH = 4  # DIR, DIR/NAME, DIR/NAME/N, DIR/NAME/N/SEED
_COLUMNS = ("run", "test accuracy (95 % interval)", "model", "epochs", "time", "last change", "state")


def states_below(folder: Path) -> list[dict[str, Any]]:
    """Return the states of the runs in a folder and up to three levels below; links are not followed.

    They are in the order of their names, numbers as numbers, the folder of several seeds before its runs.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"runs {folder}: there is no such folder; fit makes runs.")
    states, level = dict[Path, dict[str, Any]](), [folder]
    for _ in range(_DEPTH):
        below = list[Path]()
        for run in map(RunFolder, level):
            if any(map(os.path.lexists, (run.config, run.predictions, run.seeds))):
                states[run.path] = state_of(run)
            with contextlib.suppress(OSError):  # not readable
                # Also of a run: `fit --run_dir runs/smallnet` makes one around others.
                below += [Path(entry.path) for entry in os.scandir(run.path) if entry.is_dir(follow_symlinks=False)]
        level = below
    ordered = sorted(states, key=lambda path: [_in_order(part) for part in path.relative_to(folder).parts])
    return [states[path] for path in ordered]


def _in_order(name: str) -> tuple[bool, int, str]:
    return (False, int(name), "") if name.isdecimal() else (True, 0, name)


def state_of(run: RunFolder, *, of_seed: bool = False) -> dict[str, Any]:
    """Return what is known of a run, or of the folder of several seeds; what is not known is None.

    `of_seed`: it is the run of a seed, which is no folder of seeds itself.

    Keys: `run`, `state` (training: its lock is held; finished: tested; not tested: trained to its end; stopped; not
    begun: without a checkpoint; damaged), `problems`, `accuracy` (of seeds the mean), `accuracy_interval_95`, `model`,
    `epochs`, `max_epochs`, `step`, `planned_steps`, `elapsed_s`, `changed_s` (since 1970), `seeds` and `std` of them.
    """
    problems = [f"{path.name} is a link or no regular file" for path in run.irregular_files()]

    def read(reader: Callable[[Path], Any], path: Path) -> Any:
        try:
            return reader(path) if path.is_file() and not path.is_symlink() else {}
        except UserError as error:
            problems.append(str(error).splitlines()[0])
            return {}

    seeds = {} if of_seed else read(read_seeds, run.seeds)
    config = read(read_config, run.config)
    tested = read(read_test_metrics, run.test_metrics)
    rows, timing = (read(read_table, path) for path in (run.metrics_csv, run.timing_csv))
    ended = read(read_environment, run.environment).get("ended") or {}
    model, trainer = config.get("model") or {}, config.get("trainer") or {}
    of_seeds = set[str]()
    for path in (run.path / str(seed) for seed in dict.fromkeys(seeds.get("seeds", ()))):
        if path.is_symlink():
            problems.append(f"{path.name} is a link")
        else:
            of_seeds.add(state_of(RunFolder(path), of_seed=True)["state"])
    states = {
        "training": is_locked(run.lock_file),
        "damaged": bool(problems),
        "finished": (bool(tested) and run.report.is_file()) or of_seeds == {"finished"},
        "not tested": bool(ended) and ended.get("by") != "signal",
        "stopped": run.has_checkpoint or bool(of_seeds - {"not begun"}),
        "not begun": True,
    }
    spread = seeds.get("accuracy") or {}
    return {
        "run": str(run.path),
        "state": next(state for state, holds in states.items() if holds),
        "problems": problems,
        "accuracy": tested.get("accuracy", spread.get("mean")),
        "accuracy_interval_95": tested.get("accuracy_interval_95"),
        "model": str(model.get("name") or config.get("model_class") or "") or None,
        "epochs": _whole(ended.get("epochs", len({row["epoch"] for row in rows}))),
        "max_epochs": _whole(trainer.get("max_epochs")),
        "step": _whole(ended.get("step", rows[-1].get("step") if rows else None)),
        "planned_steps": _whole(ended.get("planned_steps")),
        "elapsed_s": sum(filter(math.isfinite, (row.get("elapsed_s", 0.0) for row in timing))) if timing else None,
        "changed_s": _last_change(run),
        "seeds": seeds.get("seeds"),
        "std": spread.get("std"),
    }


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else None


def _last_change(run: RunFolder) -> float | None:
    times = list[float]()
    for path in (run.config, run.metrics_csv, run.test_metrics, run.seeds):
        with contextlib.suppress(OSError):
            times.append(path.lstat().st_mtime)
    return max((time for time in times if 0 <= time < 2**37), default=None)  # the year 6325: dates end at 9999


def states_table(states: Sequence[Mapping[str, Any]]) -> str:
    """Return states as a table of text, a line each."""
    cells = [_COLUMNS, *map(_cells, states)]
    widths = [max(cell_len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    padded = ([cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _cells(state: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy, interval, seeds = state["accuracy"], state["accuracy_interval_95"], state["seeds"]
    deviation = "" if state["std"] is None else f", SD {percent(state['std'], 2)}"
    more = f" ({span(interval, 2)})" if interval else f" (mean{deviation})" if seeds and accuracy is not None else ""
    of = f" of {state['max_epochs']:,}" if state["max_epochs"] else ""
    step, planned = state["step"], state["planned_steps"]
    where = f" at step {step:,}{f' of {planned:,}' if planned else ''}" if state["state"] == "stopped" and step else ""
    reason = f": {state['problems'][0]}" if state["problems"] else where
    changed = "" if state["changed_s"] is None else f"{datetime.datetime.fromtimestamp(state['changed_s']):%F %R}"
    return (
        clipped(state["run"], 60),
        f"{percent(accuracy, 2)}{more}",
        clipped(f"seeds {', '.join(map(str, seeds))}" if seeds else state["model"] or "-", 30),
        "" if seeds or state["epochs"] is None else f"{state['epochs']:,}{of}",
        "" if seeds else duration(state["elapsed_s"]),
        changed,
        clipped(f"{state['state']}{reason}", 120),
    )
