"""Comparison of any number of runs on the same test images: comparison.html and comparison.json."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from rich.console import Console
from rich.text import Text

from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.formatting import (
    clipped,
    object_text,
    percent,
    plural,
    points,
    points_span,
    printable,
    run_name,
    span,
)
from cifar_lightning.metrics.significance import holm, mean_interval, spread
from cifar_lightning.report.charts import Curves, curves_charts
from cifar_lightning.report.comparison import (
    other_images,
    paired_test,
    predictions_of,
    summarize,
    unchecked_images,
)
from cifar_lightning.report.findings import training_of
from cifar_lightning.report.page import render
from cifar_lightning.report.results import read_results
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.roles import flat_settings

_MAX_RUNS_OF_ALL_PAIRS = 15  # 105 pairs; of more runs the first is compared with each other one
_SEEDS = ("seed_everything", "data.order_seed", "data.seed")  # of weights and dropout; of order; of split


def compare_runs(runs: Sequence[RunFolder], left_out: Sequence[Path], written_to: RunFolder) -> None:
    """Compare runs, print the result, and write comparison.html and comparison.json into a folder.

    Args:
        runs: Two or more, tested on the same images.
        left_out: Runs that are named on the page as not tested.
        written_to: The folder.

    Raises:
        UserError: A run has no test predictions, or other test images than the first.
    """
    compared, tables = _read(runs)
    compared["problems"] += [f"{path}: not tested yet, left out." for path in left_out]
    groups = [row["group"] for row in compared["runs"]]
    names = [group["name"] for group in compared["groups"]]
    curves = [Curves(names[group], rows, group=group) for rows, group in zip(tables, groups, strict=True)]
    write_json(written_to.comparison_json, compared)
    write_text_durably(written_to.comparison, render("runs.html", c=compared, curves=curves_charts(curves)))
    _print(compared, written_to.comparison)


def _read(runs: Sequence[RunFolder]) -> tuple[dict[str, Any], list[list[dict[str, float]]]]:
    """Return the comparison, and the rows of metrics.csv of each run; one run's predictions are held at a time."""
    first, problems = read_results(runs[0]), list[str]()
    rows, correct, configs, tables = list[dict[str, Any]](), list[Bool[np.ndarray, " n"]](), [], []
    for run in runs:
        results = first if run == runs[0] else read_results(run)
        predictions = predictions_of(run.path, results)
        if reason := other_images(predictions_of(runs[0].path, first), predictions, first, results):
            raise UserError(f"{run.path}: not tested on the same images as {runs[0].path}: {reason}.")
        of_training = {key: training_of(results)[key] for key in ("num_epochs", "elapsed_s")}
        of_training["num_parameters"] = results.origin.environment.get("num_parameters")
        rows.append(summarize(run.path, predictions) | of_training)
        correct.append((predictions.preds == predictions.targets)[np.argsort(predictions.indices)])
        configs.append(flat_settings(results.origin.config))
        tables.append(results.epochs)
        unchecked = unchecked_images(runs[0].path, first, run.path, results) if run != runs[0] else ""
        problems += [*(f"{run.path}: {problem}" for problem in results.problems), *([unchecked] if unchecked else [])]
    _tell_apart(rows, [row["path"] for row in rows])
    names = sorted(set(itertools.chain(*configs)) - set(_SEEDS))
    differing = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    for row, config in zip(rows, configs, strict=True):
        seeds = [value if type(value := config.get(name)) is int else None for name in _SEEDS]  # false: unseeded
        row["seeds"] = [seeds[0], seeds[2] if seeds[1] is None else seeds[1], seeds[2]]
        row["settings"] = {name: clipped(object_text(config.get(name))) for name in differing}
    values = [[config.get(name) for name in differing] for config in configs]
    groups = _groups(rows, [values.index(each) for each in values])
    compared = {"runs": rows, "settings": differing, "groups": groups, "by_seed": list(_by_seed(rows, groups))}
    compared |= {"pairs": _pairs(rows, correct), "num_images": len(correct[0]), "problems": problems}
    return compared, tables


def _groups(rows: Sequence[dict[str, Any]], first_alike: Sequence[int]) -> list[dict[str, Any]]:
    """Return runs with the same settings but for the seeds, with the spread of the accuracies of distinct seeds.

    Args:
        rows: The runs.
        first_alike: For each run the first with the same settings; their texts are clipped.
    """
    members = dict[int | str, list[dict[str, Any]]]()
    for row, first in zip(rows, first_alike, strict=True):
        is_known = row["seeds"][0] is not None  # a run without config.yaml is like no other one
        members.setdefault(first if is_known else row["path"], []).append(row)
    groups = []
    for number, same in enumerate(members.values()):
        parents = {str(Path(row["path"]).parent) for row in same}
        name = run_name(Path(parents.pop())) if len(same) > 1 == len(parents) else same[0]["name"]
        for row in same:
            row["group"] = number
        by_seed = {tuple(row["seeds"]): row["accuracy"] for row in same}
        groups.append({"name": name, "settings": same[0]["settings"], **spread(list(by_seed.values()))})
    _tell_apart(groups, [same[0]["path"] for same in members.values()])
    return groups


def _tell_apart(rows: Sequence[dict[str, Any]], paths: Sequence[str]) -> None:
    """Replace names that several rows have by their paths: runs/net/1 and old/runs/net/1 are both called net/1."""
    times = Counter(row["name"] for row in rows)
    for row, path in zip(rows, paths, strict=True):
        row["name"] = path if times[row["name"]] > 1 else row["name"]


def _by_seed(rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the mean difference of each two groups over the seeds that both have, where there are two or more.

    Equal differences have no interval: it would have no width, and of few seeds and test images they are often equal.
    """
    accuracies = [
        {tuple(row["seeds"]): row["accuracy"] for row in rows if row["group"] == group} for group in range(len(groups))
    ]
    for one, other in itertools.combinations(range(len(groups)), 2):
        common = accuracies[one].keys() & accuracies[other].keys()
        differences = [accuracies[one][seed] - accuracies[other][seed] for seed in common]
        if len(differences) > 1:
            yield {
                "first": groups[one]["name"],
                "second": groups[other]["name"],
                "n": len(common),
                "difference": float(np.mean(differences)),
                "interval_95": mean_interval(differences) if np.ptp(differences) > 1e-9 else None,
            }


def _pairs(rows: Sequence[Mapping[str, Any]], correct: Sequence[Bool[np.ndarray, " n"]]) -> list[dict[str, Any]]:
    """Return McNemar's test of each two runs, with Holm's correction for their number."""
    chosen: Iterable[tuple[int, int]] = itertools.combinations(range(len(rows)), 2)
    if len(rows) > _MAX_RUNS_OF_ALL_PAIRS:
        chosen = ((0, other) for other in range(1, len(rows)))
    pairs = []
    for one, other in chosen:
        pairs.append(
            {
                "first": rows[one]["name"],
                "second": rows[other]["name"],
                "difference": rows[one]["accuracy"] - rows[other]["accuracy"],
                **paired_test(correct[one], correct[other]),
            }
        )
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p"] = p
    return pairs


def _print(compared: Mapping[str, Any], page: Path) -> None:
    lines = [f"{plural(len(compared['runs']), 'run')} on the same {plural(compared['num_images'], 'test image')}:"]
    for row in sorted(compared["runs"], key=lambda row: -row["accuracy"]):
        text = f"{percent(row['accuracy'], 2)} ({span(row['accuracy_interval_95'], 2)}) {row['name']}"
        differing = "".join(f", {name} {value}" for name, value in row["settings"].items())
        lines.append(f"  {clipped(f'{text}{differing}', 200)}")
    for group in compared["groups"]:
        if group["n"] > 1:
            text = f"{group['name']}: mean {percent(group['mean'], 2)}, standard deviation {percent(group['std'], 2)}"
            lines.append(f"{text}, {span((group['min'], group['max']), 2)}, {plural(group['n'], 'run')}.")
    for pair in compared["by_seed"]:
        text = f"{pair['first']} minus {pair['second']}, paired by seed (n = {pair['n']}): "
        interval = "equal for all seeds, so their spread is not known"
        if pair["interval_95"] is not None:
            interval = f"95 % interval {points_span(pair['interval_95'], 2)}"
        lines.append(f"{text}{points(pair['difference'], 2)} points ({interval}).")
    found = sum(pair["p"] < 0.05 for pair in compared["pairs"])
    differ = "differs" if found == 1 else "differ"
    lines.append(f"McNemar's test, Holm's correction: {found} of {plural(len(compared['pairs']), 'pair')} {differ}.")
    console = Console(highlight=False, force_jupyter=False)
    for line in [*lines, *compared["problems"]]:
        console.print(Text(printable(line, console.encoding)))
    print(page.resolve().as_uri())
