import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cifar_lightning.report.findings import find
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.report.terminal import print_findings, print_summary, print_validation
from cifar_lightning.runs.folder import RunFolder

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def matrix(num_classes: int, support: int = 1000) -> np.ndarray:
    """A matrix with 90 % on the diagonal and class 0 predicted as class 1 most often."""
    cm = np.eye(num_classes, dtype=np.int64) * (support * 9 // 10)
    for row in range(num_classes):
        cm[row, (row + 1) % num_classes] += support - cm[row].sum()
    cm[0, 0] -= 7
    cm[0, 1 % num_classes] += 7
    return cm


def findings_of(cm: np.ndarray, names: list[str]) -> dict:
    """Return the findings of predictions with this confusion matrix, as read from findings.json."""
    targets, preds = (np.repeat(indices.ravel(), cm.ravel()) for indices in np.indices(cm.shape))
    logits = np.eye(len(names), dtype=np.float32)[preds] * 3
    predictions = Predictions(logits, targets, np.arange(len(targets)), tuple(names))
    return json.loads(json.dumps(find(Results(predictions.class_names, predictions.confusion, test=predictions))))


def report(
    cm: np.ndarray,
    names: list[str],
    run: Path | None = Path("runs/smallnet/3"),
    width: int = 80,
    encoding: str = "utf-8",
) -> str:
    """Prints to something that is no terminal and returns what a log file would hold."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    print_findings(findings_of(cm, names), run, Console(file=stream, width=width, highlight=False))
    stream.seek(0)
    return stream.read()


def section(text: str, heading: str) -> list[str]:
    """Returns the lines between a heading and the next empty line."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(heading)) + 1
    end = next((index for index in range(start, len(lines)) if not lines[index]), len(lines))
    return lines[start:end]


def test_it_is_said_which_epoch_was_tested(tmp_path):
    findings = findings_of(matrix(10), CIFAR10)
    best = RunFolder(tmp_path).best_checkpoint
    best.parent.mkdir()
    best.touch()

    def is_said(**changed):
        known = {"best_epoch": 3, "tested_epoch": 3, "tested_val_acc": 0.912, "is_whole": True}
        findings["training"] |= known | changed
        file = io.StringIO()
        print_findings(findings, tmp_path, Console(file=file, width=80))
        return "Tested weights: epoch 3, best validation accuracy (91.20 %)" in file.getvalue()

    assert is_said()
    assert not is_said(tested_epoch=4)
    assert not is_said(tested_epoch=None)
    assert not is_said(is_whole=False)
    best.unlink()  # the last weights were tested
    assert not is_said()


def test_the_summary_says_accuracy_interval_loss_and_calibration():
    text = report(matrix(10), CIFAR10)
    assert text.startswith("Test accuracy 89.93 %  (95 % interval 89.32 to 90.50 %; 10,000 images)\n")
    assert re.search(r"^Loss \d\.\d{4}, calibration error \(ECE\) \d+\.\d\d %, macro F1 89\.93 %$", text, re.MULTILINE)


def test_the_printed_matrix_is_the_matrix():
    cm = matrix(10)
    header, *rows = section(report(cm, CIFAR10), "Confusion matrix")
    assert header.split() == ["airpl", "autom", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert [row.split()[0] for row in rows] == CIFAR10
    cells = [[int(cell.strip("[]").replace(".", "0")) for cell in row.split()[1:]] for row in rows]
    assert cells == cm.tolist()
    for index, row in enumerate(rows):
        assert row.split()[1 + index].startswith("[")  # the diagonal is distinguishable without colours
        assert row.count("[") == 1


def test_the_columns_of_the_matrix_are_aligned():
    _, *rows = section(report(matrix(10), CIFAR10), "Confusion matrix")
    ends = [[match.end() - match.group().endswith("]") for match in re.finditer(r"\S+", row)][1:] for row in rows]
    assert all(row == ends[0] for row in ends)


def test_per_class_rates_are_scikit_learns():
    from sklearn.metrics import precision_recall_fscore_support

    cm = matrix(3, 50)
    targets, preds = (np.repeat(indices.ravel(), cm.ravel()) for indices in np.indices(cm.shape))
    precision, recall, f1, support = precision_recall_fscore_support(targets, preds)
    _, *rows = section(report(cm, ["ant", "bee", "fly"]), "Classes")
    expected = [
        f"{name} {support[i]} {100 * precision[i]:.1f} % {100 * recall[i]:.1f} % {100 * f1[i]:.1f} % 90.9 %".split()
        for i, name in enumerate(["ant", "bee", "fly"])
    ]
    assert [row.split() for row in rows] == expected


def test_the_most_confused_pair_is_said_in_words_first():
    lines = section(report(matrix(10), CIFAR10), "Most confused")
    assert lines[0] == "airplane predicted as automobile: 107 (10.7 %); reverse: 0 (0.0 %)"
    assert len(lines) == 10


def test_a_model_without_mistakes_is_reported():
    assert section(report(np.eye(3, dtype=np.int64), ["a", "b", "c"]), "Most confused") == [
        "No image is misclassified."
    ]


@pytest.mark.parametrize(
    ("num_classes", "name"),
    [(1, "x"), (3, "class_with_a_very_very_long_name_{}"), (10, "twenty_characters_{:02}"), (20, "c{}"), (100, "x{}")],
)
def test_no_line_is_wider_than_80_columns(num_classes, name):
    text = report(matrix(num_classes), [name.format(index) for index in range(num_classes)])
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [1, 20, 60])
def test_a_terminal_however_narrow_shows_every_number(width, tmp_path):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_summary(findings_of(matrix(10), CIFAR10), tmp_path, console)
    row = "airplane 1,000 89.9 % 89.3 % 89.6 % 69.1 %"
    for text in (report(matrix(10), CIFAR10, width=width), console.file.getvalue()):
        [shown] = [line for line in text.splitlines() if line.startswith("airplane ") and "1,000" in line]
        assert shown.split() == row.split()


def test_names_that_cannot_head_a_column_are_replaced_by_numbers():
    header, first, *_ = section(report(matrix(10), [f"long_class_name_{i}" for i in range(10)]), "Confusion matrix")
    assert header.split() == [str(index) for index in range(10)]
    assert first.startswith("0 long_class_name_0 [893]")


def test_a_matrix_that_does_not_fit_names_the_file_that_holds_it():
    for cm, width in ((matrix(100, 100), 80), (matrix(20), 80), (matrix(10), 60)):
        text = report(cm, [f"some_class_{index}" for index in range(len(cm))], width=width)
        (line, *_) = section(text, "Confusion matrix")
        assert line.startswith(f"Too wide to print with {len(cm)} classes")
        assert "see report.html" in text


def test_of_a_hundred_classes_the_ten_worst_are_listed():
    cm = matrix(100, 100)
    cm[42] = 0
    cm[42, 43] = 100
    text = report(cm, [f"some_class_{index}" for index in range(100)])
    lines = section(text, "The 10 classes with the lowest F1")
    assert lines[1].split() == ["some_class_42", "100", *["0.0", "%"] * 3, "16.9", "%"]
    assert len(lines) == 12
    assert lines[-1] == "All 100 classes are in report.html and findings.json."


def test_a_class_never_predicted_is_shown_as_such():
    text = report(np.array([[5, 0], [3, 0]]), ["cat", "dog"])
    assert "Never predicted (precision undefined): dog" in text
    assert section(text, "Classes")[2].split() == ["dog", "3", "-", *["0.0", "%"] * 2, "95.3", "%"]


def test_class_names_are_shown_as_they_are_and_cannot_steer_the_terminal():
    text = report(matrix(4, 50), ["[red]x[/red]", "Käfer", "狗", "a\x1b[31m\n\udce9"])
    for part in ("Classes", "Confusion matrix", "Most confused"):
        for shown in ("[red]x[/red]", "Käfer", "狗", "a\\x1b[31m\\n\\udce9"):
            assert shown in "\n".join(section(text, part))
    assert "\x1b" not in text


def test_a_terminal_without_umlauts_gets_escapes():
    assert "K\\xe4fer predicted as b" in report(matrix(3, 50), ["Käfer", "b", "c"], encoding="ascii")


def test_the_files_that_are_there_and_no_others_are_named(tmp_path):
    run = RunFolder(tmp_path / "runs" / "smallnet" / "1")
    run.checkpoints.mkdir(parents=True)
    for file in (run.config, run.best_checkpoint):
        file.touch()
    (run.path / "events.out.tfevents.1").touch()
    text = report(matrix(3, 50), ["a", "b", "c"], run.path, width=max(60, len(str(run.path)) - 1))
    lines = section(text, "Run folder")
    assert lines[0] == str(run.path)  # whole, though it is longer than the terminal is wide
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["checkpoints/best.ckpt", "config.yaml", "events.out.tfevents.*"]


def test_the_next_commands_can_be_copied_also_with_spaces_in_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path("my place/runs/smallnet/3"))
    of_any = [
        "  tensorboard --logdir 'my place/runs'",
        "  cifar-lightning analyze 'my place/runs/smallnet/3' --compare OTHER_RUN",
    ]
    # A run of somebody else's module has no checkpoint that predicts or is exported.
    assert section(report(matrix(3, 50), ["a", "b", "c"], run.path, width=30), "Next steps") == of_any
    run.checkpoints.mkdir(parents=True)
    run.best_checkpoint.touch()
    assert section(report(matrix(3, 50), ["a", "b", "c"], run.path, width=30), "Next steps") == [
        *of_any,
        "  cifar-lightning predict-images 'my place/runs/smallnet/3' MY_IMAGES",
        "  cifar-lightning export 'my place/runs/smallnet/3' --format onnx",
    ]


@pytest.mark.parametrize(
    ("run", "folder"), [("chosen", "chosen"), ("/else/where/1", "/else/where"), ("/tmp/runs/made/1", "/tmp/runs")]
)
def test_tensorboard_is_never_sent_above_the_folder_of_the_runs(run, folder):
    text = report(matrix(3, 50), ["a", "b", "c"], Path(run))
    assert section(text, "Next steps")[0] == f"  tensorboard --logdir {folder}"


def test_one_image_is_one_image():
    assert "; 1 image)" in report(np.array([[1, 0], [0, 0]]), ["a", "b"])


@pytest.mark.parametrize("num_classes", [4, 30])
def test_without_a_run_that_holds_the_results_no_file_is_named(num_classes):
    cm = matrix(num_classes, 200)
    cm[:, 0] += 40  # more insights than are printed
    named = re.compile(r"[\w.-]+\.(?:csv|html|json)")
    text = report(cm, [f"class_{index}" for index in range(num_classes)], run=None)
    assert "test mistakes, highest loss: " in text
    assert " more." in text or num_classes == 4
    assert named.findall(text) == []
    assert set(named.findall(report(cm, [f"class_{index}" for index in range(num_classes)]))) >= {"mistakes.csv"}


def test_colours_change_nothing_but_colours():
    cm = matrix(10)
    stream = io.StringIO()
    console = Console(
        file=stream, width=80, highlight=False, force_terminal=True, color_system="standard", no_color=False
    )
    print_findings(findings_of(cm, CIFAR10), Path("runs/smallnet/3"), console)
    assert "\x1b[" in stream.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == report(cm, CIFAR10)


def summary(findings: dict, run: Path, width: int = 80, **changed: object) -> list[str]:
    stream = io.StringIO()
    print_summary(findings | changed, run, Console(file=stream, width=width, highlight=False))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_the_summary_fits_a_screen_whatever_is_found(num_classes, tmp_path):
    names = [f"{'a long name of a class ' * 3}{index}" for index in range(num_classes)]
    findings = findings_of(matrix(num_classes), names)
    assert any(insight["is_found"] for insight in findings["insights"])
    issue = {"name": "test/" + "long name/" * 30, "label": names[0], "suggested": names[1]}
    reliable = {"target": 0.99, "threshold": 0.91, "coverage": 0.5, "num_images": 9, "accuracy": 0.992}
    reliable["accuracy_interval_95"] = [0.7, 1.0]
    check = {"num_issues": 712, "is_reliable": True, "is_many": True, "checked": {}}
    for problems in (["damaged " * 90], []):
        changed = {"problems": problems, "label_issues": [issue] * 500, "label_check": check, "coverage": [reliable]}
        lines = summary(findings, tmp_path, **changed)
        assert len(lines) <= 30
        assert (
            sum(line.startswith("* ") for line in lines) <= 1 + 3 + 2 + 1
        )  # pair, insights, images, one of the others
        assert sum("712" in line and "label_issues.csv" in line for line in lines) == 1
        assert max(map(len, lines[:-3])) <= 80
    lines = summary(findings, tmp_path, label_issues=[issue], label_check=check | {"is_reliable": False})
    assert "label_issues.csv" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"val/acc": 0.5}, "Validation accuracy 50.00 %\n"),
        ({"val/loss": 1.5, "val/own": 2.0}, "loss 1.5000, own 2.0000\n"),
        ({}, ""),
    ],
)
def test_a_validation_shows_the_metrics_that_there_are(metrics, said, capsys):
    print_validation(metrics)
    assert capsys.readouterr().out == said


def test_each_target_accuracy_is_named_with_what_its_confidence_gives():
    reached = {"threshold": 0.667, "coverage": 1 / 9, "num_images": 8, "accuracy": 0.875}
    reached["accuracy_interval_95"] = [0.529, 0.978]
    nothing_left = {"target": 0.99, "threshold": 1.0, "coverage": 0.0, "num_images": 0, "accuracy": None}
    not_reached = {"target": 0.999, "threshold": None, "coverage": None, "num_images": None, "accuracy": None}
    refuted = {"target": 0.99, "threshold": 0.9, "coverage": 0.5, "num_images": 61, "accuracy": 16 / 61}
    refuted["accuracy_interval_95"] = [0.2, 0.4]
    stream = io.StringIO()
    findings = findings_of(matrix(3), ["a", "b", "c"]) | {
        "coverage": [{"target": 0.95} | reached, nothing_left, not_reached, refuted]
    }
    print_findings(findings, console=Console(file=stream, width=200, highlight=False))
    lines = section(stream.getvalue(), "Confidence needed for a given accuracy")
    figures = [re.findall(r"[\d.]+(?= %| to)|\d+(?= test)", line) for line in lines]
    interval = ["95", "52.9", "97.8"]
    chosen = [["95", "66.7", "8", "11.1", "87.5", *interval], ["99", "100.0"], ["99.9"]]
    assert figures == [*chosen, ["99", "26.2", "61", "90.0", "95", "20.0", "40.0"]]


def test_the_summary_lists_the_three_lowest_recalls_the_lowest_first(tmp_path):
    cm = matrix(10)
    cm[3, 3], cm[3, 4] = 500, 500
    rows = section("\n".join(summary(findings_of(cm, CIFAR10), tmp_path)), "Classes with the lowest recall")
    assert [row.split()[0] for row in rows[1:]] == ["cat", "airplane", "automobile"]
    assert "50.0 %" in rows[1]


def test_the_summary_ends_with_a_link_to_the_page_and_one_command(tmp_path):
    run = tmp_path / "a run #1"
    lines = summary(findings_of(matrix(10), CIFAR10), run)
    assert lines[-2].split()[-1] == f"{tmp_path.as_uri()}/a%20run%20%231/report.html"
    assert lines[-1].endswith(f"analyze '{run}'")


def test_a_confidence_that_is_chosen_on_the_test_images_is_called_so_and_is_not_rounded_to_one(tmp_path):
    reached = {"target": 0.99, "threshold": 0.99996, "coverage": 0.5, "num_images": 8, "accuracy": 1.0}
    reached["accuracy_interval_95"] = [0.67, 1.0]
    findings = findings_of(matrix(3), ["a", "b", "c"])
    assert {row["chosen_on"] for row in findings["coverage"]} == {"test"}  # there are no others
    for chosen_on, is_said in (("test", True), ("val", False)):
        lines = summary(findings, tmp_path, coverage=[reached | {"chosen_on": chosen_on}], width=200)
        (line,) = [line for line in lines if "99.996 %" in line]
        assert ("chosen on these images" in line) == is_said
