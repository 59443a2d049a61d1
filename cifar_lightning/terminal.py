"""Numbers -> tables on the terminal; imports no Lightning.

Everything is plain ASCII but the class names, and nothing is said by colour alone: it reads the same in a log file.
"""

import shlex
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cifar_lightning.analysis import confusion_matrix, per_class
from cifar_lightning.errors import UserError
from cifar_lightning.figures import printable
from cifar_lightning.files import read_json
from cifar_lightning.runs import RunFolder

_MAX_CLASSES = 20  # more than that: the worst classes and the most confused pairs stand for all
_NUM_WORST = 10
_MAX_NAME = 28  # of 80 columns, beside the numbers of the per-class table


def print_test_report(
    metrics: dict[str, Any],
    cm: Int[np.ndarray, "classes classes"],
    class_names: Sequence[str],
    run_path: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print what a test found: accuracy, per-class table, confusion matrix, most confused pairs, the run's files.

    Args:
        metrics: What `analysis.test_metrics` returned, or `test_metrics.json` read back.
        cm: Confusion matrix; rows: true class.
        class_names: In class order.
        run_path: The run folder; the files that are in it are named. None where there is none.
        console: Where to print; the terminal without one.
    """
    console = console or Console(highlight=False)
    names = [printable(name, console.encoding) for name in class_names]
    _print_summary(console, metrics)
    _print_classes(console, cm, names)
    _print_confusions(console, cm, names)
    shown = dict(zip(class_names, names, strict=True))
    _print_pairs(console, metrics, shown)
    if run_path is not None:
        _print_files(console, RunFolder(run_path))


def print_run_report(run: RunFolder, console: Console | None = None) -> None:
    """Print the report of a run from its files alone.

    Raises:
        UserError: It has no test results, or they are damaged.
    """
    run.require(run.test_metrics, run.predictions)
    metrics = read_json(run.test_metrics)
    try:
        with np.load(run.predictions) as answers:
            names = tuple(str(name) for name in answers["class_names"])
            cm = confusion_matrix(answers["targets"], answers["logits"].argmax(1), len(names))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{run.predictions}: damaged ({error}).\nMake it again with: python train.py test {run.path}"
        ) from error
    print_test_report(metrics, cm, names, run.path, console)


def print_validation(figures: Mapping[str, float], console: Console | None = None) -> None:
    """Print the figures of `validate`.

    Args:
        figures: val/acc, val/loss, val/f1 and val/ece.
        console: Where to print; the terminal without one.
    """
    console = console or Console(highlight=False)
    line = Text("Validation accuracy ")
    line.append(_percent(figures["val/acc"], 2), style="bold")
    console.print(line)
    rest = {"loss": "val/loss", "macro F1": "val/f1", "calibration error": "val/ece"}
    console.print(", ".join(f"{words} {_decimal(figures[name])}" for words, name in rest.items()))


def _print_summary(console: Console, metrics: dict[str, Any]) -> None:
    low, high = metrics["accuracy_interval_95"]
    line = Text("Test accuracy ")
    line.append(_percent(metrics["accuracy"], 2), style="bold")
    line.append(f"  (95 % interval {100 * low:.2f} to {_percent(high, 2)}; {metrics['num_pictures']:,} pictures)")
    console.print(line)
    console.print(
        f"Loss {_decimal(metrics['loss'])}, calibration error (ECE) {_percent(metrics['ece'], 2)}, "
        f"macro F1 {_percent(metrics['macro_f1'], 2)}"
    )


def _print_classes(console: Console, cm: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> None:
    rates = per_class(cm)
    shown = range(len(names))
    if len(names) > _MAX_CLASSES:
        shown = np.argsort(rates.f1, kind="stable")[:_NUM_WORST].tolist()  # NaN, a class that is nowhere, comes last
    title = "Classes" if len(shown) == len(names) else f"The {_NUM_WORST} classes with the lowest F1"
    _print_heading(console, title)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("class", no_wrap=True)
    for column in ("pictures", "precision", "recall", "F1"):
        table.add_column(column, justify="right", no_wrap=True)
    for index in shown:
        percents = (_percent(rate[index], 1) for rate in (rates.precision, rates.recall, rates.f1))
        table.add_row(Text(_cut(names[index], _MAX_NAME)), f"{rates.support[index]:,}", *percents)
    console.print(table)
    if len(shown) < len(names):
        console.print(f"All {len(names)} classes are in test_metrics.json.")
    never = [names[index] for index in np.flatnonzero((rates.predicted == 0) & (rates.support > 0)).tolist()]
    if never:
        more = f" and {len(never) - 5} more" if len(never) > 5 else ""
        console.print(Text(f"Never predicted (so without a precision): {', '.join(never[:5])}{more}"))


def _print_confusions(console: Console, cm: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> None:
    _print_heading(console, "Confusion matrix (rows: true class, columns: predicted)")
    lines = _matrix_lines(cm, names, console.width) if len(names) <= _MAX_CLASSES else None
    if lines is None:
        console.print(f"Too wide to print with {len(names)} classes: see confusion_matrix.png and .csv.")
        return
    for line in lines:
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _matrix_lines(cm: Int[np.ndarray, "classes classes"], names: Sequence[str], width: int) -> list[Text] | None:
    """Return the matrix, its diagonal in brackets and zeros as dots; None where it is wider than `width`."""
    cell = max(len(str(cm.max(initial=0))), len(str(len(names)))) + 2  # room for the brackets
    longest = max(map(cell_len, names))
    roomy = max(cell, min((width - longest - 1) // len(names), longest + 2))
    headings = [_cut(name, roomy - 1) for name in names]
    if len(set(headings)) == len(names) and (roomy >= 6 or headings == list(names)):
        cell = roomy
    else:  # too short to tell names apart: numbers instead
        names = [f"{index} {name}" for index, name in enumerate(names)]
        headings = [str(index) for index in range(len(names))]
        longest = max(map(cell_len, names))
    name_width = min(longest, width - cell * len(names) - 1)
    if name_width < min(longest, 12):
        return None
    heading = "".join(_align_right(heading, cell - 1) + " " for heading in headings)
    lines = [Text(" " * (name_width + 1) + heading.rstrip(), style="bold")]
    for row, name in enumerate(names):
        line = Text(set_cell_size(_cut(name, name_width), name_width + 1))
        for column, count in enumerate(cm[row].tolist()):
            if row == column:
                line.append(f"[{count}]".rjust(cell), style="bold green")
            else:
                line.append(f"{count or '.'} ".rjust(cell), style="" if count else "dim")
        line.rstrip()
        lines.append(line)
    return lines


def _print_pairs(console: Console, metrics: dict[str, Any], shown: dict[str, str]) -> None:
    _print_heading(console, "Most confused")
    if not metrics["most_confused"]:
        console.print("No picture was taken for another class.")
    for pair in metrics["most_confused"]:
        support = metrics["per_class"][pair["true"]]["support"]
        what = f"{shown[pair['true']]} taken for {shown[pair['predicted']]}"
        console.print(Text(f"{what}: {pair['count']:,} of {support:,} ({_percent(pair['share'], 1)})"))


def _print_files(console: Console, run: RunFolder) -> None:
    _print_heading(console, "Run folder")
    _print_whole(console, str(run.path))
    contents = (
        (run.best_checkpoint, "the weights with the best validation accuracy"),
        (run.last_checkpoint, "the state at the end of training"),
        (run.config, "every value of the run"),
        (run.split, "which pictures were for training, which for validation"),
        (run.environment, "versions, device, precision, commit"),
        (run.metrics_csv, "losses, accuracies, learning rate of each epoch"),
        (run.timing_csv, "seconds, pictures per second, memory of each epoch"),
        (run.test_metrics, "the numbers above"),
        (run.confusion_matrix_png, "the confusion matrix; also as .csv and .pt"),
        (run.predictions, "logits and true class of every test picture"),
        (run.predictions_val, "the same of the validation pictures"),
        (run.gallery, "some test pictures"),
        (run.report, "all of this as one page"),
    )
    for file, words in contents:
        if file.exists():
            console.print(f"  {file.relative_to(run.path).as_posix():<22} {words}")
    if any(run.path.glob("events.out.tfevents.*")):
        console.print(f"  {'events.out.tfevents.*':<22} what TensorBoard shows")
    _print_heading(console, "What next")
    numbered = run.path.name.isdecimal()  # runs/<recipe>/<number>: TensorBoard shows all runs side by side
    folder = run.path.parent.parent if numbered else run.path
    _print_whole(console, f"  tensorboard --logdir {shlex.quote(str(folder))}")
    path = shlex.quote(str(run.path))
    for command in (f"analyze {path}", f"predict-images {path} MY_PICTURES", f"export {path} --format onnx"):
        _print_whole(console, f"  python train.py {command}")


def _print_heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_whole(console: Console, text: str) -> None:
    """Print a path or command on one line however long, so that it can be copied."""
    console.print(Text(printable(text, console.encoding)), soft_wrap=True)


def _cut(text: str, width: int) -> str:
    """Shorten to `width` terminal cells, of which a Chinese character takes two."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 2).rstrip() + ".." if width > 6 else set_cell_size(text, width).rstrip()


def _align_right(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text


def _percent(share: float | None, decimals: int) -> str:
    return "-" if share is None or np.isnan(share) else f"{100 * share:.{decimals}f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
