"""Numbers -> matplotlib figures, as `Figure` objects with no pyplot behind them: nothing is kept, no window opens.

Colours hold for colour-blind readers: blue for right against orange for wrong (the pair that all common kinds tell
apart), each from light to dark, so that they also survive a grey printer.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from cifar_lightning.formatting import printable
from cifar_lightning.metrics.classification import accuracy, per_class

MAX_CLASSES_WITH_NUMBERS = 20
_MAX_NAME = 24
# Blue and orange of M. Okabe and K. Ito, "Color Universal Design" (2008); on dark ground their lighter pair.
_LIGHT_COLOURS = ["#0072b2", "#d55e00"]
_DARK_COLOURS = ["#56b4e9", "#e69f00"]


@contextlib.contextmanager
def themed(dark: bool = False) -> Iterator[None]:
    """Give figures that are made and drawn within it their colours: dark on white, or light on dark."""
    face, ink, faint = ("#16191f", "#e8eaee", "#4a505c") if dark else ("#ffffff", "#1b1f24", "#c9ced6")
    settings: dict[Any, Any] = dict.fromkeys(
        ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), face
    )
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink)
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "legend.edgecolor"), faint)
    with rc_context({**settings, "axes.titlesize": "medium"}):
        yield


def colour(name: Literal["right", "wrong"]) -> str:
    """Return the colour of right answers (blue) or of mistakes (orange) in the theme in force."""
    is_dark = to_rgb(rcParams["figure.facecolor"])[0] < 0.5
    return (_DARK_COLOURS if is_dark else _LIGHT_COLOURS)[0 if name == "right" else 1]


def confusion_figure(
    cm: Int[np.ndarray, "classes classes"], class_names: Sequence[str], normalize: bool = False
) -> Figure:
    """Draw a confusion matrix: true classes on the rows, right answers in blue, mistakes in orange.

    Colours always show the share of the true class, mistakes on a scale of their own, so that 3 % is seen beside 95 %.
    Up to 20 classes the cells hold numbers.

    Args:
        cm: Counts; rows: true class.
        class_names: In class order.
        normalize: Write per cent of the true class instead of counts.
    """
    num_classes = len(class_names)
    support = per_class(cm).support[:, None]
    shares = np.divide(cm, support, out=np.zeros(cm.shape), where=support > 0)
    size = (min(max(3.0 + 0.44 * num_classes, 6.4), 14.0), min(max(2.9 + 0.38 * num_classes, 4.6), 14.5))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    diagonal = np.eye(num_classes, dtype=bool)
    top_of_mistakes = max(float(shares[~diagonal].max(initial=0.0)), 0.01)
    # With square cells the constrained layout cuts off the title; the size of the figure keeps these nearly square.
    right = axes.imshow(np.ma.masked_where(~diagonal, shares), aspect="auto", cmap=_ramp("right"), vmin=0, vmax=1)
    mistakes = np.ma.masked_where(diagonal | (cm == 0), shares)
    wrong = axes.imshow(mistakes, aspect="auto", cmap=_ramp("wrong"), vmin=0, vmax=top_of_mistakes)
    for image, label in ((wrong, "mistakes, % of the true class"), (right, "right, % of the true class")):
        scale = figure.colorbar(image, ax=axes, location="bottom", format=PercentFormatter(1.0), aspect=40, pad=0.01)
        scale.set_label(label)
        scale.outline.set_visible(False)
    _label_classes(axes, class_names)
    num_images = int(cm.sum())
    axes.set_title(f"Accuracy {accuracy(cm):.2%} of {num_images:,} images" if num_images else "No images")
    if num_classes <= MAX_CLASSES_WITH_NUMBERS:
        images = np.where(diagonal[..., None], right.to_rgba(shares), wrong.to_rgba(shares))
        _write_cells(axes, 100 * shares if normalize else cm, images, decimals=1 if normalize else 0)
    return figure


def _ramp(name: Literal["right", "wrong"]) -> Colormap:
    """Return the colours from the background to a strong one, also for people who do not tell red from green."""
    strong = {"right": ("#08519c", "#7cc4ff"), "wrong": ("#a63603", "#ffb366")}[name]
    face = rcParams["figure.facecolor"]
    is_dark = to_rgb(face)[0] < 0.5
    return LinearSegmentedColormap.from_list(name, [face, colour(name), strong[is_dark]])


def _label_classes(axes: Axes, class_names: Sequence[str]) -> None:
    names = [shorten(printable(name)) for name in class_names]
    size = min(10.0, max(3.0, 650 / len(names)))  # points; fills the rows of the largest figure
    # Without parse_math a folder called "$5 or $6" would be set as a formula.
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _write_cells(axes: Axes, values: np.ndarray, colours: np.ndarray, decimals: int) -> None:
    size = 9 if len(values) <= 10 else 7
    for (row, column), value in np.ndenumerate(values):
        if value or row == column:  # empty cells stay empty: the eye finds the mistakes
            # Luma of Rec. 601: black or white, whichever is read better on the cell.
            ink = "black" if colours[row, column, :3] @ (0.299, 0.587, 0.114) > 0.5 else "white"
            text = f"{value:,.{decimals}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)


def shorten(name: str, length: int = _MAX_NAME) -> str:
    """Return a name that leaves room for what stands beside it."""
    return name if len(name) <= length else name[: length - 2] + ".."


def images_figure(images: UInt8[np.ndarray, "n height width 3"], titles: Sequence[str]) -> Figure:
    """Draw images in a grid, enlarged without blurring, each under its title.

    Args:
        images: uint8 RGB, 0-255.
        titles: One an image; may have several lines.

    Raises:
        ValueError: Not one title for each image.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(images)} images but {len(titles)} titles")
    columns = min(max(len(images), 1), max(4, math.ceil(math.sqrt(len(images)))), 10)
    rows = max(math.ceil(len(images) / columns), 1)
    num_lines = max((title.count("\n") + 1 for title in titles), default=1)
    figure = Figure(figsize=(1.5 * columns, (1.35 + 0.17 * num_lines) * rows), layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index], interpolation="nearest")
            lines = [shorten(printable(line)) for line in titles[index].split("\n")]
            axes.set_title("\n".join(lines), fontsize=8, pad=3, parse_math=False)
    return figure


def lr_range_figure(lrs: Sequence[float], losses: Sequence[float], suggestion: float) -> Figure:
    """Draw the loss of a learning-rate range test over the rate, with the suggested one.

    Args:
        lrs: Rate of each step, rising.
        losses: Smoothed training loss of each step.
        suggestion: The rate to mark.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, color=colour("right"))
    axes.axvline(suggestion, color=colour("wrong"), linestyle="--", label=f"steepest fall: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed", title="Learning-rate range test")
    axes.legend()
    return figure


def figure_to_array(figure: Figure, dpi: float = 100.0) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a figure into uint8 RGB, 0-255, as TensorBoard's `add_image(dataformats="HWC")` takes it."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        _allow_missing_glyphs()
        canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib has no types for it
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]  # likewise


def figure_to_png(figure: Figure, dpi: float = 150.0) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    # Not by `savefig`, which lays out the figure twice.
    Image.fromarray(figure_to_array(figure, dpi)).save(buffer, "png", dpi=(dpi, dpi))
    return buffer.getvalue()


def lay_out_like(figure: Figure, drawn: Figure) -> None:
    """Put the axes of a figure where those of another one are that was drawn and differs in colours alone.

    Finding the layout takes longer than drawing.
    """
    figure.set_layout_engine("none")
    for axes, model in zip(figure.axes, drawn.axes, strict=True):
        axes.set_position(model.get_position())


def _allow_missing_glyphs() -> None:
    # The font that matplotlib brings has no Chinese, for one: boxes are drawn, which says enough once.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
