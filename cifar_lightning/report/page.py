"""Report as a self-contained HTML page, and the Jinja templates.

Styles, script and images are embedded and the content security policy forbids loading anything else. Jinja escapes the
names of classes and folders.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from cifar_lightning import formatting
from cifar_lightning.formatting import object_text, percent, plural, printable, shell_line, unbroken
from cifar_lightning.report.charts import classes_figure, confidence_figure, curves_figure, reliability_figure
from cifar_lightning.report.figures import MAX_CLASSES_WITH_NUMBERS, confusion_figure, figure_to_svg, themed
from cifar_lightning.runs.ending import ending_text
from cifar_lightning.runs.environment import inexact_resumes
from cifar_lightning.settings.roles import OWN_OPTIMIZER, READ_BY, augmentations, switched_on

TEMPLATES = Path(__file__).parent
_FILTERS = ("percent", "span", "points", "points_span", "decimal", "count", "images", "pvalue", "duration")
_LARGE_INCHES = 10.0  # a matrix of 100 classes is 14 wide: its names are legible where it is enlarged
_MAX_GROUPED = 12  # grouped classes above this number are folded
_CRISP_PX = 64  # images up to this size are scaled up without smoothing; larger ones are reduced to `_REDUCED_PX`
_REDUCED_PX = 144  # shown 96 px wide; sharp on high-density screens


def render_page(findings: Mapping[str, Any], kept: Mapping[int, UInt8[np.ndarray, "height width 3"]]) -> str:
    """Return the page as HTML: the findings, with `report.describe_run` in `run`, and test images by index."""
    tested = [row for row in findings["classes"] if row["support"]]
    sizes = [max(image.shape[:2]) for image in kept.values()]
    return render(
        "page.html",
        f=findings,
        css=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        figures=draw_figures(findings),
        uris=_image_uris(findings, kept),
        image_class="crisp" if max(sizes, default=0) <= _CRISP_PX else "smooth",
        hardest=min(tested, key=lambda row: row["recall"], default=None) if len(tested) > 1 else None,
        never=[row["name"] for row in tested if not row["predicted"]],
        groups_open=_MAX_GROUPED,
        facts=facts_of(findings["run"]),
        duplicates=duplicates_of(findings["run"]),
        reproduce=reproduction_of(findings["run"]),
        config=yaml.safe_dump(findings["run"]["config"], sort_keys=False, allow_unicode=True)
        if findings["run"]["config"]
        else "",
    )


def render(template: str, **values: Any) -> str:
    """Render a template of this package; values are escaped for HTML or Markdown, but for `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_shown if template.endswith(".html") else _in_markdown,
    )
    environment.filters["verbatim"] = lambda text: escape(_clean(text))  # for copying: no non-breaking spaces
    environment.filters["code"] = lambda text: Markup(formatting.markdown_code(text))  # escaped for Markdown
    environment.globals["command_line"] = formatting.command_line
    environment.filters.update({name: getattr(formatting, name) for name in _FILTERS})
    # Styles and script are ours and need no escaping.
    own = {key: values.pop(key) for key in ("css", "script") if key in values}
    return environment.get_template(template).render(**values, **{key: Markup(text) for key, text in own.items()})


def draw_figures(findings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the charts by name: `svg`, `alt` (text alternative), `width` (pixels) and `is_large`."""
    cm = np.array(findings["confusion_matrix"], dtype=np.int64)
    names = [row["name"] for row in findings["classes"]]
    calibration, epochs = findings["calibration"], findings["epochs"]
    with themed():
        figures = {
            "confusion": ("confusion matrix, images", confusion_figure(cm, names)),
            "classes": ("recall of each class", classes_figure(findings["classes"])),
        }
        if len(names) <= MAX_CLASSES_WITH_NUMBERS:  # without numbers the two matrices are identical
            alt = "confusion matrix, percent of each row"
            figures["confusion_normalized"] = (alt, confusion_figure(cm, names, normalize=True))
        if calibration is not None:
            figures["reliability"] = ("accuracy over confidence", reliability_figure(calibration))
            figures["confidence"] = ("histogram of confidence", confidence_figure(calibration))
        if epochs:
            figures["curves"] = ("accuracy, loss and learning rate over the epochs", curves_figure(epochs))
        return {
            name: {
                "svg": Markup(figure_to_svg(figure)),  # matplotlib escapes text
                "alt": alt,
                "width": round(80 * figure.get_figwidth()),
                "is_large": figure.get_figwidth() > _LARGE_INCHES,
            }
            for name, (alt, figure) in figures.items()
        }


def _image_uris(
    findings: Mapping[str, Any], kept: Mapping[int, UInt8[np.ndarray, "height width 3"]]
) -> dict[int, Markup]:
    galleries = [gallery["images"] for gallery in findings["galleries"]]
    if findings.get("comparison"):
        galleries += [changed["images"] for changed in findings["comparison"]["changed"].values()]
    return {index: _image_uri(kept[index]) for index in {item["index"] for shown in galleries for item in shown}}


def _image_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> Markup:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    kind = "png"
    if max(image.size) > _CRISP_PX:
        image.thumbnail((_REDUCED_PX, _REDUCED_PX))
        kind = "jpeg"
    image.save(buffer, kind, optimize=True)  # a JPEG of Pillow's default quality, 75
    return Markup(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")  # needs no escaping


def facts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings, data and environment of a run as label and text; unknown ones are left out."""
    config, split, environment = run["config"], run["split"], run["environment"]
    model, data, trainer = (config.get(group) or {} for group in ("model", "data", "trainer"))
    lengths = [name for name in ("max_epochs", "max_steps") if trainer.get(name) != -1]
    optimizer = [object_text(config[name]) for name in OWN_OPTIMIZER if config.get(name)]
    read = ("lr", *READ_BY.get(str(model.get("optimizer")).partition("/")[0], ()), "label_smoothing", "schedule", "tta")
    read = ("label_smoothing", "tta") if optimizer else read
    changed = "with uncommitted changes" if environment.get("dirty") else None
    of_weights = switched_on(model, ("pct_start", "ema_decay", "pretrained"))
    of_data = switched_on(data, ("limit", "class_weights", "sampler"))
    mixes = switched_on(model, ("mixup", "cutmix"))
    num_resumed = len(environment.get("resumed") or [])
    facts: list[tuple[str, list[Any]]] = [
        ("Model", [config.get("model_class"), model.get("name"), model.get("model_kwargs")]),
        ("Optimizer", [*(optimizer or [str(model.get("optimizer") or "")]), *_given(model, read), *of_weights]),
        ("Training", [*_given(trainer, (*lengths, "precision")), *_given(data, ("batch_size",)), *of_data]),
        ("Augmentation", [*augmentations(data), *_given(data, ("train_sizes",)), *mixes]),
        ("Seeds", [f"training {config.get('seed_everything')}, split {split.get('seed')}"] if config else []),
        ("Data set", [split.get("dataset")]),
        ("Split", [f"{number:,} {name}" for name, number in (split.get("sizes") or {}).items()]),
        ("Validation split", [_val_origin(split)]),
        ("SHA-256 of the test images", [(split.get("sha256") or {}).get("test")]),
        ("Device", [environment.get("device"), *_given(environment, ("num_devices", "precision", "num_threads"))]),
        ("Machine", [environment.get("cpu"), environment.get("platform")]),
        ("Versions", [f"{name} {number}" for name, number in (environment.get("versions") or {}).items() if number]),
        ("Commit", [environment["commit"], changed] if environment.get("commit") else []),
        ("Training ended", [ending_text(environment.get("ended"))]),
        ("Resumed", [plural(num_resumed, "time"), *inexact_resumes(environment)] if num_resumed else []),
    ]
    texts = ((label, ", ".join(str(item) for item in items if item)) for label, items in facts)
    return [(label, text) for label, text in texts if text]


def _given(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{name} {values[name]}" for name in names if values.get(name) is not None]


def duplicates_of(run: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return for each kind of identical images the counts in words, and the names in some groups of them."""
    kinds = run["split"].get("duplicates", [])
    return [(kind["text"], [" = ".join(group) for group in kind["first"]]) for kind in kinds]


def _val_origin(split: Mapping[str, Any]) -> str:
    if split.get("val_from") == "train":
        return f"{percent(split.get('val_fraction'), 0)} of the training images, stratified by class"
    return str(split.get("val_from") or "")


def reproduction_of(run: Mapping[str, Any]) -> str:
    """Return the commands that reproduce the run."""
    environment = run["environment"]
    versions = environment.get("versions") or {}
    used = [f"{name} {printable(str(versions[name]))}" for name in ("cifar-lightning", "torch") if versions.get(name)]
    lines = [f"# the run used {', '.join(used)}"] if used else []
    if environment.get("commit"):
        lines += [shell_line("git", "checkout", str(environment["commit"])), "pip install -e ."]
        if environment.get("dirty"):
            lines.append("# the run had further changes that were not committed")
    lines.append("cifar-lightning fit --config config.yaml    # config.yaml of the run")
    return "\n".join(lines)


def command_of(environment: Mapping[str, Any]) -> str:
    """Return the command that started a run, without the path of its Python; empty if unknown."""
    words = [str(word) for word in environment.get("command") or []]
    if len(words) > 1 and words[1].endswith("cifar-lightning"):  # the script that pip installs
        return shell_line("cifar-lightning", *words[2:])
    return shell_line("python", *words[1:]) if words else ""


def _shown(value: Any) -> Any:
    """Return a value for the page: printable, without line breaks between a number and its unit."""
    return unbroken(_clean(value)) if _is_plain(value) else value


def _in_markdown(value: Any) -> Any:
    return formatting.markdown(value) if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Markup)


def _clean(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
