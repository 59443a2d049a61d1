"""Charts of the report as SVG: reliability, confidence and learning curves.

They are drawn by hand, since matplotlib takes a third of the time of a report for them, in the colours and fonts of
page.css, which follow the reader's theme. Lines also differ by dashes and bars by their fill, for readers who see no
colours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from cifar_lightning.formatting import count, percent, plural, printable

_WIDTH, _HEIGHT = 400, 270  # of the view box; a chart is shown 300 to 500 pixels wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 376, 10, 226  # of the axes
_MAX_MARKERS = 30
_NUM_COLOURS = 6  # of lines, in page.css
_DASHES = ("", " dotted", " dashed", " dashdot")  # likewise; of two runs or one, dashed is the training
Points = Sequence[tuple[float, float]]
Range = tuple[float, float]
Scale = Callable[[float], float]  # value -> coordinate
Tick = Callable[[float], str]


@dataclass(frozen=True)
class Chart:
    """A chart: `svg`, its text alternative, and its legend of (class of page.css, text)."""

    title: str
    alt: str
    svg: Markup
    legend: list[tuple[str, str]]


def reliability_chart(calibration: Mapping[str, Any]) -> Chart:
    """Draw accuracy over confidence with 95 % intervals, before and after temperature scaling."""
    marks, legend = [Markup('<path class="ideal" d="M{} {}L{} {}"/>').format(_LEFT, _BOTTOM, _RIGHT, _TOP)], []
    x, y = _scales((0, 1), (0, 1))
    stages = [
        ("before", "s0", "as trained"),
        ("after", "s1 dashed", f"temperature {calibration['temperature'] or 1:.2f}"),
    ]
    for key, style, label in stages:
        if calibration[key] is None:
            continue
        bins = [row for row in calibration[key]["bins"] if row["num_images"]]
        for row in bins:
            low, high = row["accuracy_interval_95"]
            marks.append(_path([(row["confidence"], low), (row["confidence"], high)], x, y, f"{style} thin"))
        marks += _line([(row["confidence"], row["accuracy"]) for row in bins], x, y, style, has_markers=True)
        legend.append((style, f"{label}: ECE {percent(calibration[key]['ece'])}"))
    legend.append(("ideal", "calibrated"))
    svg = _axes(marks, (0, 1), (0, 1), "confidence", (_percent_tick, _percent_tick))
    return Chart("Accuracy by confidence", "reliability diagram", svg, legend)


def confidence_chart(calibration: Mapping[str, Any]) -> Chart:
    """Draw the histogram of confidence, mistakes stacked on correct predictions."""
    bins = calibration["before"]["bins"]
    top = (max(row["num_images"] for row in bins) or 1) * 1.05  # 0 of a diverged model
    x, y = _scales((0, 1), (0, top))
    marks = []
    for row in bins:
        left, width = x(row["low"]), x(row["high"]) - x(row["low"]) - 1.5
        for style, low, high in (("b0", 0, row["num_right"]), ("b1", row["num_right"], row["num_images"])):
            if high > low:
                marks.append(
                    Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                        style, left, y(high), width, y(low) - y(high)
                    )
                )
    svg = _axes(marks, (0, 1), (0, top), "confidence", (_percent_tick, count))
    return Chart("Images by confidence", "histogram of confidence", svg, [("b0", "correct"), ("b1", "mistakes")])


@dataclass(frozen=True)
class Curves:
    """What is drawn of the training of a run.

    Attributes:
        name: For the legend.
        epochs: Rows of metrics.csv.
        learning_rates: (Epochs done, learning rate).
        group: Runs of a group have one colour, and the name of the first.
        is_by_step: Whether the learning rates are those of the steps, and not of the epochs' ends.
    """

    name: str
    epochs: Sequence[Mapping[str, float]]
    learning_rates: Points = ()
    group: int = 0
    is_by_step: bool = True


def curves_charts(runs: Sequence[Curves]) -> list[Chart]:
    """Draw accuracy and loss of each epoch, and the learning rate, of all runs on the same axes.

    Of more than two runs only the validation is drawn. Charts without a line are left out.
    """
    charts = []
    num_more = len({run.group for run in runs}) - len({_style(run) for run in runs})
    stages = (("val", "validation", ""), ("train", "training", " dashed"))[: 2 if len(runs) <= 2 else 1]
    for title, key, tick in (("Accuracy", "acc", _percent_tick), ("Loss", "loss", _number_tick)):
        lines: list[tuple[str, str, Points]] = []
        for run in runs:
            for stage, words, dash in stages:
                points = [(row["epoch"] + 1, row.get(f"{stage}/{key}", math.nan)) for row in run.epochs]
                if any(math.isfinite(value) for _, value in points):
                    lines.append((_style(run) + dash, f"{run.name}, {words}" if len(runs) > 1 else words, points))
        charts.append(_curves(title, f"{title.lower()} over the epochs", lines, tick, num_more=num_more))
    labels = [run.name if len(runs) > 1 else "each step" if run.is_by_step else "end of each epoch" for run in runs]
    lines = [(_style(run), label, run.learning_rates) for run, label in zip(runs, labels, strict=True)]
    title, alt = "Learning rate", "learning rate over the epochs"
    charts.append(_curves(title, alt, lines, _number_tick, from_zero=True, num_more=num_more))
    return [chart for chart in charts if chart.legend]


def _style(run: Curves) -> str:
    return f"s{run.group % _NUM_COLOURS}{_DASHES[run.group // _NUM_COLOURS % len(_DASHES)]}"


def _curves(
    title: str,
    alt: str,
    lines: Sequence[tuple[str, str, Points]],
    tick: Tick,
    *,
    from_zero: bool = False,
    num_more: int = 0,
) -> Chart:
    """Draw lines of (style, label, points); `num_more` groups have the style of another one."""
    lines = [line for line in lines if line[2]]
    pairs = np.array([pair for *_, points in lines for pair in points], dtype=float).reshape(-1, 2)
    values = pairs[np.isfinite(pairs[:, 1]), 1]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.1
    y_range = (0.0 if from_zero else low - margin, high + margin)
    x_range = (0.0, float(pairs[:, 0].max(initial=1)))
    x, y = _scales(x_range, y_range)
    marks = []
    for style, _, points in lines:
        marks += _line(points, x, y, style, has_markers=len(points) <= _MAX_MARKERS)
    svg = _axes(marks, x_range, y_range, "epoch", (_number_tick, tick))
    by_style = dict[str, str]()
    for style, label, _ in lines:
        by_style.setdefault(style, printable(label))  # the first of each group
    legend = [*by_style.items()]
    if legend and num_more:
        legend.append(("", f"and {plural(num_more, 'more group')}, in these styles again"))
    return Chart(title, alt, svg, legend)


def _scales(x_range: Range, y_range: Range) -> tuple[Scale, Scale]:
    def scale(low: float, high: float, start: int, end: int) -> Scale:
        return lambda value: start + (value - low) / (high - low) * (end - start)

    return scale(*x_range, _LEFT, _RIGHT), scale(*y_range, _BOTTOM, _TOP)


def _line(points: Points, x: Scale, y: Scale, style: str, has_markers: bool) -> list[Markup]:
    """Return a line with gaps where a value is not known, and a marker at each point."""
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            parts[-1].append(point)
        else:
            parts.append([])
    known = [part for part in parts if part]
    has_markers = has_markers or all(len(part) == 1 for part in known)
    shape = '<rect class="{} dot" x="{:.1f}" y="{:.1f}" width="6" height="6"/>'
    dots = [Markup(shape).format(style, x(a) - 3, y(b) - 3) for part in known for a, b in part if has_markers]
    return [_path(part, x, y, style) for part in known] + dots


def _path(points: Points, x: Scale, y: Scale, style: str) -> Markup:
    path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    return Markup('<path class="{}" d="M{}"/>').format(style, path)


def _axes(marks: Sequence[Markup], x_range: Range, y_range: Range, x_label: str, ticks: tuple[Tick, Tick]) -> Markup:
    x, y = _scales(x_range, y_range)
    grid, texts = [], []
    for at in _ticks(x_range, integer=x_label == "epoch"):
        grid.append(f"M{x(at):.1f} {_TOP}V{_BOTTOM}")
        texts.append(_text(x(at), _BOTTOM + 17, "middle", ticks[0](at)))
    for at in _ticks(y_range, integer=ticks[1] is count):
        grid.append(f"M{_LEFT} {y(at):.1f}H{_RIGHT}")
        texts.append(_text(_LEFT - 6, y(at) + 4.5, "end", ticks[1](at)))
    texts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 8, "middle", x_label))
    head = Markup('<svg viewBox="0 0 {} {}"><path class="grid" d="{}"/>').format(_WIDTH, _HEIGHT, "".join(grid))
    return head + Markup("").join([*marks, *texts]) + Markup("</svg>")


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _ticks(bounds: Range, *, integer: bool) -> list[float]:
    ticks: Any = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(*bounds)
    slack = 1e-9 * (bounds[1] - bounds[0])
    return [float(tick) for tick in ticks if bounds[0] - slack <= tick <= bounds[1] + slack]


def _percent_tick(value: float) -> str:
    """Return a fraction as "35 %", or as "35.5 %" where the axis is of a short range."""
    return f"{100 * value:.4g} %"


def _number_tick(value: float) -> str:
    """Return a number in few digits."""
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"
