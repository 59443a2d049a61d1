"""MODEL_CARD.md next to an exported file: the model, its test results, its limitations and how to use it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cifar_lightning.errors import UserError
from cifar_lightning.files import read_bytes, write_text_durably
from cifar_lightning.report.findings import find
from cifar_lightning.report.page import facts_of, render, reproduction_of
from cifar_lightning.report.report import describe_run
from cifar_lightning.report.results import read_origin, read_results
from cifar_lightning.runs.folder import RunFolder

NAME = "MODEL_CARD.md"
_MARKER = "<!-- Made by cifar_lightning; the next export overwrites it. -->"
_RESIZE = {
    "crop": "shorter side resized to that size and centre-cropped",
    "pad": "longer side resized to that size and centred on black",
    "squash": "both sides resized to that size",
}
_OF_A_FILE = ("file", "format", "images", "outputs")


def write_model_card(run: RunFolder, card: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the model card of a run, with the numbers of its report and all exported files of the same weights.

    `card` has the facts of the export into `folder`: `file`, `format`, `checkpoint_sha256`, `class_names`,
    `image_size`, `in_channels`, `resize`, `epoch`, `tta`, `images` (input of the graph; empty for weights) and
    `outputs`. Return the card's path, or None if a file of that name is not ours, which is then left alone.
    """
    path = folder / NAME
    try:
        before = read_bytes(path, 1 << 20).decode("utf-8", "replace")
    except FileNotFoundError:
        before = _MARKER
    except OSError:  # a link, a FIFO, a folder
        return None
    if _MARKER not in before:
        return None
    others = [file for file in _files_of(before, card["checkpoint_sha256"], folder) if file["file"] != card["file"]]
    files = [*others, {key: card[key] for key in _OF_A_FILE}]
    # Read by the next export; inside an HTML comment ">" is escaped so that no file name ends it.
    known_files = json.dumps({"checkpoint_sha256": card["checkpoint_sha256"], "files": files}).replace(">", "\\u003e")
    try:
        findings = find(read_results(run))
    except UserError:  # no test results yet: the card says so
        findings = None
    known = vars(read_origin(run, []))
    shared = [kind["text"] for kind in known["split"].get("duplicates", []) if kind["kind"] == "across splits"]
    text = render(
        "model_card.md",
        marker=Markup(f"{_MARKER}\n<!-- {known_files} -->"),
        files=files,
        resize_text=_RESIZE[card.get("resize", "crop")],
        card={**card, **describe_run(run, known)},
        f=findings,
        facts=facts_of(known),
        shared=shared,
        is_test_clean=not any(" test image" in text for text in shared),
        reproduce=Markup(reproduction_of(known)),  # in a block of code
    )
    write_text_durably(path, text)
    return path


def _files_of(text: str, checkpoint_sha256: str, folder: Path) -> list[dict[str, Any]]:
    """Return the existing files that an earlier card lists, if they hold the same weights."""
    found = re.search(re.escape(_MARKER) + r"\n<!-- (.+) -->", text)
    try:
        known = json.loads(found[1]) if found else {}
        files = known["files"] if known.get("checkpoint_sha256") == checkpoint_sha256 else []
        return [{key: file[key] for key in _OF_A_FILE} for file in files if (folder / file["file"]).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # edited by hand
        return []
