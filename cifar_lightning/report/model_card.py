"""MODEL_CARD.md beside an exported file: what the network is, how good, and what to know before using it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lightning.errors import UserError
from cifar_lightning.files import write_text_durably
from cifar_lightning.report.findings import find, run_of
from cifar_lightning.report.page import facts_of, render, reproduction_of
from cifar_lightning.report.report import describe_run
from cifar_lightning.report.results import read_origin, read_results
from cifar_lightning.runs.folder import RunFolder

NAME = "MODEL_CARD.md"
_MARKER = "<!-- Made by cifar_lightning; the next export writes it anew. -->"
_OF_A_FILE = ("file", "format", "images", "outputs")


def write_model_card(run: RunFolder, card: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the card of a run's network, with the numbers of its report and all files of the same weights.

    Args:
        run: The run.
        card: What only the export knows: `file`, `format`, `checkpoint_sha256`, `class_names`, `image_size`, `epoch`,
            `tta`, `images` (what the graph takes; empty for weights alone) and `outputs`.
        folder: Where the exported file is.

    Returns:
        The card; None where somebody's own is there, which is left alone.
    """
    path = folder / NAME
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else _MARKER
    if _MARKER not in before:
        return None
    others = [file for file in _files_of(before, card["checkpoint_sha256"], folder) if file["file"] != card["file"]]
    files = [*others, {key: card[key] for key in _OF_A_FILE}]
    # For the next export; within a comment nothing may end it.
    known_files = json.dumps({"checkpoint_sha256": card["checkpoint_sha256"], "files": files}).replace(">", "\\u003e")
    try:
        findings = find(read_results(run))
    except UserError:  # no test yet: the card says so
        findings = None
    known = run_of(read_origin(run, []))
    about = describe_run(run, known)
    text = render(
        "model_card.md",
        marker=f"{_MARKER}\n<!-- {known_files} -->",
        files=files,
        card={**card, **about},
        f=findings,
        facts=facts_of(known),
        reproduce=reproduction_of(known),
    )
    write_text_durably(path, text)
    return path


def _files_of(text: str, checkpoint_sha256: str, folder: Path) -> list[dict[str, Any]]:
    """Return the files of the folder that an earlier card tells of, where they are of the same weights."""
    found = re.search(re.escape(_MARKER) + r"\n<!-- (.+) -->", text)
    try:
        known = json.loads(found[1]) if found else {}
        told = known["files"] if known.get("checkpoint_sha256") == checkpoint_sha256 else []
        return [{key: file[key] for key in _OF_A_FILE} for file in told if (folder / file["file"]).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody has edited it
        return []
