"""Report as a self-contained HTML page, and the Jinja templates.

Styles, script and images are embedded and the content security policy forbids loading anything else. Jinja escapes the
names of classes and folders.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int64, UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from cifar_lightning import formatting
from cifar_lightning.formatting import object_text, percent, plural, printable, shell_line, unbroken
from cifar_lightning.metrics.classification import most_confused, per_class
from cifar_lightning.report.charts import Curves, confidence_chart, curves_charts, reliability_chart
from cifar_lightning.report.figures import shade
from cifar_lightning.report.gallery import NUM_EXPLAINED
from cifar_lightning.report.results import Explanations
from cifar_lightning.runs.ending import ending_text
from cifar_lightning.runs.environment import inexact_resumes
from cifar_lightning.settings.roles import (
    OWN_OPTIMIZER,
    READ_BY,
    augmentations,
    flat_settings,
    is_object_name,
    switched_on,
)

Image3 = UInt8[np.ndarray, "height width 3"]
_TEMPLATES = Path(__file__).parent
_FILTERS = ["percent", "span", "points", "points_span", "decimal", "count", "plural", "pvalue", "duration"]
_MAX_IN_MATRIX = 20  # classes; above, the most confused of them
_MAX_GROUPED = 12  # grouped classes above this number are folded
_MAX_ITEMS = 5  # of an insight
_MAX_ISSUES = 25
_MAX_NAME = 40  # characters of an image's name
_CRISP_PX = 64  # images up to this size are scaled up without smoothing; larger ones are reduced to `_REDUCED_PX`
_REDUCED_PX = 144  # shown 96 px wide; sharp on high-density screens


def render_page(
    findings: Mapping[str, Any],
    kept: Mapping[int, Image3],
    explanations: Explanations | None,
    explanations_reason: str,
    confusion: Int64[np.ndarray, "classes classes"],
) -> str:
    """Return the page as HTML: the findings, with `report.describe_run` in `run`, and test images by index."""
    tested = [row for row in findings["classes"] if row["support"]]
    lowest, pairs = worst_first_of(tested), findings["confused_pairs"]
    times = [pair["count"] + pair["reverse_count"] for pair in pairs]
    sizes = [max(image.shape[:2]) for image in kept.values()]
    calibration, run, comparison = findings["calibration"], findings["run"], findings["comparison"]
    is_by_step = findings["training"]["has_learning_rates"]
    curves = [Curves("this run", findings["epochs"], findings["learning_rates"], is_by_step=is_by_step)]
    if comparison:
        curves.append(Curves(comparison["runs"][1]["name"], **comparison["curves"], group=1))
    groups = [*findings["galleries"], *findings["confused_pairs"]]
    listed = {item["index"] for group in groups for item in group["images"]}
    changed = [item for it in comparison["changed"].values() for item in it["images"]] if comparison else []
    return render(
        "page.html",
        f=findings,
        matrix=matrix_of(confusion, [row["name"] for row in findings["classes"]]),
        calibration_charts=[reliability_chart(calibration), confidence_chart(calibration)] if calibration else [],
        curves=curves_charts(curves) if findings["epochs"] else [],
        listed=listed,
        uris={index: _image_uri(kept[index]) for index in listed | {item["index"] for item in changed}},
        explained=_explained(explanations, kept, [row["name"] for row in findings["classes"]]),
        explanations_reason=explanations_reason,
        image_class="crisp" if max(sizes, default=0) <= _CRISP_PX else "smooth",
        hardest=lowest[0] if len(lowest) > 1 and lowest[0]["recall"] < lowest[1]["recall"] else None,
        most_confused=pairs[0] if pairs and times[:1] != times[1:2] else None,
        num_rated=sum(row["support"] + row["predicted"] > 0 for row in findings["classes"]),
        never=[row["name"] for row in tested if not row["predicted"]],
        worst_first=worst_first_of(findings["classes"]) if len(findings["classes"]) > _MAX_IN_MATRIX else [],
        groups_open=_MAX_GROUPED,
        items_shown=_MAX_ITEMS,
        issues_shown=_MAX_ISSUES,
        facts=facts_of(run),
        duplicates=duplicates_of(run),
        is_repeatable=is_repeatable(run["config"]),
        reproduce=reproduction_of(run),
        config=yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True) if run["config"] else "",
    )


def render(template: str, **values: Any) -> str:
    """Render a template of this package; values are escaped for HTML or Markdown, but for `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_shown if template.endswith(".html") else _in_markdown,
    )
    environment.filters["verbatim"] = lambda text: escape(_clean(text))  # for copying: no non-breaking spaces
    environment.filters["tail"] = _tail
    environment.filters["code"] = lambda text: Markup(formatting.markdown_code(text))  # escaped for Markdown
    environment.globals["command_line"] = formatting.command_line
    environment.filters.update({name: getattr(formatting, name) for name in _FILTERS})
    for name, file in (("css", "page.css"), ("script", "page.js")):  # ours, which need no escaping
        environment.globals[name] = Markup((_TEMPLATES / file).read_text(encoding="utf-8"))
    return environment.get_template(template).render(values)


def matrix_of(cm: Int64[np.ndarray, "classes classes"], names: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix as the page shows it; of many classes those of the most confused pairs.

    Keys: `rows` [{name, short (for a heading), cells [{number, fraction (of the true class), opacity, is_correct}]}],
    `top` (fraction at which a mistake is opaque), `is_part`.
    """
    shown = list(range(len(cm)))
    if len(cm) > _MAX_IN_MATRIX:
        pairs = most_confused(np.triu(cm + cm.T, 1), len(cm))
        confused = dict.fromkeys(index for pair in pairs for index in (pair.true, pair.pred))
        shown = sorted(list(dict.fromkeys([*confused, *shown]))[:_MAX_IN_MATRIX])
    part, support = cm[np.ix_(shown, shown)], per_class(cm).support[shown, None]
    is_correct = np.eye(len(shown), dtype=bool)
    fractions, top, opacity = shade(part, support)
    keys = ("number", "fraction", "opacity", "is_correct")
    columns = zip(*(array.tolist() for array in (part, fractions, opacity.round(2), is_correct)), strict=True)
    short = formatting.shortened_apart([*map(formatting.printable, names)], formatting.shorten)
    rows = [[dict(zip(keys, cell, strict=True)) for cell in zip(*row, strict=True)] for row in columns]
    return {
        "rows": [
            {"name": names[index], "short": short[index], "cells": cells}
            for index, cells in zip(shown, rows, strict=True)
        ],
        "top": top,
        "is_part": len(shown) < len(cm),
    }


def worst_first_of(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return classes by recall, the lowest first; those without images, whose recall is NaN, last."""
    return sorted(classes, key=lambda row: row["recall"] if row["support"] else math.inf)


def _explained(
    explanations: Explanations | None, kept: Mapping[int, Image3], names: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Return Grad-CAM as an image, and the nearest training images, of the first mistakes by index."""
    found: dict[int, dict[str, Any]] = {}
    if explanations is None:
        return found
    nearest = (explanations.neighbours, explanations.neighbour_names, explanations.neighbour_labels)
    for at, index in enumerate(explanations.indices[:NUM_EXPLAINED].tolist()):
        if index in kept:
            cam = None if explanations.cam is None else _image_uri(lit(kept[index], explanations.cam[at]))
            rows = zip(*(column[at] for column in nearest if column is not None), strict=True)
            found[index] = {
                "cam": cam,
                "nearest": [
                    {"uri": _image_uri(image), "name": str(name), "label": names[label]} for image, name, label in rows
                ],
            }
    return found


def lit(image: Image3, cam: UInt8[np.ndarray, "rows columns"]) -> Image3:
    """Return an image that is as bright as its Grad-CAM, 0-255, but nowhere dark: readable without colours."""
    scaled = Image.fromarray(cam).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    light = 0.2 + 0.8 * np.asarray(scaled)[:, :, None] / 255
    result: Image3 = (image * light).round().astype(np.uint8)
    return result


def _image_uri(pixels: Image3) -> Markup:
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
    optimizer = optimizer or list(environment.get("optimizers") or [])  # of a `configure_optimizers` of one's own
    read = ("lr", *READ_BY.get(str(model.get("optimizer")).partition("/")[0], ()), "label_smoothing", "schedule", "tta")
    read = ("label_smoothing", "tta") if optimizer else read
    changed = "with uncommitted changes" if environment.get("dirty") else None
    of_weights = switched_on(model, ("pct_start", "ema_decay", "pretrained"))
    of_data = switched_on(data, ("limit", "class_weights", "sampler"))
    mixes = switched_on(model, ("mixup", "cutmix"))
    seeds = {"training": config.get("seed_everything"), "split": split.get("seed")}
    num_resumed = len(environment.get("resumed") or [])
    facts: list[tuple[str, list[Any]]] = [
        ("Model", [config.get("model_class"), model.get("name"), model.get("model_kwargs")]),
        ("Optimizer", [*(optimizer or [str(model.get("optimizer") or "")]), *_given(model, read), *of_weights]),
        ("Training", [*_given(trainer, (*lengths, "precision")), *_given(data, ("batch_size",)), *of_data]),
        ("Augmentation", [*augmentations(data), *_given(data, ("train_sizes",)), *mixes]),
        ("Seeds", [f"{of} {seed}" for of, seed in seeds.items() if seed is not None]),
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


def is_repeatable(config: Mapping[str, Any]) -> bool:
    """Whether commands can repeat a run: its settings are known, and none stands for an object from Python."""
    return bool(config) and not any(map(is_object_name, flat_settings(config).values()))


def reproduction_of(run: Mapping[str, Any]) -> str:
    """Return the commands that reproduce the run, or comments on why none does."""
    environment = run["environment"]
    versions = environment.get("versions") or {}
    used = [f"{name} {printable(str(versions[name]))}" for name in ("cifar-lightning", "torch") if versions.get(name)]
    lines = [f"# the run used {', '.join(used)}"] if used else []
    if environment.get("commit"):
        lines += [shell_line("git", "checkout", str(environment["commit"])), "pip install -e ."]
        if environment.get("dirty"):
            lines.append("# the run had further changes that were not committed")
    if is_repeatable(run["config"]):
        lines.append("cifar-lightning fit --config config.yaml    # config.yaml of the run")
        lines += [f"# {fact}" for fact in _not_in_config(environment)]
    else:
        objects = [value for value in flat_settings(run["config"]).values() if is_object_name(value)]
        given = f"{printable(', '.join(objects))} given from Python" if objects else "its settings are not known"
        lines.append(f"# no command repeats this run: {given}")
    return "\n".join(lines)


def _not_in_config(environment: Mapping[str, Any]) -> list[str]:
    """Return what config.yaml does not have of a run's training: earlier values of settings, and its checkpoint."""
    changed = sorted({key for entry in environment.get("resumed") or [] for key in entry.get("changed") or {}})
    keys = printable(", ".join(changed))
    facts = [f"resumed with other {keys}, whose last values config.yaml has"] if changed else []
    if checkpoint := environment.get("ckpt_path"):
        facts.append(f"begun from a checkpoint, --ckpt_path {printable(str(checkpoint))}")
    return facts


def command_of(environment: Mapping[str, Any]) -> str:
    """Return the command that started a run, without the path of its Python; empty if unknown."""
    words = [str(word) for word in environment.get("command") or []]
    if len(words) > 1 and words[1].endswith("cifar-lightning"):  # the script that pip installs
        return shell_line("cifar-lightning", *words[2:])
    return shell_line("python", *words[1:]) if words else ""


def _tail(name: str) -> Markup:
    """Return the end of a name, which tells files apart, to be broken after slashes where it is too long."""
    shown = _clean(name if len(name) <= _MAX_NAME else f"...{name[3 - _MAX_NAME :]}")
    return Markup("/<wbr>").join(shown.split("/"))


def _shown(value: Any) -> Any:
    """Return a value for the page: printable, without line breaks between a number and its unit."""
    return unbroken(_clean(value)) if _is_plain(value) else value


def _in_markdown(value: Any) -> Any:
    return formatting.markdown(value) if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Markup)


def _clean(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
