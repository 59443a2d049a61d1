"""A run's files -> its report: tables on the terminal, findings.json, figures and one page; imports no Lightning."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cifar_lightning.files import write_bytes_durably, write_json, write_text_durably
from cifar_lightning.formatting import run_name
from cifar_lightning.report.comparison import compare
from cifar_lightning.report.figures import confusion_figure, figure_to_png, themed
from cifar_lightning.report.findings import find
from cifar_lightning.report.page import command_of, render_page
from cifar_lightning.report.results import read_results
from cifar_lightning.report.terminal import print_findings
from cifar_lightning.runs.folder import RunFolder


def make_report(run: RunFolder, other: RunFolder | None = None, console: Console | None = None) -> None:
    """Find out what a run's test says, print it, and write findings.json, report.html and the confusion matrix.

    Args:
        run: The run, whose files are written.
        other: A run to compare with, tested on the same images; its files stay as they are.
        console: Where to print; the terminal without one.

    Raises:
        UserError: There are no test results, the two runs cannot be compared, or a file cannot be written.
    """
    results = read_results(run)
    findings = find(results)
    findings["run"] |= describe_run(run, findings["run"])
    images = results.images
    if other is not None:
        others = read_results(other)
        findings["comparison"] = compare(run.path, results, other.path, others)
        findings["problems"] += [f"{other.path}: {problem}" for problem in others.problems]
        images = others.images | images
    else:
        findings["comparison"] = None
    write_confusion(run, results.confusion, results.class_names)
    write_json(run.findings, findings)
    write_text_durably(run.report, render_page(findings, images))
    print_findings(findings, run.path, console)


def describe_run(run: RunFolder, known: dict[str, Any]) -> dict[str, str]:
    """Return how the page calls a run: `name`, `network`, `data` and `command`; what is not known is empty."""
    model, split = known["config"].get("model") or {}, known["split"]
    data = known["config"].get("data") or {}
    # "cifar10: 50,000 train + ..."; class folders are better known by their own name.
    kind = str(split.get("dataset") or data.get("dataset") or "").partition(":")[0]
    called = Path(str(data.get("root"))).name if kind == "folder" and data.get("root") else kind
    return {
        "name": run_name(run.path),
        "network": str(model.get("name") or ""),
        "data": called,
        "command": command_of(known["environment"]),
    }


def write_confusion(run: RunFolder, confusion: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Write confusion_matrix.csv and confusion_matrix.png; rows: true class, columns: predicted class."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["true \\ predicted", *class_names])
    writer.writerows([name, *row] for name, row in zip(class_names, confusion.tolist(), strict=True))
    write_text_durably(run.confusion_matrix_csv, table.getvalue())
    with themed():
        write_bytes_durably(run.confusion_matrix_png, figure_to_png(confusion_figure(confusion, class_names)))
