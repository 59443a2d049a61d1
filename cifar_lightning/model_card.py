"""MODEL_CARD.md beside an exported file: what the network is, how good, and what to know before using it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lightning.errors import UserError
from cifar_lightning.files import write_text_durably
from cifar_lightning.findings import find, run_of
from cifar_lightning.page import facts_of, render, reproduction_of
from cifar_lightning.report import describe_run
from cifar_lightning.results import read_origin, read_results
from cifar_lightning.runs import RunFolder

NAME = "MODEL_CARD.md"
_MARKER = "<!-- Made by cifar_lightning; the next export writes it anew. -->"


def write_model_card(run: RunFolder, card: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the card of a run's network, with the numbers of its report.

    Args:
        run: The run.
        card: What only the export knows: `file`, `format`, `class_names`, `image_size`, `epoch`, `views`, `images`
            (what the graph takes; empty for weights alone) and `outputs`.
        folder: Where the exported file is.

    Returns:
        The card; None where somebody's own is there, which is left alone.
    """
    path = folder / NAME
    if path.exists() and _MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    try:
        findings = find(read_results(run))
    except UserError:  # no test yet: the card says so
        findings = None
    known = run_of(read_origin(run, []))
    about = describe_run(run, known)
    text = render(
        "model_card.md",
        marker=_MARKER,
        card={**card, **about},
        f=findings,
        facts=facts_of(known),
        reproduce=reproduction_of(known),
    )
    write_text_durably(path, text)
    return path
