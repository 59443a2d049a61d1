"""Findings, figures and images -> one self-contained HTML page; imports neither torch nor Lightning.

The page fetches nothing: styles, script and images are in it, and its content security policy forbids the rest. Names
of classes and folders are escaped by Jinja.
"""

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from cifar_lightning.formatting import (
    count,
    decimal,
    duration,
    images,
    percent,
    points,
    points_span,
    printable,
    pvalue,
    span,
    unbroken,
)
from cifar_lightning.report.charts import classes_figure, confidence_figure, curves_figure, reliability_figure
from cifar_lightning.report.figures import (
    MAX_CLASSES_WITH_NUMBERS,
    confusion_figure,
    figure_to_array,
    lay_out_like,
    themed,
)
from cifar_lightning.settings.roles import AUGMENTATION_SHOWN, NOT_AUGMENTATION, READ_BY

TEMPLATES = Path(__file__).parent
_DPI = 120.0  # of charts; the page shows them at about half of that, so that they are sharp on fine screens, too
_LARGE_INCHES = 10.0  # a matrix of 100 classes is 14 wide: its names are legible where it is enlarged
_DPI_OF_LARGE = 150.0
_MAX_GROUPED = 12  # more classes in groups than that are folded away
_CRISP_PX = 64  # an image up to this side is shown pixel by pixel; a larger one is reduced to `_REDUCED_PX`
_REDUCED_PX = 144  # sharp on fine screens, too, where it is shown 96 wide


def render_page(findings: Mapping[str, Any], kept: Mapping[int, UInt8[np.ndarray, "height width 3"]]) -> str:
    """Return the page as HTML.

    Args:
        findings: What `findings.find` returned, with `run.name`, `run.network`, `run.data` and `run.command`.
        kept: Test images by their index, uint8 RGB, 0-255.
    """
    found = [row for row in findings["classes"] if row["support"]]
    sides = [max(image.shape[:2]) for image in kept.values()]
    return render(
        "page.html",
        f=findings,
        css=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        figures=draw_figures(findings),
        uris=_image_uris(findings, kept),
        kind_of_image="crisp" if max(sides, default=0) <= _CRISP_PX else "smooth",
        hardest=min(found, key=lambda row: row["recall"], default=None) if len(found) > 1 else None,
        never=[row["name"] for row in found if not row["predicted"]],
        groups_open=_MAX_GROUPED,
        facts=facts_of(findings["run"]),
        reproduce=reproduction_of(findings["run"]),
        config=yaml.safe_dump(findings["run"]["config"], sort_keys=False, allow_unicode=True)
        if findings["run"]["config"]
        else "",
    )


def render(template: str, **values: Any) -> str:
    """Return one of the package's templates, filled; HTML is escaped, Markdown is not."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_shown if template.endswith(".html") else _cleaned,
    )
    filters = (percent, span, points, points_span, decimal, count, images, pvalue, duration)
    environment.filters["verbatim"] = lambda text: escape(_clean(text))  # to be copied: spaces stay what they are
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")  # of a Markdown table
    environment.filters.update({function.__name__: function for function in filters})
    # Styles and script are the package's own text.
    own = {key: values.pop(key) for key in ("css", "script") if key in values}
    return environment.get_template(template).render(**values, **{key: Markup(text) for key, text in own.items()})


def draw_figures(findings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the charts by name as data URIs: `light`, `dark`, `alt` (what they show), `width` (pixels), `is_large`."""
    cm = np.array(findings["confusion_matrix"], dtype=np.int64)
    names = [row["name"] for row in findings["classes"]]
    calibration, epochs = findings["calibration"], findings["epochs"]
    makers: dict[str, tuple[str, Any]] = {
        "confusion": ("confusion matrix, images", lambda: confusion_figure(cm, names)),
        "classes": ("share of each class that is found", lambda: classes_figure(findings["classes"])),
    }
    if len(names) <= MAX_CLASSES_WITH_NUMBERS:  # without numbers both are the same image
        alt = "confusion matrix, per cent of each row"
        makers["confusion_normalized"] = (alt, lambda: confusion_figure(cm, names, normalize=True))
    if calibration is not None:
        makers["reliability"] = ("accuracy over confidence", lambda: reliability_figure(calibration))
        makers["confidence"] = ("histogram of confidence", lambda: confidence_figure(calibration))
    if epochs:
        makers["curves"] = ("accuracy, loss and learning rate over the epochs", lambda: curves_figure(epochs))
    return {name: {"alt": alt, **_draw(make)} for name, (alt, make) in makers.items()}


def _draw(make: Callable[[], Figure]) -> dict[str, Any]:
    with themed():
        light = make()
        width = light.get_figwidth()
        is_large = width > _LARGE_INCHES
        dpi = _DPI_OF_LARGE if is_large else _DPI
        uris = {"light": _chart_uri(figure_to_array(light, dpi))}
    with themed(dark=True):
        dark = make()
        lay_out_like(dark, light)
        uris["dark"] = _chart_uri(figure_to_array(dark, dpi))
    return {**uris, "width": round(80 * width), "is_large": is_large}


def _chart_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> Markup:
    """Return a chart with 256 colours: a third of the size, and no difference that the eye finds."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(buffer, "png")
    return _data_uri("image/png", buffer.getvalue())


def _image_uris(
    findings: Mapping[str, Any], kept: Mapping[int, UInt8[np.ndarray, "height width 3"]]
) -> dict[int, Markup]:
    galleries = [gallery["images"] for gallery in findings["galleries"]]
    if findings.get("comparison"):
        galleries += [changed["images"] for changed in findings["comparison"]["changed"].values()]
    return {index: _image_uri(kept[index]) for index in {item["index"] for shown in galleries for item in shown}}


def _image_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> Markup:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= _CRISP_PX:
        image.save(buffer, "png", optimize=True)
        return _data_uri("image/png", buffer.getvalue())
    image.thumbnail((_REDUCED_PX, _REDUCED_PX))
    image.save(buffer, "jpeg", quality=75)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")  # nothing in it to escape or clean


def facts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader asks about a run first: recipe, data, environment; what is not known is left out."""
    config, split, environment = run["config"], run["split"], run["environment"]
    model, data, trainer = (config.get(part) or {} for part in ("model", "data", "trainer"))
    sizes, versions = split.get("sizes") or {}, environment.get("versions") or {}
    more_augmentation = [name for name in data if name not in NOT_AUGMENTATION]
    learning = ("lr", *READ_BY.get(str(model.get("optimizer")), ()), "label_smoothing", "schedule", "tta")
    lengths = [name for name in ("max_epochs", "max_steps") if trainer.get(name) != -1]
    # What most runs leave off is named where it is on.
    of_data = _listed_if_on(data, ("limit", "class_weights", "sampler"))
    of_images = _listed_if_on(data, more_augmentation) + _listed_if_on(model, ("mixup", "cutmix"))
    of_model = _listed_if_on(model, ("pct_start", "ema_decay", "pretrained"))
    resumed = environment.get("resumed") or []
    commit = environment.get("commit")
    changed = ", with changes that are not committed" if environment.get("dirty") else ""
    facts: list[tuple[str, Any]] = [
        ("Network", " ".join(str(part) for part in (model.get("name"), model.get("model_kwargs") or "") if part)),
        ("Optimiser", _named(model, "optimizer", learning) + of_model),
        (
            "Training",
            _listed(trainer, (*lengths, "precision")) + _listed(data, ("batch_size",), before=", ") + of_data,
        ),
        ("Augmentation", _listed(data, AUGMENTATION_SHOWN) + of_images),
        ("Seeds", f"training {config.get('seed_everything')}, split {split.get('seed')}" if config else ""),
        ("Images", split.get("dataset")),
        ("Split", ", ".join(f"{number:,} {part}" for part, number in sizes.items())),
        ("Held out", _held_out(split)),
        ("SHA-256 of the test images", (split.get("sha256") or {}).get("test")),
        ("Device", _named(environment, "device", ("num_devices", "precision", "num_threads"))),
        ("Machine", ", ".join(str(environment[key]) for key in ("cpu", "platform") if environment.get(key))),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)),
        ("Commit", f"{commit}{changed}" if commit else ""),
        ("Gone on with", f"{len(resumed)} times" if resumed else ""),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _held_out(split: Mapping[str, Any]) -> str:
    if split.get("val_from") == "train":
        return f"{percent(split.get('val_fraction'), 0)} of the training images, the same share of each class"
    return str(split.get("val_from") or "")


def _named(values: Mapping[str, Any], name: str, others: Sequence[str]) -> str:
    return ", ".join(text for text in (str(values.get(name) or ""), _listed(values, others)) if text)


def _listed(values: Mapping[str, Any], names: Sequence[str], before: str = "") -> str:
    known = [f"{name} {values[name]}" for name in names if values.get(name) is not None]
    return before + ", ".join(known) if known else ""


def _listed_if_on(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return what goes behind a list: those of the values that are neither 0 nor false nor "none"."""
    return "".join(f", {name} {values[name]}" for name in names if values.get(name) not in (None, 0, "none"))


def reproduction_of(run: Mapping[str, Any]) -> str:
    """Return the commands that make the run again, as far as its files tell."""
    environment = run["environment"]
    torch_version = (environment.get("versions") or {}).get("torch")
    lines = []
    if environment.get("commit"):
        lines.append(f"git checkout {environment['commit']}")
        if environment.get("dirty"):
            lines.append("# the run's copy had further changes, which no commit holds")
    lines.append("pip install -e ." + (f"    # it ran with torch {torch_version}" if torch_version else ""))
    lines.append("python train.py fit --config config.yaml    # the run's own file")
    return "\n".join(lines)


def command_of(environment: Mapping[str, Any]) -> str:
    """Return the command that started a run, without the Python it ran in; empty if it is not known."""
    words = [str(word) for word in environment.get("command") or []]
    return shlex.join(["python", *words[1:]]) if words else ""


def _shown(value: Any) -> Any:
    """Return what the page says for a value: clean, and with no line break between a number and its sign."""
    value = _cleaned(value)
    return unbroken(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _cleaned(value: Any) -> Any:
    """Return a value; text without the bytes or control characters of class names that no page can show."""
    return value if not isinstance(value, str) or hasattr(value, "__html__") else _clean(value)


def _clean(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
