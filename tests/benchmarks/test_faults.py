"""The harness of the faults: it covers its table, judges strictly, and its cheap rows are handled."""

import argparse
import json

import pytest
import torch
from program import popen, start

from benchmarks import ROOT
from benchmarks.accuracy import table
from benchmarks.faults import run
from benchmarks.faults.bench import ROWS, Bench, Row, Skipped, Trial
from benchmarks.faults.judge import Done, differences, unclear
from benchmarks.faults.mounts import small_disk
from benchmarks.faults.run import CONTROL, NUM_ROWS, Result, parse_rows, perform, summary
from benchmarks.faults.subjects import SUBJECTS

OURS, PLAIN = SUBJECTS["ours"], SUBJECTS["plain"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"), OURS, popen=popen)


def test_every_row_of_the_table_is_there():
    assert sorted(ROWS) == list(range(1, NUM_ROWS + 1))
    assert CONTROL in ROWS
    ours_alone = [number for number, row in sorted(ROWS.items()) if not row.is_for_plain]
    assert ours_alone == [14, 19, 20, 21, 36, 37, 40, 45, 47, 48, 49]


def test_only_takes_rows_of_the_table():
    assert parse_rows("20,1,7,7") == [1, 7, 20]
    for wrong in ("0", str(NUM_ROWS + 1), "1,x", "", "1;2"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_rows(wrong)


def test_a_failure_in_three_lines_that_names_the_thing_is_clear():
    assert unclear(Done(2, "", "error: --lr -1: positive.\nFor example 1e-3.\n"), "--lr") == ""


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (Done(0, "", "error: --lr\n"), "exit status 0"),
        (Done(-9, "", "error: --lr\n"), "SIGKILL"),
        (Done(1, "", ""), "0 lines"),
        (Done(2, "", "--lr\n" * 4), "4 lines"),
        (Done(2, "", "error: a number is wrong\n"), "does not name '--lr'"),
        (Done(1, "", "Traceback (most recent call last):\n--lr\n"), "traceback"),
        (Done(1, "Traceback (most recent call last):\n", "--lr\n"), "traceback"),
    ],
)
def test_any_other_failure_is_not_clear(done, why):
    assert why in unclear(done, "--lr")


def test_checkpoints_are_compared_bit_by_bit_and_by_names():
    tree = {"a": [torch.tensor([0.0, float("nan")]), 1], "at": {"/tmp/x/best.ckpt": 1.5}, "in": "/tmp/x/best"}
    same = {"a": [torch.tensor([0.0, float("nan")]), 1], "at": {"/tmp/y/best.ckpt": 1.5}, "in": "/tmp/y/best"}
    assert differences(tree, same) == []
    assert differences(tree, {**same, "a": [torch.tensor([-0.0, float("nan")]), 1]}) == [".a.0"]
    assert differences(tree, {**same, "a": [torch.tensor([0.0, float("nan")]).double(), 1]}) == [".a.0"]
    assert differences(tree, {**same, "in": "/tmp/y/last"}) == [".in"]
    assert differences({"mode": "max"}, {"mode": "min"}) == [".mode"]
    assert differences(tree, {**same, "at": {}, "new": 0}) == [".at.best.ckpt", ".new"]


def row_that(does, number=1):
    return Row(number, "something", does, is_for_plain=False)


def test_a_row_is_handled_only_without_faults(bench):
    def fails(trial):
        trial.expect(False, "it was lost")
        return "all well"

    def breaks(trial):
        raise FileNotFoundError("no file")

    def skips(trial):
        raise Skipped("needs two disks")

    results = [perform(row_that(does, n), bench) for n, does in enumerate((lambda _: "fine", fails, breaks, skips), 1)]
    assert [result.verdict for result in results] == ["handled", "NOT handled", "NOT handled", "skipped"]
    assert [result.reason for result in results] == [
        "fine",
        "it was lost",
        "FileNotFoundError: no file",
        "needs two disks",
    ]
    assert summary(results) == ["1 of 3 handled, 1 skipped: 4", "ratio=0.333"]
    assert perform(row_that(fails), Bench(bench.folder / "plain", PLAIN)).verdict == "does not apply"


def test_the_control_is_counted_apart():
    results = [Result(number, "x", "handled", "y") for number in sorted(ROWS)]
    control, count, ratio = summary(results)
    assert control.startswith("14")
    num = len(ROWS) - 1
    assert (count, ratio) == (f"{num} of {num} handled, 0 skipped: none", "ratio=1.000")


def test_a_clear_report_with_another_exit_status_is_a_fault(bench):
    trial = Trial(bench, bench.folder)
    assert trial.reported("x", Done(2, "", "error: a disk\n"), "disk", status=2)
    assert (trial.clear, trial.faults) == (True, [])
    assert not trial.reported("x", Done(1, "", "error: a disk\n"), "disk", status=2)
    assert trial.faults == ["x: exit status 1 and not 2"]


def test_mounting_without_root_is_a_reason_to_skip(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Skipped, match="root"), small_disk(tmp_path / "disk", "1m"):
        pass


def test_every_theme_has_rows():
    modules = {row.perform.__module__ for row in ROWS.values()}
    assert modules == {theme.__name__ for theme in run.THEMES}


@pytest.mark.parametrize("number", [19, 20, 21, 29])
def test_the_row_is_handled(number, bench):
    result = perform(ROWS[number], bench)
    assert result.verdict == "handled", result.line()
    assert result.clearly_reported


@pytest.mark.slow(first=True)
@pytest.mark.parametrize("number", [10, 12, 15, 23, 25, 27, 42, 43, 44])
def test_the_longer_row_is_handled(number, bench):
    result = perform(ROWS[number], bench)
    assert result.verdict == "handled", result.line()


@pytest.mark.slow(first=True)
def test_runs_stopped_anyhow_and_resumed_equal_the_unbroken_ones(tmp_path):
    settings = ["--stops", 15, "--per_run", 8, "--json", tmp_path / "stops.json"]
    start("benchmarks.faults.stops", *settings, program="-m", cwd=ROOT)
    verdicts = json.loads((tmp_path / "stops.json").read_text())["verdicts"]
    assert verdicts["equal"] + verdicts.get("refused", 0) == 15
    assert verdicts["equal"] >= 10


def test_the_readmes_table_says_which_row_was_simulated(monkeypatch, tmp_path):
    rows = [Result(1, "a kill", "handled", "well"), Result(34, "no memory", "handled", "checkpoints kept (simulated)")]
    results = [vars(result) | {"commit": "c", "dirty": False} for result in rows]
    about = {"hardware": "2 cores", "summary": summary(rows)[-2], "results": results}
    (tmp_path / "faults.json").write_text(json.dumps(about))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = table.faults_table()
    assert "2 of 2 handled. Commits: c (2 rows)." in text
    assert "| 1. a kill | handled | not measured |" in text
    assert "| 34. no memory | handled (simulated) | not measured |" in text
