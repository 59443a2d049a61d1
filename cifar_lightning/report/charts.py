"""Findings -> charts: classes, reliability, confidence, learning curves; matplotlib, in the colours of `figures`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar_lightning.formatting import printable
from cifar_lightning.report.figures import colour, shorten

_MAX_BARS = 40  # more classes than that: the lowest stand for all
_NUM_LOWEST = 30
_WIDTH = 5.4  # inches: letters of 10 points are still legible where a phone shows it 350 pixels wide


def classes_figure(classes: Sequence[dict[str, Any]]) -> Figure:
    """Draw how many of each class are found, the fewest first, with 95 % intervals and the mean confidence.

    Args:
        classes: `classes` of the findings.
    """
    rows = sorted((row for row in classes if row["support"]), key=lambda row: row["recall"])
    title = ""
    if len(rows) > _MAX_BARS:
        title = f"The {_NUM_LOWEST} lowest of {len(rows)} classes"
        rows = rows[:_NUM_LOWEST]
    figure, axes = _chart(1.3 + 0.25 * max(len(rows), 1))
    recall = np.array([row["recall"] for row in rows])
    low, high = (np.array([row["recall_interval_95"][end] for row in rows]) for end in (0, 1))
    places = np.arange(len(rows))
    ink = rcParams["text.color"]
    axes.barh(places, recall, color=colour("right"), height=0.7, label="found (recall), 95 % interval")
    errors = np.array([recall - low, high - recall]) if rows else None
    axes.errorbar(recall, places, xerr=errors, fmt="none", ecolor=ink, elinewidth=1, capsize=2)
    confidence = [row["mean_confidence"] for row in rows]
    if not all(map(math.isnan, confidence)):
        style = {"color": colour("wrong"), "markeredgecolor": ink, "markersize": 5}
        axes.plot(confidence, places, "D", label="mean confidence", **style)
    axes.set_yticks(places, [shorten(printable(row["name"])) for row in rows], parse_math=False)
    axes.set(xlim=(0, 1), xlabel="share of the class's images", title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_yaxis()
    axes.grid(axis="x")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def reliability_figure(calibration: dict[str, Any]) -> Figure:
    """Draw accuracy over confidence, before and after temperature scaling; on the diagonal both agree.

    Args:
        calibration: `calibration` of the findings.
    """
    figure, axes = _chart(4.4)
    axes.plot([0, 1], [0, 1], color=rcParams["text.color"], linewidth=1, linestyle=":")
    _reliability_line(axes, calibration["before"], "as trained", colour("right"), "o-")
    if calibration["after"] is not None:
        label = f"temperature {calibration['temperature']:.2f}"
        _reliability_line(axes, calibration["after"], label, colour("wrong"), "s--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid()
    figure.legend(loc="outside upper center", ncols=1, frameon=False)
    return figure


def _reliability_line(axes: Axes, calibration: dict[str, Any], label: str, color: str, style: str) -> None:
    bins = [part for part in calibration["bins"] if part["num_pictures"]]
    confidence, right = (np.array([part[key] for part in bins]) for key in ("confidence", "accuracy"))
    low, high = (np.array([part["accuracy_interval_95"][end] for part in bins]) for end in (0, 1))
    label = f"{label}: ECE {100 * calibration['ece']:.1f} %"
    errors = np.array([right - low, high - right])
    axes.errorbar(confidence, right, yerr=errors, fmt=style, color=color, label=label, markersize=5, elinewidth=1)


def confidence_figure(calibration: dict[str, Any]) -> Figure:
    """Draw how many answers have which confidence, right ones and mistakes.

    Args:
        calibration: `calibration` of the findings.
    """
    figure, axes = _chart(4.4)
    bins = calibration["before"]["bins"]
    right = np.array([part["num_right"] for part in bins])
    wrong = np.array([part["num_pictures"] for part in bins]) - right
    left, width = [part["low"] for part in bins], 0.92 / len(bins)
    axes.bar(left, right, width, align="edge", color=colour("right"), label="right")
    # Hatched, so that they are told apart without colours, too.
    axes.bar(left, wrong, width, bottom=right, align="edge", color=colour("wrong"), hatch="////", label="mistakes")
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.legend(loc="upper left")
    return figure


def curves_figure(epochs: Sequence[dict[str, float]]) -> Figure:
    """Draw accuracy, loss and learning rate over the epochs, which people count from 1.

    Args:
        epochs: Rows of metrics.csv.
    """
    figure = Figure(figsize=(_WIDTH, 6.0), layout="constrained")
    charts = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.6])
    numbers = [row["epoch"] + 1 for row in epochs]
    for axes, name, label in ((charts[0], "acc", "accuracy"), (charts[1], "loss", "loss")):
        for part, color, words, line, marker in (
            ("train", colour("wrong"), "training (augmented)", "--", "s"),
            ("val", colour("right"), "validation", "-", "o"),
        ):
            values = [row.get(f"{part}/{name}", math.nan) for row in epochs]
            if not all(map(math.isnan, values)):
                style = {"color": color, "linestyle": line, "marker": marker if len(epochs) <= 30 else ""}
                axes.plot(numbers, values, label=words, markersize=4, **style)
        axes.set_ylabel(label)
        axes.grid()
    charts[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    charts[0].legend(loc="lower right")
    charts[2].plot(numbers, [row.get("lr", math.nan) for row in epochs], color=rcParams["text.color"])
    charts[2].set(xlabel="epoch", ylabel="learning\nrate")
    charts[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    charts[2].grid()
    return figure


def _chart(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes
