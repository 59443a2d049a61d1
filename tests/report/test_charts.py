import math
import re

import numpy as np
import pytest
from made_run import make_run

from cifar_lightning.report.charts import classes_figure, confidence_figure, curves_figure, reliability_figure
from cifar_lightning.report.figures import COLOURS, figure_to_array, figure_to_svg, themed
from cifar_lightning.report.findings import find
from cifar_lightning.report.results import read_results


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return find(read_results(make_run(tmp_path_factory.mktemp("runs") / "run")))


def inside(figure):
    """Whether every text lies within the figure."""
    height, width = figure_to_array(figure).shape[:2]
    texts = [text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)


def test_the_bars_are_the_recalls_the_lowest_first(findings):
    figure = classes_figure(findings["classes"])
    axes = figure.axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == sorted(row["recall"] for row in findings["classes"])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [row["name"] for row in sorted(findings["classes"], key=lambda row: row["recall"])]
    assert inside(figure)


@pytest.mark.parametrize(("num_classes", "num_bars"), [(1, 1), (3, 3), (40, 40), (100, 30)])
def test_of_many_classes_the_lowest_are_drawn_and_the_title_says_so(num_classes, num_bars):
    rows = [
        {
            "name": f"a_class_with_a_long_name_{index}",
            "support": 10,
            "recall": index / num_classes,
            "recall_interval_95": [0.0, 1.0],
            "mean_confidence": math.nan,
        }
        for index in range(num_classes)
    ]
    figure = classes_figure(rows)
    assert len(figure.axes[0].patches) == num_bars
    assert bool(figure.axes[0].get_title()) == (num_bars < num_classes)
    assert inside(figure)


def test_the_reliability_diagram_has_a_point_for_each_bin_that_is_not_empty(findings):
    figure = reliability_figure(findings["calibration"])
    axes = figure.axes[0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0].startswith("as trained: ECE ")
    assert labels[1].startswith("temperature ")
    line = axes.containers[0].lines[0]
    bins = [part for part in findings["calibration"]["before"]["bins"] if part["num_images"]]
    np.testing.assert_allclose(line.get_xdata(), [part["confidence"] for part in bins])
    np.testing.assert_allclose(line.get_ydata(), [part["accuracy"] for part in bins])


def test_without_a_temperature_there_is_one_line(findings):
    figure = reliability_figure({**findings["calibration"], "after": None})
    assert len(figure.legends[0].get_texts()) == 1


def test_the_histogram_stacks_mistakes_on_correct_predictions(findings):
    right, wrong = confidence_figure(findings["calibration"]).axes[0].containers
    bins = findings["calibration"]["before"]["bins"]
    assert [bar.get_height() for bar in right] == [part["num_right"] for part in bins]
    assert [bar.get_height() for bar in wrong] == [part["num_images"] - part["num_right"] for part in bins]
    assert [bar.get_y() for bar in wrong] == [part["num_right"] for part in bins]


def test_the_histogram_of_few_images_counts_whole_ones(findings):
    bins = [{**part, "num_images": 1, "num_right": 1} for part in findings["calibration"]["before"]["bins"]]
    axes = confidence_figure({"before": {"bins": bins}}).axes[0]
    assert all(float(tick).is_integer() for tick in axes.get_yticks())


def test_the_curves_count_epochs_from_one_and_leave_gaps_where_nothing_was_measured():
    rows = [{"epoch": e, "train/acc": 0.5, "train/loss": 1.0, "lr": 0.1, "val/acc": math.nan} for e in range(3)]
    rows[1]["val/acc"] = 0.7
    accuracy, loss, rate = curves_figure(rows).axes
    train, val = accuracy.lines
    assert train.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(val.get_ydata(), [np.nan, 0.7, np.nan])
    assert len(loss.lines) == 1  # no validation loss in the table
    assert rate.lines[0].get_ydata().tolist() == [0.1] * 3


def test_every_colour_of_an_svg_is_a_variable_of_the_page(findings):
    charts = (
        lambda: classes_figure(findings["classes"]),
        lambda: confidence_figure(findings["calibration"]),
        lambda: reliability_figure(findings["calibration"]),
        lambda: curves_figure(findings["epochs"]),
    )
    for chart in charts:
        with themed():
            svg, again = figure_to_svg(chart()), figure_to_svg(chart())
        assert set(re.findall(r"(?:fill|stroke): (?!none|url)([^;\"]*)", svg)) <= {f"var(--{name})" for name in COLOURS}
        assert not re.search("#[0-9a-f]{6}|https?:|clip-path", svg)
        assert svg == again
