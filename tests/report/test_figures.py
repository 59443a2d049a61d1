import io
import tracemalloc

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from cifar_lightning.report import figures
from cifar_lightning.report.figures import (
    COLOURS,
    confusion_figure,
    figure_to_array,
    figure_to_png,
    images_figure,
    shade,
)

CM = np.array([[1200, 0, 34], [5, 90, 5], [0, 0, 0]])
NAMES = ["cat", "dog", "truck"]


def cell_texts(figure: Figure) -> dict[tuple[int, int], str]:
    """Returns the numbers in the cells by (row, column)."""
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in figure.axes[0].texts
    }


def test_counts_stand_at_row_true_and_column_predicted_and_empty_cells_stay_empty():
    figure = confusion_figure(CM, NAMES)
    assert cell_texts(figure) == {
        (0, 0): "1,200",
        (0, 2): "34",
        (1, 0): "5",
        (1, 1): "90",
        (1, 2): "5",
        (2, 2): "0",
    }
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert axes.get_title() == "Accuracy 96.70% of 1,334 images"


def test_a_mistake_is_orange_and_a_correct_prediction_blue():
    figure = confusion_figure(CM, NAMES)
    pixels = figure_to_array(figure)
    axes = figure.axes[0]

    def colour(row: int, column: int) -> np.ndarray:
        x, y = axes.transData.transform((column - 0.4, row - 0.4))  # next to the number
        return pixels[int(pixels.shape[0] - y), int(x)].astype(int)

    assert colour(0, 0)[2] > colour(0, 0)[0] + 50
    assert colour(1, 0)[0] > colour(1, 0)[2] + 50
    assert colour(0, 1).tolist() == [255, 255, 255]


def test_the_diagonal_is_whole_where_there_are_more_classes_than_pixels():
    figure = confusion_figure(np.eye(3000, dtype=np.int64), [str(index) for index in range(3000)])
    pixels = figure_to_array(figure)
    box = figure.axes[0].get_window_extent()
    inside = pixels[::-1][int(box.y0) + 3 : int(box.y1) - 3, int(box.x0) : int(box.x1) + 1].astype(int)
    assert np.all((inside[..., 2] - inside[..., 0]).max(axis=1) > 30)  # blue in each row


def test_more_classes_than_rows_are_drawn_in_blocks_with_the_accuracy_of_all(monkeypatch):
    cm = np.random.default_rng(0).integers(0, 9, (5, 5))
    monkeypatch.setattr(figures, "_MAX_DRAWN", 3)
    drawn = confusion_figure(cm, list("abcde")).axes[0]
    blocks = [slice(0, 2), slice(2, 4), slice(4, 5)]
    expected = np.array([[cm[rows, columns].sum() for columns in blocks] for rows in blocks])
    support = expected.sum(axis=1)
    np.fill_diagonal(expected, [np.trace(cm[rows, rows]) for rows in blocks])
    opacity = shade(expected, support[:, None])[2]
    blue, orange = (np.array(to_rgb(COLOURS[name])) for name in ("correct", "mistake"))
    colours = 1 + opacity[..., None] * (np.where(np.eye(3)[..., None], blue, orange) - 1)
    assert np.allclose(drawn.images[0].get_array(), colours, atol=1e-6)
    assert drawn.get_title() == f"Accuracy {np.trace(cm) / cm.sum():.2%} of {cm.sum()} images"
    assert "blocks of 2 " in drawn.get_xlabel()


def test_a_figure_of_many_classes_takes_less_memory_than_their_matrix(monkeypatch):
    monkeypatch.setattr(figures, "_MAX_DRAWN", 100)
    cm = np.eye(1500, dtype=np.int64)
    confusion_figure(cm[:300, :300], [""] * 300)  # what is imported and kept once
    tracemalloc.start()
    confusion_figure(cm, [""] * 1500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < cm.nbytes / 2


def test_a_hundred_classes_have_names_and_no_numbers():
    names = [f"class_{index}" for index in range(100)]
    figure = confusion_figure(np.eye(100, dtype=np.int64), names)
    assert not figure.axes[0].texts
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names


@pytest.mark.parametrize("num_classes", [1, 3, 10, 30])
def test_everything_lies_inside_the_figure(num_classes):
    names = [f"quite_a_long_name_of_{index}" for index in range(num_classes)]
    figure = confusion_figure(np.eye(num_classes, dtype=np.int64) * 1000, names)
    height, width = figure_to_array(figure).shape[:2]
    axes = figure.axes[0]
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_names_that_would_be_illegible_are_left_out():
    figure = confusion_figure(np.eye(300, dtype=np.int64), [str(index) for index in range(300)])
    assert not any(label.get_text() for label in figure.axes[0].get_yticklabels())


def test_any_folder_name_can_be_drawn():
    names = ["$5 or $6_{", "狗", "two\nlines", "caf\udce9", "a" * 200]
    figure = confusion_figure(np.eye(5, dtype=np.int64), names)
    assert figure_to_array(figure).ndim == 3
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:4] == ["$5 or $6_{", "狗", "two\\nlines", "caf\\udce9"]
    assert len(shown[4]) < 30


def test_no_images_make_a_figure_and_no_warning():
    assert figure_to_array(confusion_figure(np.zeros((3, 3), dtype=np.int64), NAMES)).size


def test_images_keep_their_pixels_crisp():
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0, 0] = image[1, 1] = (200, 10, 30)
    pixels = figure_to_array(images_figure(image[None], ["title\nof two lines"]))
    red = (pixels == (200, 10, 30)).all(axis=2)
    black = (pixels == 0).all(axis=2)
    assert red.sum() > 2000
    rows, columns = np.nonzero(red)
    box = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert ((box == (200, 10, 30)).all(axis=2) | (box == 0).all(axis=2)).mean() > 0.99  # no blend between the two
    assert black.sum() > 2000


def test_each_image_stands_under_its_title_and_the_rest_of_the_grid_is_empty():
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    figure = images_figure(images, [f"number {index}" for index in range(7)])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"number {index}" for index in range(7)]
    assert [int(np.asarray(image.get_array())[0, 0, 0]) for image in axes.images] == list(range(7))
    for text, image in zip(axes.texts, axes.images, strict=True):
        left, right, bottom, top = image.get_extent()
        assert text.get_position() == pytest.approx(((left + right) / 2, top), abs=0.06)  # y grows downwards
        assert top < bottom
    columns, rows = axes.get_xlim()[1] / 1.5, axes.get_ylim()[0] / 1.52
    assert (round(columns), round(rows)) == (4, 2)


def test_titles_must_fit_the_images_and_none_of_both_is_a_blank_page():
    for titles in (["one"], ["one", "two", "three"]):
        with pytest.raises(ValueError):  # noqa: PT011
            images_figure(np.zeros((2, 4, 4, 3), dtype=np.uint8), titles)
    assert figure_to_array(images_figure(np.zeros((0, 4, 4, 3), dtype=np.uint8), [])).size


def test_an_array_and_a_png_show_the_same():
    array = figure_to_array(confusion_figure(CM, NAMES))
    assert array.dtype == np.uint8
    with Image.open(io.BytesIO(figure_to_png(confusion_figure(CM, NAMES), dpi=100.0))) as image:
        assert (np.asarray(image.convert("RGB")) == array).mean() > 0.999


def test_the_scales_are_lettered_as_large_as_the_matrix():
    matrix, *scales = confusion_figure(CM, NAMES).axes
    for scale in scales:
        sizes = [text.get_fontsize() for text in (scale.xaxis.label, *scale.get_xticklabels())]
        assert min(sizes) >= matrix.get_xticklabels()[0].get_fontsize()


def test_names_that_are_cut_to_the_same_text_are_told_apart():
    names = ["a" * 40 + "1", "a" * 40 + "2", "cat"]
    figure = confusion_figure(np.eye(3, dtype=np.int64), names)
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        shown = [label.get_text() for label in labels]
        assert len(set(shown)) == 3
        assert max(map(len, shown)) <= 24
        assert shown[2] == "cat"
