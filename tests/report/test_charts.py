"""Charts as SVG, read back from their paths in the units of the axes."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from made_run import make_run

from cifar_lightning.report import charts
from cifar_lightning.report.charts import Curves, confidence_chart, curves_charts, reliability_chart
from cifar_lightning.report.findings import find
from cifar_lightning.report.results import read_results


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return find(read_results(make_run(tmp_path_factory.mktemp("runs") / "run")))


def lines(chart, style):
    """Return the points of each path of a style, between 0 and 1 on both axes."""
    root = ElementTree.fromstring(chart.svg)
    paths = [element.get("d") for element in root.iter("path") if element.get("class") == style]
    scale = np.array([charts._RIGHT - charts._LEFT, charts._BOTTOM - charts._TOP])
    for path in paths:
        points = np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path), dtype=float)
        yield abs(points - [charts._LEFT, charts._BOTTOM]) / scale


def test_the_reliability_diagram_has_a_point_and_an_interval_for_each_bin_that_is_not_empty(findings):
    calibration = findings["calibration"]
    chart = reliability_chart(calibration)
    for key, style in (("before", "s0"), ("after", "s1 dashed")):
        bins = [row for row in calibration[key]["bins"] if row["num_images"]]
        (line,) = lines(chart, style)
        np.testing.assert_allclose(line, [(row["confidence"], row["accuracy"]) for row in bins], atol=1e-3)
        intervals = [points[:, 1] for points in lines(chart, f"{style} thin")]
        np.testing.assert_allclose(intervals, [row["accuracy_interval_95"] for row in bins], atol=1e-3)
    assert len(reliability_chart({**calibration, "after": None}).legend) == len(chart.legend) - 1


def test_the_histogram_stacks_mistakes_on_correct_predictions(findings):
    bins = findings["calibration"]["before"]["bins"]
    root = ElementTree.fromstring(confidence_chart(findings["calibration"]).svg)
    bars = {style: [bar for bar in root.iter("rect") if bar.get("class") == style] for style in ("b0", "b1")}
    tallest = max(row["num_images"] for row in bins)
    unit = (charts._BOTTOM - charts._TOP) / (1.05 * tallest)
    for style, counts in (
        ("b0", [row["num_right"] for row in bins]),
        ("b1", [row["num_images"] - row["num_right"] for row in bins]),
    ):
        heights = [float(bar.get("height")) / unit for bar in bars[style]]
        np.testing.assert_allclose(heights, [count for count in counts if count], atol=0.1 / unit)
    ends = {bar.get("x"): float(bar.get("y")) for bar in bars["b0"]}
    for bar in bars["b1"]:
        assert float(bar.get("y")) + float(bar.get("height")) == pytest.approx(
            ends.get(bar.get("x"), charts._BOTTOM), abs=0.2
        )


def test_few_images_are_counted_in_whole_ticks():
    bins = [{"low": 0.0, "high": 1.0, "num_images": 2, "num_right": 1}]
    root = ElementTree.fromstring(confidence_chart({"before": {"bins": bins}}).svg)
    assert [text.text for text in root.iter("text") if text.text.isdigit()] == ["0", "1", "2"]


def test_curves_leave_gaps_where_nothing_was_measured_and_charts_out_where_nothing_is_known():
    rows = [{"epoch": e, "train/acc": 0.1 * e, "lr": 0.1, "val/acc": math.nan} for e in range(4)]
    for epoch, value in ((0, 0.5), (1, 0.7), (3, 0.6)):
        rows[epoch]["val/acc"] = value
    (accuracy,) = curves_charts([Curves("a", rows)])
    assert [label for _, label in accuracy.legend] == ["validation", "training"]
    assert [len(line) for line in lines(accuracy, "s0")] == [2, 1]
    (train,) = lines(accuracy, "s0 dashed")
    np.testing.assert_allclose(train[:, 0], np.arange(1, 5) / 4, atol=1e-3)


def test_two_runs_have_the_same_axes():
    rows = [[{"epoch": e, "val/loss": loss / (e + 1)} for e in range(epochs)] for loss, epochs in ((1.0, 2), (2.0, 4))]
    charts_of = curves_charts([Curves("a", rows[0], [(0, 0.1)]), Curves("b", rows[1], [(0, 0.2), (4, 0.0)], 1)])
    loss, lr = charts_of
    assert [label for _, label in loss.legend] == ["a, validation", "b, validation"]
    (first,), (second,) = lines(loss, "s0"), lines(loss, "s1")
    assert first[:, 0].tolist() == pytest.approx([1 / 4, 2 / 4], abs=1e-3)
    assert first[0, 1] == pytest.approx(second[1, 1], abs=1e-3)  # both 1.0
    assert [label for _, label in lr.legend] == ["a", "b"]


@pytest.mark.parametrize(("is_by_step", "label"), [(True, "each step"), (False, "end of each epoch")])
def test_the_legend_says_which_learning_rates_are_drawn(is_by_step, label):
    (lr,) = curves_charts([Curves("a", [], [(0, 0.1), (1, 0.2)], is_by_step=is_by_step)])
    assert [text for _, text in lr.legend] == [label]


def test_of_many_runs_the_validation_is_drawn_in_a_colour_for_each_group():
    rows = [{"epoch": e, "val/acc": 0.1 * e, "train/acc": 0.2 * e} for e in range(3)]
    (accuracy,) = curves_charts([Curves(name, rows, group=group) for name, group in (("a", 0), ("a2", 0), ("b", 7))])
    assert accuracy.legend == [("s0", "a, validation"), ("s1 dotted", "b, validation")]
    assert (len(list(lines(accuracy, "s0"))), len(list(lines(accuracy, "s1 dotted")))) == (2, 1)


def test_every_colour_is_one_of_the_page_and_names_are_escaped(findings):
    curves = [
        Curves(name, findings["epochs"], findings["learning_rates"], at) for at, name in enumerate(("<b>", "a\x1b"))
    ]
    drawn = [reliability_chart(findings["calibration"]), confidence_chart(findings["calibration"])]
    for chart in (*drawn, *curves_charts(curves)):
        assert not re.search("#[0-9a-f]{6}|rgb|https?:|fill=|stroke=", chart.svg)
        assert "<b>" not in chart.svg
        assert all("\x1b" not in label for _, label in chart.legend)


def test_more_groups_than_styles_are_counted_in_the_legend():
    rows = [{"epoch": e, "val/acc": 0.1 * e} for e in range(3)]

    def legend_of(num_groups):
        (accuracy,) = curves_charts([Curves(f"run {group}", rows, group=group) for group in range(num_groups)])
        return accuracy.legend

    legend = legend_of(24)
    assert len({style for style, _ in legend}) == 24
    assert [text for _, text in legend] == [f"run {group}, validation" for group in range(24)]
    assert legend_of(27)[:24] == legend
    assert [text for _, text in legend_of(27)[24:]] == ["and 3 more groups, in these styles again"]
