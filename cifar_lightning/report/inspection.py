"""What is in a data set, in words: what `data.inspection.inspect_source` returns, for the terminal and as a page."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from cifar_lightning.formatting import plural, printable, shorten, shortened_apart
from cifar_lightning.report.page import render

_MAX_LINES = 29  # and one of the page
_MAX_ROWS = 10  # classes on the terminal: of more, the largest and the smallest
_MAX_NAMES = 3  # of images, on the terminal
_MAX_LISTED = 500  # names of one kind, on the page
_NAME_WIDTH = 30  # of the column of classes on the terminal
_WIDTH = 118  # characters of a line on the terminal
_TILE_PX, _SMALL_PX, _MANY_CLASSES = 64, 32, 100  # side of a sample image; of many classes


def inspection_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what the terminal shows: at most 29 lines."""
    names, counts = found["class_names"], found["counts"]
    order, half, facts = list(range(len(names))), _MAX_ROWS // 2, facts_of(found)
    if len(names) > _MAX_ROWS:
        by_size = np.argsort(-sum(counts.values()), kind="stable").tolist()
        order = by_size[:half] + by_size[-half:]
    cut = shortened_apart([*map(printable, names)], lambda name: shorten(name, _NAME_WIDTH - 1))
    rows = [(cut[at], [f"{of[at]:,}" for of in counts.values()]) for at in order]
    rows.append(("all classes", [f"{of.sum():,}" for of in counts.values()]))
    lines = [found["dataset"], "", f"{'class':<{_NAME_WIDTH}}" + "".join(f"{split:>10}" for split in counts)]
    lines += [f"{name:<{_NAME_WIDTH}}" + "".join(f"{num:>10}" for num in nums) for name, nums in rows]
    if len(order) < len(names):
        lines.insert(3 + half, f"... {len(names) - len(order):,} other classes, by number of images")
    lines.append("")
    for left, (label, text, listed) in zip(range(len(facts) - 1, -1, -1), facts, strict=True):
        shown = printable("; ".join(listed[:_MAX_NAMES]))
        lines.append(f"{label:<17}{text}{': ' if shown else ''}{shown}")
        if len(lines[-1]) > _WIDTH and shown and len(lines) + left < _MAX_LINES:  # the names on a line of their own
            lines[-1:] = [f"{label:<17}{text}:", f"{'':<17}{shown}"]
    data, *rest = map(printable, lines)  # the folder is printed whole, for copying
    return [data, *(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..." for line in rest)]


def facts_of(found: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Return label, text and names of images for each thing that is known of a data set."""
    facts: list[tuple[str, str, list[str]]] = []
    if found["problem"]:
        facts.append(("fit would stop", " ".join(found["problem"].split()), []))
    sizes, modes = Counter[str](), Counter[str]()
    for (width, height, mode), num in found["headers"].items():
        sizes[f"{width} x {height}"] += num
        modes[mode] += num
    for label, kinds in (("sizes of files", sizes), ("modes of files", modes)):
        if kinds:
            some = ", ".join(f"{kind} ({num:,})" for kind, num in kinds.most_common(4))
            facts.append((label, f"{some}{f' and {len(kinds) - 4:,} others' if len(kinds) > 4 else ''}", []))
    is_unreadable = {path: reason.startswith("cannot be read") for path, reason in found["left_out"]}
    for label, wanted in (("unreadable", True), ("not used", False)):
        listed = [f"{path} ({why})" for path, why in found["left_out"] if is_unreadable[path] == wanted]
        facts += [(label, plural(len(listed), "file"), listed)] if listed or wanted else []
    constant = found["constant"]
    facts.append(("one colour", plural(len(constant), "image"), constant))
    for kind in found["duplicates"]:
        facts.append(("identical", kind["text"], [" = ".join(group) for group in kind["first"]]))
    if not found["duplicates"]:
        facts.append(("identical", "0 images", []))
    nums, num = found["num_near"], found["num_near"]["across splits"]
    words = f"{plural(nums['pairs'], 'pair')}, {nums['other label']:,} of two classes; "
    words += f"{plural(num, 'image')} of val and test {'has' if num == 1 else 'have'} one in an earlier split"
    facts.append(("near duplicates", words, [f"{one['name']} ~ {other['name']}" for one, other in found["near"]]))
    facts.append(("balance", found["imbalance"] or "the classes are about even", []))
    return facts


def render_inspection(found: Mapping[str, Any]) -> str:
    """Return the page: facts, classes with samples, near duplicates with their images; below 3 MB for 1,000 classes."""
    names, totals = found["class_names"], {split: of.sum() for split, of in found["counts"].items()}
    side = _TILE_PX if len(names) <= _MANY_CLASSES else _SMALL_PX
    return render(
        "inspection.html",
        dataset=found["dataset"],
        totals=totals,
        facts=facts_of(found),
        most=_MAX_LISTED,
        classes=[
            (name, [int(of[at]) for of in found["counts"].values()], _strip(samples, side))
            for at, (name, samples) in enumerate(zip(names, found["samples"], strict=True))
        ],
        pairs=[(pair, _strip([each["pixels"] for each in pair], _TILE_PX)) for pair in found["near"]],
    )


def _strip(images: Sequence[np.ndarray], side: int) -> Markup:
    """Return images side by side as the address of one JPEG; each file of its own would have a header of 600 bytes."""
    strip = Image.new("RGB", (max(1, len(images)) * side, side))
    for place, pixels in enumerate(images):
        rgb = Image.fromarray(pixels.repeat(3 // pixels.shape[-1], axis=-1))
        strip.paste(rgb.resize((side, side), Image.Resampling.BOX if rgb.width < side else None), (place * side, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "jpeg", quality=75)
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")  # needs no escaping
