"""Report on the terminal: tables of the findings.

Output is ASCII except for class names and never relies on colour alone, so it reads the same in a log file.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from cifar_lightning.formatting import (
    clipped,
    count,
    decimal,
    first_of,
    percent,
    plural,
    points,
    points_span,
    printable,
    program,
    pvalue,
    shell_line,
    shortened_apart,
    span,
    unbroken,
)
from cifar_lightning.runs.folder import RunFolder

_MAX_CLASSES = 20  # above, only the classes with the lowest F1 and the most confused pairs are listed
_NUM_WORST = 10
_MAX_NAME = 28  # of 80 columns, next to the numbers of the per-class table
_MAX_TABLE = 80  # columns of that table at most
_MAX_ITEMS = 3  # of an insight; the page lists more
# The summary of fit and test:
_NUM_WEAKEST = 3
_MAX_INSIGHTS = 3
_SUMMARY_INSIGHTS = ("confidence", "validation_gap", "over_predicted", "groups")  # others repeat classes and pair
_RELIABLE = 0.99  # accuracy for which the confidence is named
_MAX_LINE = 150  # two lines of 80 columns, for at most seven findings


def print_findings(findings: Mapping[str, Any], run_path: Path | None = None, console: Console | None = None) -> None:
    """Print the findings: accuracy, classes, confusion matrix, most confused pairs, insights and the run's files.

    `findings` are those of `findings.find`, with that of `comparison.compare` as `comparison` if there is one. Without
    a run that holds them no file is named.
    """
    has_files = run_path is not None
    console = console or Console(highlight=False, force_jupyter=False)
    names = [printable(row["name"], console.encoding) for row in findings["classes"]]
    _print_summary(console, findings)
    calibration = findings["calibration"]
    if calibration and calibration["after"] is not None:
        _print_words(
            console,
            f"Temperature {decimal(calibration['temperature'], 3)}, fitted on "
            f"{plural(calibration['fitted_on'], 'validation image')}: ECE {percent(calibration['after']['ece'], 2)}, "
            f"loss {decimal(calibration['after']['loss'], 4)} with --calibrated of predict-images and export.",
        )
    _print_tested(console, findings["training"], run_path)
    _print_classes(console, findings["classes"], names, has_files)
    _print_confusions(console, findings["confusion_matrix"], names, has_files)
    _print_pairs(console, findings)
    _print_insights(console, findings["insights"], has_files)
    to_look_at = _to_look_at(findings, _NUM_WORST, has_files)
    if to_look_at:
        _print_heading(console, "Images to look at")
    for text in to_look_at:
        _print_words(console, f"{text}.", bullet="* ")
    if findings["coverage"]:
        _print_heading(console, "Confidence needed for a given accuracy")
    for row in findings["coverage"]:
        _print_words(console, f"{_coverage_text(row)}.", bullet="* ")
    if findings.get("comparison"):
        _print_comparison(console, findings["comparison"])
    if findings["problems"]:
        _print_heading(console, "Problems")
        for problem in findings["problems"]:
            _print_words(console, problem)
    if run_path is not None:
        _print_files(console, RunFolder(run_path))


def print_summary(findings: Mapping[str, Any], run_path: Path, console: Console | None = None) -> None:
    """Print what `fit` and `test` end with, at most 30 lines of 80 columns; `print_findings` prints the rest.

    That is the accuracy, the weakest classes, the most confused pair, at most three insights, labels to check, the
    confidence above which predictions can be relied on, the report and the next command.
    """
    console = console or Console(highlight=False, force_jupyter=False)
    _print_summary(console, findings)
    _print_tested(console, findings["training"], run_path)
    weakest = [row for row in findings["classes"] if row["support"]]
    weakest = sorted(weakest, key=lambda row: row["recall"])[:_NUM_WEAKEST]
    _print_heading(console, "Classes with the lowest recall" if len(weakest) < len(findings["classes"]) else "Classes")
    _print_class_table(console, weakest, [printable(row["name"], console.encoding) for row in weakest])
    problems = findings["problems"]
    lines = [_pair_text(pair) for pair in findings["confused_pairs"][:1]]
    lines += _insight_lines(findings["insights"])
    lines += _to_look_at(findings, 1, has_files=True)
    if problems:
        lines.append(f"{plural(len(problems), 'problem')} with files of the run, first: {problems[0]}")
    else:
        lines += [_coverage_text(row) for row in findings["coverage"] if row["target"] == _RELIABLE]
    if lines:
        _print_heading(console, "Findings")
    for line in lines:
        _print_words(console, clipped(line, _MAX_LINE), bullet="* ")
    console.print()
    _print_whole(console, f"Report  {RunFolder(run_path).report.absolute().as_uri()}")
    _print_whole(console, f"Next    {program()} analyze {shell_line(run_path)}")


def _insight_lines(insights: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [insight for insight in insights if insight["is_found"] and insight["kind"] in _SUMMARY_INSIGHTS]
    lines = []
    for insight in sorted(found, key=lambda row: _SUMMARY_INSIGHTS.index(row["kind"]))[:_MAX_INSIGHTS]:
        text = insight["title"] if insight["kind"] == "confidence" else insight["items"][0]["text"]
        more = len(insight["items"]) - 1
        lines.append(text.rstrip(".") + (f" ({count(more)} more)" if more and insight["kind"] != "groups" else ""))
    return lines


def _to_look_at(findings: Mapping[str, Any], most: int, has_files: bool) -> list[str]:
    """Return the first mistakes and labels to check by the names of their images, each kind with its number."""
    texts = []
    mistakes = findings["mistakes"]
    if mistakes and mistakes["count"]:
        shown = [
            f"{item['name']} ({item['true']}, predicted as {item['predicted']} with {percent(item['prob'])})"
            for item in mistakes["images"][:most]
        ]
        of_val = " with those of validation" if "val" in findings["label_check"]["checked"] else ""
        where = f" (in mistakes.csv{of_val})" if has_files else ""
        texts.append(f"{plural(mistakes['count'], 'test mistake')}{where}, highest loss: {'; '.join(shown)}")
    number = findings["label_check"]["num_issues"]
    if number and findings["label_check"]["is_reliable"]:
        shown = [
            f"{issue['name']} (labelled {issue['label']}, predicted as {issue['suggested']})"
            for issue in findings["label_issues"][:most]
        ]
        where = " in label_issues.csv" if has_files else ""
        doubt = " (more than are usually wrong)" if findings["label_check"]["is_many"] else ""
        texts.append(f"{plural(number, 'label')} to check{where}{doubt}, likeliest: {'; '.join(shown)}")
    return texts


def _coverage_text(row: Mapping[str, Any]) -> str:
    if row["threshold"] is None:
        return f"No confidence is high enough for {100 * row['target']:g} % correct predictions"
    chosen = f"confidence of at least {percent(row['threshold'], tolerance=0)}"
    if not row["num_images"]:
        return f"For {100 * row['target']:g} % correct predictions: no test image has a {chosen}"
    interval = f"95 % interval {span(row['accuracy_interval_95'])}"
    if row["accuracy_interval_95"][1] < row["target"]:
        return (
            f"{100 * row['target']:g} % correct predictions not reached: {percent(row['accuracy'])} of "
            f"{plural(row['num_images'], 'test image')} with a {chosen} ({interval})"
        )
    correct = f"; {percent(row['accuracy'])} of them correct, {interval}"
    if row.get("chosen_on") == "test":  # so the accuracy is too good
        correct += "; chosen on these images"
    return (
        f"For {100 * row['target']:g} % correct predictions: {chosen} "
        f"({plural(row['num_images'], 'test image')}, {percent(row['coverage'])}{correct})"
    )


def print_validation(metrics: Mapping[str, float]) -> None:
    """Print the metrics of `validate`: val/acc, val/loss, val/f1, val/ece, and further ones by their names.

    A subclass may log only some of them.
    """
    console = Console(highlight=False, force_jupyter=False)
    if "val/acc" in metrics:
        line = Text("Validation accuracy ")
        line.append(percent(metrics["val/acc"], 2), style="bold")
        console.print(line)
    rest = {"loss": "val/loss", "macro F1": "val/f1", "calibration error": "val/ece"}
    hidden = (*rest.values(), "val/acc", "val/acc_no_tta")
    rest |= {name.removeprefix("val/"): name for name in metrics if name not in hidden}
    texts = [f"{words} {decimal(metrics[name], 4)}" for words, name in rest.items() if name in metrics]
    if texts:
        console.print(", ".join(texts))


def _print_summary(console: Console, findings: Mapping[str, Any]) -> None:
    summary, calibration = findings["summary"], findings["calibration"]
    line = Text("Test accuracy ")
    line.append(percent(summary["accuracy"], 2), style="bold")
    num_images = plural(summary["num_images"], "image")
    line.append(f"  (95 % interval {span(summary['accuracy_interval_95'], 2)}; {num_images})")
    console.print(line)
    largest = _cut(printable(findings["classes"][summary["majority_class"]]["name"], console.encoding), _MAX_NAME)
    baseline = f"Chance {percent(summary['chance'], 2)}; always {largest} {percent(summary['majority'], 2)}"
    top5 = f"; top 5 {percent(summary['accuracy_top5'], 2)}" if "accuracy_top5" in summary else ""
    _print_words(console, baseline + top5)
    if summary["accuracy_no_tta"] is not None:
        no_tta = percent(summary["accuracy_no_tta"], 2)
        console.print(f"Accuracy without test-time augmentation (--model.tta): {no_tta}")
    macro_f1 = f"macro F1 {percent(summary['macro_f1'], 2)}"
    if calibration is None:
        console.print(macro_f1)
        return
    ece = percent(calibration["before"]["ece"], 2)
    console.print(f"Loss {decimal(summary['loss'], 4)}, calibration error (ECE) {ece}, {macro_f1}")


def _print_tested(console: Console, training: Mapping[str, Any], run_path: Path | None) -> None:
    is_best = run_path is not None and RunFolder(run_path).best_checkpoint.exists()  # otherwise the last was tested
    if is_best and training["tested_epoch"] is not None and training["is_whole"]:
        best = "best " if training["tested_epoch"] == training["best_epoch"] else ""
        val_acc = percent(training["tested_val_acc"], 2)
        console.print(f"Tested weights: epoch {training['tested_epoch']}, {best}validation accuracy ({val_acc})")


def _print_classes(
    console: Console, classes: Sequence[Mapping[str, Any]], names: Sequence[str], has_files: bool
) -> None:
    shown = list(range(len(names)))
    if len(names) > _MAX_CLASSES:
        f1 = np.array([row["f1"] for row in classes])  # NaN, a class without images and predictions, comes last
        shown = np.argsort(f1, kind="stable")[:_NUM_WORST].tolist()
    cut = shortened_apart(names, lambda name: _cut(name, _MAX_NAME))
    title = "Classes" if len(shown) == len(names) else f"The {_NUM_WORST} classes with the lowest F1"
    _print_heading(console, title)
    _print_class_table(console, [classes[index] for index in shown], [cut[index] for index in shown])
    if len(shown) < len(names) and has_files:
        console.print(f"All {len(names)} classes are in report.html and findings.json.")
    never = [name for name, row in zip(names, classes, strict=True) if row["support"] and not row["predicted"]]
    if never:
        console.print(Text(f"Never predicted (precision undefined): {first_of(never, 5)}"))


def _print_class_table(console: Console, classes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("class", no_wrap=True)
    for column in ("images", "precision", "recall", "F1", "confidence"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, name in zip(classes, names, strict=True):
        percents = (percent(row[key], 1) for key in ("precision", "recall", "f1", "mean_confidence"))
        table.add_row(Text(name), count(row["support"]), *percents)
    options = console.options.update(width=max(console.width, _MAX_TABLE))  # in fewer columns rich cuts numbers
    console.print(Segments(console.render(table, options)), soft_wrap=True, end="")


def _print_confusions(
    console: Console, rows: Sequence[Sequence[int]] | None, names: Sequence[str], has_files: bool
) -> None:
    _print_heading(console, "Confusion matrix (rows: true class, columns: predicted)")
    is_wide = rows is None or len(names) > _MAX_CLASSES
    lines = None if is_wide else _matrix_lines(np.array(rows, dtype=np.int64), names, console.width)
    if lines is None:
        console.print(f"Too wide to print with {len(names)} classes{': see report.html' if has_files else ''}.")
        return
    for line in lines:
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _matrix_lines(cm: Int[np.ndarray, "classes classes"], names: Sequence[str], width: int) -> list[Text] | None:
    """Return the lines of the matrix, diagonal in brackets and zeros as dots; None if wider than `width`."""
    cell = max(len(str(cm.max(initial=0))), len(str(len(names)))) + 2  # room for the brackets
    longest = max(map(cell_len, names))
    roomy = max(cell, min((width - longest - 1) // len(names), longest + 2))
    headings = [_cut(name, roomy - 1) for name in names]
    if len(set(headings)) == len(names) and (roomy >= 6 or headings == list(names)):
        cell = roomy
    else:  # the shortened names are ambiguous: numbers instead
        names = [f"{index} {name}" for index, name in enumerate(names)]
        headings = [str(index) for index in range(len(names))]
        longest = max(map(cell_len, names))
    name_width = min(longest, width - cell * len(names) - 1)
    if name_width < min(longest, 12):
        return None
    heading = "".join(" " * (cell - 1 - cell_len(heading)) + heading + " " for heading in headings)
    lines = [Text(" " * (name_width + 1) + heading.rstrip(), style="bold")]
    for row, name in enumerate(names):
        line = Text(set_cell_size(_cut(name, name_width), name_width + 1))
        for column, number in enumerate(cm[row].tolist()):
            if row == column:
                line.append(f"[{number}]".rjust(cell), style="bold green")
            else:
                line.append(f"{number or '.'} ".rjust(cell), style="" if number else "dim")
        line.rstrip()
        lines.append(line)
    return lines


def _print_pairs(console: Console, findings: Mapping[str, Any]) -> None:
    _print_heading(console, "Most confused pairs")
    if not findings["confused_pairs"]:
        console.print("No image is misclassified.")
    for pair in findings["confused_pairs"]:
        _print_words(console, _pair_text(pair))


def _pair_text(pair: Mapping[str, Any]) -> str:
    there = f"{count(pair['count'])} ({percent(pair['share'], 1)})"
    back = f"{count(pair['reverse_count'])} ({percent(pair['reverse_share'], 1)})"
    return f"{pair['true']} predicted as {pair['predicted']}: {there}; reverse: {back}"


def _print_insights(console: Console, insights: Sequence[Mapping[str, Any]], has_files: bool) -> None:
    tests = "; report.html names the tests" if has_files else ""
    _print_heading(console, f"Insights (p-values with Holm's correction{tests})")
    for insight in insights:
        _print_words(console, f"{insight['title']}.", bullet="* ")
        for item in insight["items"][:_MAX_ITEMS]:
            _print_words(console, f"{item['text']} {pvalue(item['p'])}", indent=2)
        if len(insight["items"]) > _MAX_ITEMS:
            where = " in findings.json" if has_files else ""
            console.print(f"  {len(insight['items']) - _MAX_ITEMS} more{where}.")


def _print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    first, second = comparison["runs"]
    _print_heading(console, "Compared on the same test images")
    for which, run in (("this run ", first), ("the other", second)):
        interval = f"95 % interval {span(run['accuracy_interval_95'], 2)}"
        _print_whole(
            console, f"{which} {percent(run['accuracy'], 2)}  ({interval}, ECE {percent(run['ece'], 2)})  {run['path']}"
        )
    _print_words(
        console,
        f"Difference {points(comparison['difference'], 2)} points (95 % interval "
        f"{points_span(comparison['difference_interval_95'], 2)}); McNemar's exact test: {pvalue(comparison['p'])}.",
    )
    _print_words(
        console,
        f"Correct in both {count(comparison['both_right'])}, only in this run {count(comparison['only_first'])}, only "
        f"in the other {count(comparison['only_second'])}, in neither {count(comparison['both_wrong'])}.",
    )
    if comparison["unchecked"]:
        _print_words(console, comparison["unchecked"])
    significant = [row for row in comparison["classes"] if row["p"] < 0.05]
    if not significant:
        console.print("No difference beyond chance was found in any single class.")
    for row in significant:
        interval = points_span(row["difference_interval_95"])
        text = f"{row['name']}: {points(row['difference'])} points ({interval}), {pvalue(row['p'])}"
        _print_words(console, text, indent=2)


def _print_files(console: Console, run: RunFolder) -> None:
    _print_heading(console, "Run folder")
    _print_whole(console, str(run.path))
    for name, words in run.listed_files:
        console.print(f"  {name:<22} {words}")
    _print_heading(console, "Next steps")
    _print_whole(console, f"  tensorboard --logdir {shell_line(_folder_of_runs(run.path))}")
    path = shell_line(run.path)
    of_checkpoint = (f"predict-images {path} MY_IMAGES", f"export {path} --format onnx") if run.has_checkpoint else ()
    for command in (f"analyze {path} --compare OTHER_RUN", *of_checkpoint):
        _print_whole(console, f"  {program()} {command}")


def _folder_of_runs(path: Path) -> Path:
    """Return the log folder for TensorBoard: that of all runs if there is one, so that runs are compared.

    TensorBoard reads every folder below it, so it never lies above the runs: runs/CONFIG/N, or a chosen N.
    """
    if not path.name.isdecimal():
        return path
    return path.parent.parent if path.parent.parent.name == "runs" else path.parent


def _print_heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_words(console: Console, text: str, indent: int = 0, bullet: str = "") -> None:
    """Print text wrapped at words, never between a number and its unit."""
    joined = unbroken(printable(text, console.encoding))
    margin = " " * (indent + len(bullet))
    first = " " * indent + bullet
    for line in textwrap.wrap(joined, console.width, initial_indent=first, subsequent_indent=margin):
        console.print(Text(line.replace("\u00a0", " ")), no_wrap=True, overflow="ignore", crop=False)


def _print_whole(console: Console, text: str) -> None:
    """Print a path or command on one line of any length, so that it can be copied."""
    console.print(Text(printable(text, console.encoding)), soft_wrap=True)


def _cut(text: str, width: int) -> str:
    """Shorten to `width` terminal cells; a Chinese character takes two."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 2).rstrip() + ".." if width > 6 else set_cell_size(text, width).rstrip()
