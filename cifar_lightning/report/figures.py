"""Figures as matplotlib `Figure` objects, without pyplot, which would keep them in memory and may open windows.

Correct predictions are blue and mistakes orange, a pair that readers with any common colour blindness can distinguish.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from cifar_lightning.formatting import plural, printable, shorten, shortened_apart
from cifar_lightning.metrics.calibration import reliability
from cifar_lightning.metrics.classification import accuracy, per_class

_MAX_CLASSES_WITH_NUMBERS = 20
_MAX_NAMED = 200  # classes; more are illegible and take matplotlib 10 s for 1,000
_MAX_DRAWN = 1000  # rows, each of a pixel or more; of more classes each row is that of several
# Light theme of page.css, by the name of its variable. The blue is that of M. Okabe and K. Ito, "Color Universal
# Design" (2008); their orange is darkened so that white text on it is legible.
COLOURS = {"face": "#ffffff", "ink": "#1b1f24", "correct": "#0072b2", "mistake": "#b34700"}
_INVERTED_ABOVE = 0.75  # opacity of a cell from which text in the face's colour has more contrast, in both themes


def shade(
    cm: Int[np.ndarray, "classes classes"], support: Int[np.ndarray, "classes 1"]
) -> tuple[Float64[np.ndarray, "classes classes"], float, Float64[np.ndarray, "classes classes"]]:
    """Return each cell's fraction of the true class, the fraction at which a mistake is opaque, and each opacity, 0..1.

    Mistakes have their own scale, so that 3 % is visible next to 95 %.
    """
    fractions = np.divide(cm, support, out=np.zeros(cm.shape), where=support > 0)
    diagonal = np.eye(len(cm), dtype=bool)
    top = max(float(fractions[~diagonal].max(initial=0.0)), 0.01)
    return fractions, top, np.where(diagonal, fractions, fractions / top)


def confusion_figure(cm: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: true classes in rows, correct predictions in blue, mistakes in orange.

    The opacity of a cell is that of `shade`. Up to 20 classes the cells hold counts. Of more than 1,000 classes, blocks
    of neighbouring ones are drawn, without the mistakes within a block.
    """
    num_classes, num_images = len(class_names), int(cm.sum())
    title = f"Accuracy {accuracy(cm):.2%} of {plural(num_images, 'image')}" if num_images else "No images"
    cm, support, block_size = _in_blocks(cm)
    _, top_of_mistakes, opacity = shade(cm, support[:, None])
    size = (min(max(3.0 + 0.44 * num_classes, 6.4), 14.0), min(max(2.9 + 0.38 * num_classes, 4.6), 14.5))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    diagonal = np.eye(len(cm), dtype=bool)
    # The aspect stays free because the constrained layout cuts off the title of square cells.
    face, correct, mistake = (np.array(to_rgb(COLOURS[name]), np.float32) for name in ("face", "correct", "mistake"))
    rgb = face + opacity[..., None].astype(np.float32) * (np.where(diagonal[..., None], correct, mistake) - face)
    axes.imshow(rgb, interpolation="nearest", aspect="auto")
    for name, top, label in (
        ("mistake", top_of_mistakes, "mistakes, % of the true class"),
        ("correct", 1.0, "correct, % of the true class"),
    ):
        cmap = LinearSegmentedColormap.from_list(name, [(*to_rgb(COLOURS[name]), alpha) for alpha in (0.0, 1.0)])
        mappable = ScalarMappable(Normalize(0, top), cmap)
        scale = figure.colorbar(mappable, ax=axes, location="bottom", format=PercentFormatter(1.0), aspect=40, pad=0.01)
        scale.set_label(label)
        scale.outline.set_visible(False)
    _label_classes(axes, class_names)
    for axis in (axes.xaxis, axes.yaxis) if block_size > 1 else ():
        axis.set_label_text(f"{axis.get_label_text()}, in blocks of {block_size:,} classes")
    axes.set_title(title)
    if num_classes <= _MAX_CLASSES_WITH_NUMBERS:
        _write_cells(axes, cm, opacity)
    return figure


def _in_blocks(
    cm: Int[np.ndarray, "classes classes"],
) -> tuple[Int[np.ndarray, "rows rows"], Int64[np.ndarray, " rows"], int]:
    """Return a matrix of at most `_MAX_DRAWN` rows, the images of each row, and how many classes a row has.

    The diagonal has only correct predictions, not the mistakes among the classes of a row.
    """
    support, size = per_class(cm).support, -(-len(cm) // _MAX_DRAWN)
    if size == 1:
        return cm, support, size
    starts = np.arange(0, len(cm), size)
    blocks = np.add.reduceat(np.add.reduceat(cm, starts, axis=0), starts, axis=1)
    np.fill_diagonal(blocks, np.add.reduceat(np.diag(cm), starts))
    return blocks, np.add.reduceat(support, starts), size


def _label_classes(axes: Axes, class_names: Sequence[str]) -> None:
    names = shortened_apart([*map(printable, class_names)], shorten) if len(class_names) <= _MAX_NAMED else []
    size = min(10.0, max(3.0, 650 / len(class_names)))  # points; the largest that fits the rows of the largest figure
    # parse_math=False: a folder called "$5 or $6" is no formula.
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _write_cells(
    axes: Axes, cm: Int[np.ndarray, "classes classes"], opacity: Float[np.ndarray, "classes classes"]
) -> None:
    size = 9 if len(cm) <= 10 else 7
    for (row, column), number in np.ndenumerate(cm):
        if number or row == column:  # zeros off the diagonal stay empty, so that mistakes stand out
            color = COLOURS["face" if opacity[row, column] > _INVERTED_ABOVE else "ink"]
            place: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
            axes.text(column, row, f"{number:,}", fontsize=size, color=color, **place)


def images_figure(images: UInt8[np.ndarray, "n height width channels"], titles: Sequence[str]) -> Figure:
    """Draw images, 0-255, in a grid, enlarged without smoothing, each with its title of one or more lines above.

    Raises:
        ValueError: The numbers of images and titles differ.
    """
    columns = min(max(len(images), 1), max(4, math.ceil(math.sqrt(len(images)))), 10)
    rows = max(math.ceil(len(images) / columns), 1)
    num_lines = max((title.count("\n") + 1 for title in titles), default=1)
    width, height, margin = 1.5, 1.35 + 0.17 * num_lines, 0.05  # inches, of a cell
    figure = Figure(figsize=(width * columns, height * rows))
    # One Axes for all images: one each, laid out by matplotlib, takes 6 to 10 times as long.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    side = height - 0.17 * num_lines - 2 * margin
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(index, columns)
        center, bottom = (column + 0.5) * width, (row + 1) * height - margin
        scale = side / max(image.shape[:2])
        half, top = scale * image.shape[1] / 2, bottom - scale * image.shape[0]
        image = image.repeat(3 // image.shape[-1], axis=-1)  # gray
        axes.imshow(image, interpolation="nearest", extent=(center - half, center + half, bottom, top), aspect="auto")
        lines = [shorten(printable(line)) for line in title.split("\n")]
        axes.text(center, top - margin, "\n".join(lines), fontsize=8, ha="center", va="bottom", parse_math=False)
    axes.set(xlim=(0, width * columns), ylim=(height * rows, 0))  # `imshow` changes them
    return figure


def reliability_figure(probs: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> Figure:
    """Draw accuracy over confidence of the bins of `reliability`, with the number of images as the size of a point."""
    bins = reliability(probs.max(axis=1), probs.argmax(axis=1) == targets)
    known = bins.num_images > 0
    accuracies = bins.num_correct[known] / bins.num_images[known]
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color=COLOURS["ink"])
    axes.plot(bins.confidence[known], accuracies, color=COLOURS["correct"])
    sizes = 10 + 290 * bins.num_images[known] / bins.num_images.max()
    axes.scatter(bins.confidence[known], accuracies, sizes, color=COLOURS["correct"])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"ECE {bins.error:.1%}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    return figure


def lr_range_figure(lrs: Sequence[float], losses: Sequence[float], suggestion: float) -> Figure:
    """Draw the smoothed training loss of each step of the LR finder over its learning rate, with the suggested one."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, color=COLOURS["correct"])
    axes.axvline(suggestion, color=COLOURS["mistake"], linestyle="--", label=f"steepest slope: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed", title="Learning rate finder")
    axes.legend()
    return figure


def figure_to_array(figure: Figure, dpi: float = 100.0) -> UInt8[np.ndarray, "height width 3"]:
    """Return a figure as uint8 RGB, 0-255, for `add_image(dataformats="HWC")` of TensorBoard."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with _missing_glyphs_allowed():
        canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib has no types for it
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]  # likewise


def figure_to_png(figure: Figure, dpi: float = 150.0) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    # `savefig` would compute the layout twice.
    Image.fromarray(figure_to_array(figure, dpi)).save(buffer, "png", dpi=(dpi, dpi))
    return buffer.getvalue()


@contextlib.contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """Silence matplotlib's warning about characters that its font lacks, such as Chinese; it draws boxes for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
