"""Charts of the findings: recall of the classes, reliability, confidence, learning curves."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar_lightning.formatting import printable
from cifar_lightning.report.figures import COLOURS, shorten

_MAX_BARS = 40  # above, only the classes with the lowest recall are drawn
_NUM_LOWEST = 30
# Of Okabe and Ito's colours those that are legible on white and on black; see COLOURS.
_OF_RUNS = (COLOURS["correct"], COLOURS["mistake"], "#009e73", "#cc79a7", "#8f8f00", "#7f7fd0")
_MAX_LEGEND = 12
_WIDTH = 5.4  # inches; text of 10 points stays legible on a phone, 350 px wide


def classes_figure(classes: Sequence[dict[str, Any]]) -> Figure:
    """Draw recall, lowest first, 95 % intervals and the confidence of `classes` in the findings."""
    rows = sorted((row for row in classes if row["support"]), key=lambda row: row["recall"])
    title = ""
    if len(rows) > _MAX_BARS:
        title = f"{_NUM_LOWEST} lowest of {len(rows)} classes"
        rows = rows[:_NUM_LOWEST]
    figure, axes = _chart(1.3 + 0.25 * max(len(rows), 1))
    recall = np.array([row["recall"] for row in rows])
    low, high = (np.array([row["recall_interval_95"][end] for row in rows]) for end in (0, 1))
    places = np.arange(len(rows))
    ink = rcParams["text.color"]
    axes.barh(places, recall, color=COLOURS["correct"], height=0.7, label="recall, 95 % interval")
    errors = np.array([recall - low, high - recall]) if rows else None
    axes.errorbar(recall, places, xerr=errors, fmt="none", color=ink, elinewidth=1, capsize=2)
    confidence = [row["mean_confidence"] for row in rows]
    if not all(map(math.isnan, confidence)):
        style: dict[str, Any] = {"color": COLOURS["mistake"], "markeredgecolor": ink, "markersize": 5}
        axes.plot(confidence, places, "D", label="mean confidence", **style)
    axes.set_yticks(places, [shorten(printable(row["name"])) for row in rows], parse_math=False)
    axes.set(xlim=(0, 1), xlabel="fraction of the class's images", title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_yaxis()
    axes.grid(axis="x")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def reliability_figure(calibration: dict[str, Any]) -> Figure:
    """Draw accuracy over confidence, before and after temperature scaling; takes `calibration` of the findings."""
    figure, axes = _chart(4.4)
    axes.plot([0, 1], [0, 1], color=rcParams["text.color"], linewidth=1, linestyle=":")
    _reliability_line(axes, calibration["before"], "as trained", COLOURS["correct"], "o-")
    if calibration["after"] is not None:
        label = f"temperature {calibration['temperature']:.2f}"
        _reliability_line(axes, calibration["after"], label, COLOURS["mistake"], "s--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid()
    figure.legend(loc="outside upper center", ncols=1, frameon=False)
    return figure


def _reliability_line(axes: Axes, calibration: dict[str, Any], label: str, color: str, style: str) -> None:
    bins = [row for row in calibration["bins"] if row["num_images"]]
    confidence, accuracy = (np.array([row[key] for row in bins]) for key in ("confidence", "accuracy"))
    low, high = (np.array([row["accuracy_interval_95"][end] for row in bins]) for end in (0, 1))
    label = f"{label}: ECE {100 * calibration['ece']:.1f} %"
    errors = np.array([accuracy - low, high - accuracy])
    axes.errorbar(confidence, accuracy, yerr=errors, fmt=style, color=color, label=label, markersize=5, elinewidth=1)


def confidence_figure(calibration: dict[str, Any]) -> Figure:
    """Draw the histogram of confidence, mistakes stacked on correct predictions; takes the findings' `calibration`."""
    figure, axes = _chart(4.4)
    bins = calibration["before"]["bins"]
    correct = np.array([row["num_right"] for row in bins])
    mistakes = np.array([row["num_images"] for row in bins]) - correct
    left, width = [row["low"] for row in bins], 0.92 / len(bins)
    axes.bar(left, correct, width, align="edge", color=COLOURS["correct"], label="correct")
    # Hatched, to be distinguishable without colours.
    hatched = axes.bar(left, mistakes, width, bottom=correct, align="edge", label="mistakes", color=COLOURS["mistake"])
    for bar in hatched:
        bar.set(hatch="////", edgecolor=COLOURS["face"])
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.legend(loc="upper left")
    return figure


def curves_figure(epochs: Sequence[dict[str, float]]) -> Figure:
    """Draw accuracy, loss and learning rate over the epochs, counted from 1; takes rows of metrics.csv."""
    figure = Figure(figsize=(_WIDTH, 6.0), layout="constrained")
    charts = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.6])
    numbers = [row["epoch"] + 1 for row in epochs]
    for axes, name, label in ((charts[0], "acc", "accuracy"), (charts[1], "loss", "loss")):
        for stage, color, legend, line, marker in (
            ("train", COLOURS["mistake"], "training (augmented)", "--", "s"),
            ("val", COLOURS["correct"], "validation", "-", "o"),
        ):
            values = [row.get(f"{stage}/{name}", math.nan) for row in epochs]
            if not all(map(math.isnan, values)):
                style = {"color": color, "linestyle": line, "marker": marker if len(epochs) <= 30 else ""}
                axes.plot(numbers, values, label=legend, markersize=4, **style)
        axes.set_ylabel(label)
        axes.grid()
    charts[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    charts[0].legend(loc="lower right")
    charts[2].plot(numbers, [row.get("lr", math.nan) for row in epochs], color=rcParams["text.color"])
    charts[2].set(xlabel="epoch", ylabel="learning\nrate")
    charts[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    charts[2].grid()
    return figure


def runs_figure(tables: Sequence[Sequence[dict[str, float]]], groups: Sequence[int], names: Sequence[str]) -> Figure:
    """Draw validation accuracy and loss of several runs over the epochs, counted from 1.

    Args:
        tables: Rows of metrics.csv of each run.
        groups: Index into `names` of each run; the runs of one have one colour.
        names: What the groups are called.
    """
    figure = Figure(figsize=(_WIDTH, 5.4), layout="constrained")
    charts = figure.subplots(2, 1, sharex=True)
    named = set[int]()
    for rows, group in zip(tables, groups, strict=True):
        colour, line = _OF_RUNS[group % len(_OF_RUNS)], ("-", "--", ":")[group // len(_OF_RUNS) % 3]
        for axes, metric in zip(charts, ("val/acc", "val/loss"), strict=True):
            values = [row.get(metric, math.nan) for row in rows]
            axes.plot([row["epoch"] + 1 for row in rows], values, color=colour, linestyle=line, linewidth=1.3)
        if rows and group not in named and len(named) < _MAX_LEGEND:
            charts[0].plot([], [], color=colour, linestyle=line, label=shorten(printable(names[group])))
            named.add(group)
    for axes, label in zip(charts, ("validation accuracy", "validation loss"), strict=True):
        axes.set_ylabel(label)
        axes.grid()
    charts[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    charts[1].set_xlabel("epoch")
    charts[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for text in figure.legend(loc="outside upper center", ncols=3, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def _chart(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes
