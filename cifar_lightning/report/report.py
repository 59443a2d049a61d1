"""Report of a run: tables on the terminal, findings.json, report.html and the confusion matrix."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cifar_lightning.files import csv_table, write_bytes_durably, write_json, write_text_durably
from cifar_lightning.formatting import csv_cell, run_name
from cifar_lightning.report.comparison import compare
from cifar_lightning.report.figures import confusion_figure, figure_to_png
from cifar_lightning.report.findings import find, learning_rates_of
from cifar_lightning.report.page import command_of, render_page
from cifar_lightning.report.prediction_tables import write_label_issues, write_prediction_tables
from cifar_lightning.report.results import read_results
from cifar_lightning.report.terminal import print_findings, print_summary
from cifar_lightning.runs.folder import RunFolder

_MAX_ISSUES = 500  # in findings.json and on the page; label_issues.csv has all


def make_report(
    run: RunFolder, other: RunFolder | None = None, console: Console | None = None, *, is_short: bool = False
) -> None:
    """Print the report of a run and write its files: findings.json, report.html, confusion matrix, CSVs of predictions.

    Args:
        run: Run to report on.
        other: Run to compare with, tested on the same images; its folder is only read.
        console: Console to print to. Default: the terminal.
        is_short: Print the summary alone, as at the end of training.

    Raises:
        UserError: There are no test results, the runs cannot be compared, or a file cannot be written.
    """
    results = read_results(run)
    findings = find(results)
    findings["run"] |= describe_run(run, findings["run"])
    images = results.images
    if other is not None:
        other_results = read_results(other)
        findings["comparison"] = compare(run.path, results, other.path, other_results)
        curves = {"epochs": other_results.epochs, "learning_rates": learning_rates_of(other_results)}
        findings["comparison"]["curves"] = curves
        findings["problems"] += [f"{other.path}: {problem}" for problem in other_results.problems]
        images = other_results.images | images
    else:
        findings["comparison"] = None
    all_issues, findings["label_issues"] = findings["label_issues"], findings["label_issues"][:_MAX_ISSUES]
    if run.is_writable:
        write_confusion(run, results.confusion, results.class_names)
        write_prediction_tables(run, results)
        write_label_issues(run, all_issues)
        write_json(run.findings, findings)
        explanations = results.explanations, results.explanations_reason
        write_text_durably(run.report, render_page(findings, images, *explanations, results.confusion))
    else:
        findings["problems"] = [*findings["problems"], "The folder cannot be written: its files stay as they are."]
    (print_summary if is_short else print_findings)(findings, run.path, console)


def describe_run(run: RunFolder, known: dict[str, Any]) -> dict[str, str]:
    """Return `name`, `model`, `data` and `command` of a run as the report shows them; unknown ones are empty."""
    model, split = known["config"].get("model") or {}, known["split"]
    data = known["config"].get("data") or {}
    # split.json has "cifar10: 50,000 train + ..."; class folders are shown by the name of their folder.
    kind = str(split.get("dataset") or data.get("dataset") or "").partition(": ")[0]
    name = Path(str(data.get("root"))).name if kind == "folder" and data.get("root") else kind
    return {
        "name": run_name(run.path),
        "model": str(model.get("name") or known["config"].get("model_class") or ""),
        "data": name,
        "command": command_of(known["environment"]),
    }


def write_confusion(run: RunFolder, confusion: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Write confusion_matrix.csv and confusion_matrix.png; rows: true class, columns: predicted class."""
    names = [csv_cell(name) for name in class_names]
    rows = ([name, *row.tolist()] for name, row in zip(names, confusion, strict=True))
    write_text_durably(run.confusion_matrix_csv, csv_table(["true \\ predicted", *names], rows))
    write_bytes_durably(run.confusion_matrix_png, figure_to_png(confusion_figure(confusion, class_names)))
