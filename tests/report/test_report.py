"""`analyze` as a whole: a run's files in, terminal, findings.json, page and confusion matrix out."""

import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from made_run import CIFAR10, make_run
from program import fail, start
from rich.console import Console

from cifar_lightning.cli.main import main
from cifar_lightning.report import findings as findings_module
from cifar_lightning.report.report import make_report, write_confusion
from cifar_lightning.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "made" / "1")


def analyze(run, other=None):
    """Report in this process; return what is printed."""
    console = Console(file=io.StringIO(), width=80, highlight=False)
    make_report(run, other, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("num_classes", [10, 30])
def test_findings_of_many_classes_have_no_matrix_and_page_and_csv_the_same_as_ever(num_classes, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", n=300, names=[f"class_{at}" for at in range(num_classes)], image_size=4)
    analyze(run)
    page, table = run.report.read_text(encoding="utf-8"), run.confusion_matrix_csv.read_bytes()
    monkeypatch.setattr(findings_module, "_MAX_MATRIX", num_classes - 1)
    assert "Too wide to print" in analyze(run)
    assert json.loads(run.findings.read_text(encoding="utf-8"))["confusion_matrix"] is None
    assert run.report.read_text(encoding="utf-8") == page
    assert run.confusion_matrix_csv.read_bytes() == table


def test_analyze_writes_what_it_says_and_prints_it(run, tmp_path):
    printed = start("analyze", run.path, cwd=tmp_path).stdout
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    assert printed.startswith(f"Test accuracy {100 * findings['summary']['accuracy']:.2f} %")
    for text in ("Temperature ", "Most confused pairs", "Insights (", "Underconfident: mean confidence "):
        assert text in printed
    issues = list(csv.DictReader(run.label_issues.read_text(encoding="utf-8").splitlines()))
    assert [row["path"] for row in issues] == [issue["name"] for issue in findings["label_issues"]]
    assert len(issues) == findings["label_check"]["num_issues"] > 3
    for file in (run.report, run.confusion_matrix_png, run.confusion_matrix_csv):
        assert file.stat().st_size > 0
        assert file.name in printed or file.suffix == ".csv"
    rows = list(csv.reader(run.confusion_matrix_csv.read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows[1:]] == rows[0][1:] == list(CIFAR10)
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == findings["confusion_matrix"]
    assert max(map(len, printed.split("Run folder")[0].splitlines())) <= 80


def test_analyze_again_says_the_same(run, tmp_path):
    analyze(run)
    first = {file: file.read_bytes() for file in (run.findings, run.report, run.confusion_matrix_png)}
    start("analyze", run.path, cwd=tmp_path, PYTHONHASHSEED="1")
    assert [file.name for file in first if file.read_bytes() != first[file]] == []


def test_a_terminal_of_unknown_width_gets_the_report(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "analyze", str(run.path)])
    outputs = []
    for columns in ("80", "0"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_run_that_cannot_be_written_is_reported_on_the_terminal(run, monkeypatch):
    printed = analyze(run)
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("cifar_lightning.report.report.write_json", None)  # nothing is tried
    again = analyze(run)
    assert again.split("Problems")[0].rstrip() == printed.split("Run folder")[0].rstrip()
    assert "The folder cannot be written" in again
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


def test_a_run_copied_elsewhere_has_the_same_findings(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "elsewhere" / "made" / "1"))
    analyze(run)
    analyze(copy)
    assert copy.findings.read_bytes() == run.findings.read_bytes()


def test_compare_adds_the_other_run_and_leaves_its_files_alone(run, tmp_path):
    other = make_run(tmp_path / "runs" / "made" / "2", seed=1)
    printed = start("analyze", run.path, "--compare", other.path, cwd=tmp_path).stdout
    assert "Compared on the same test images" in printed
    assert "McNemar's exact test" in printed
    assert json.loads(run.findings.read_text(encoding="utf-8"))["comparison"]["runs"][1]["path"] == str(other.path)
    assert "Compared with" in run.report.read_text(encoding="utf-8")
    assert not other.findings.exists()
    analyze(run)
    assert "Compared with" not in run.report.read_text(encoding="utf-8")


def test_what_analyze_refuses(run, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    fewer = make_run(tmp_path / "fewer", n=100)
    assert "same images" in fail(monkeypatch, capsys, work, "analyze", run.path, "--compare", fewer.path)
    assert "is the run itself" in fail(monkeypatch, capsys, work, "analyze", run.path, "--compare", run.path)
    run.predictions.unlink()
    assert f"cifar-lightning test {run.path}" in fail(monkeypatch, capsys, work, "analyze", run.path)
    assert "not a run folder" in fail(monkeypatch, capsys, work, "analyze", tmp_path)


def test_damaged_files_are_named_on_terminal_and_page_and_the_rest_is_shown(run):
    run.gallery.write_bytes(b"no archive")
    run.metrics_csv.unlink()
    run.predictions_val.write_bytes(run.predictions_val.read_bytes()[:1000])
    printed = analyze(run)
    page = run.report.read_text(encoding="utf-8")
    for said in (printed, page):
        for name in ("gallery.npz is damaged", "metrics.csv is missing", "predictions_val.npz is damaged"):
            assert name in said
        assert "no predictions of validation images" in page
    assert "Test accuracy" in printed
    assert 'id="training"' not in page
    # The mistakes of the test set are listed from predictions.npz; their images are gone.
    assert 'href="#images"' in page
    assert "<img" not in page.partition('<section id="images">')[2].partition("</section>")[0]


def test_without_config_the_report_names_it_and_shows_the_rest(run):
    run.config.unlink()
    printed = analyze(run)
    assert printed.startswith("Test accuracy")
    assert "config.yaml is missing." in printed
    assert "config.yaml is missing." in run.report.read_text(encoding="utf-8")


def test_a_cut_table_is_named_and_the_page_does_not_say_which_epoch_was_tested(run):
    lines = run.metrics_csv.read_text().splitlines(keepends=True)
    run.metrics_csv.write_text("".join(lines[:3]))
    printed = analyze(run)
    page = run.report.read_text(encoding="utf-8")
    for said in (printed, page):
        assert "metrics.csv is truncated: 3 of 5 epochs are missing." in said
    assert "with the best validation accuracy" not in page
    assert "<p>5 epochs in " in page


def test_the_other_runs_damage_is_named_with_its_folder(run, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    other.split.write_text('{"sizes": {"va')
    printed = " ".join(analyze(run, other).split())
    page = run.report.read_text(encoding="utf-8")
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    (problem,) = findings["problems"]
    assert problem.startswith(f"{other.path}: split.json is damaged: ")
    for said in (printed, page):
        assert f"{other.path}: split.json is damaged: " in said
        assert "Whether the test images are identical could not be checked" in said


def test_with_the_matrix_alone_the_report_has_what_it_gives(run):
    analyze(run)
    run.predictions.unlink()
    printed = analyze(run)
    assert "Test accuracy" in printed
    assert "predictions.npz is missing" in printed
    assert 'id="calibration"' not in run.report.read_text(encoding="utf-8")


def test_a_class_never_predicted_is_shown_as_such_and_nothing_is_warned_of(run):
    arrays = dict(np.load(run.predictions))
    arrays["logits"][:, 3] = -50
    np.savez(run.predictions, **arrays)
    assert "Never predicted (precision undefined): cat" in analyze(run)  # warnings are errors in tests
    assert "Never predicted, precision undefined: cat" in run.report.read_text(encoding="utf-8")


def test_a_diverged_run_has_a_report(run):
    for file in (run.predictions, run.predictions_val):
        arrays = dict(np.load(file))
        np.savez(file, **{**arrays, "logits": np.full_like(arrays["logits"], np.nan)})
    printed = " ".join(analyze(run).split())
    assert "Loss -, calibration error (ECE) -" in printed
    assert "predictions.npz: 2,000 of 2,000 predictions have NaN" in printed


def test_class_names_with_commas_and_quotes_survive_the_csv(run):
    names = ('a, "b"', "ü", "plain")
    write_confusion(run, np.arange(9).reshape(3, 3), names)
    rows = list(csv.reader(run.confusion_matrix_csv.read_text(encoding="utf-8").splitlines()))
    assert tuple(rows[0][1:]) == names == tuple(row[0] for row in rows[1:])
    assert rows[2][1:] == ["3", "4", "5"]
