"""predictions.csv and mistakes.csv equal PyTorch's numbers, row by row, whatever the names."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_run import made_predictions, make_run

from cifar_lightning.formatting import csv_text
from cifar_lightning.report.findings import label_issues_of
from cifar_lightning.report.prediction_tables import prediction_tables, write_label_issues, write_prediction_tables
from cifar_lightning.report.results import Predictions, read_results

NAMES = ("=1+1", "bee, wild", "cow", 'the "dog"', "elk\n", "fox")


def made(n, num_classes=6, seed=0):
    logits, targets = made_predictions(num_classes, n, seed)
    names = tuple(f"{'-' if index == 1 else ''}photos/{index}.png" for index in range(n))
    class_names = NAMES if num_classes == 6 else tuple(map(str, range(num_classes)))
    return Predictions(logits, targets, np.arange(n), class_names, names)


def rows_of(text):
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    return rows


def test_every_row_has_the_label_the_ranked_classes_and_the_loss_of_its_image():
    test, val = made(50), made(20, seed=1)
    rows = rows_of(prediction_tables({"test": test, "val": val})[0])
    assert [row["split"] for row in rows] == ["test"] * 50 + ["val"] * 20
    assert [csv_text(row["path"]) for row in rows] == [*test.names, *val.names]
    logits = torch.from_numpy(np.concatenate([test.logits, val.logits]))
    targets = torch.from_numpy(np.concatenate([test.targets, val.targets]))
    probs, classes = logits.softmax(1).topk(5)
    assert [csv_text(row["label"]) for row in rows] == [NAMES[target] for target in targets]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose([float(row["loss"]) for row in rows], losses, rtol=1e-5, atol=1e-6)
    for rank in range(5):
        name, prob = ("prediction", "probability") if rank == 0 else (f"class_{rank + 1}", f"probability_{rank + 1}")
        assert [csv_text(row[name]) for row in rows] == [NAMES[at] for at in classes[:, rank]]
        np.testing.assert_allclose([float(row[prob]) for row in rows], probs[:, rank], rtol=1e-5)
    assert len(rows[0]) == 6 + 2 * 4


def test_mistakes_are_all_wrong_images_of_both_splits_the_highest_loss_first():
    of_splits = {"test": made(50), "val": made(20, seed=1)}
    everything = rows_of(prediction_tables(of_splits)[0])
    wrong = [row for row in everything if row["prediction"] != row["label"]]
    assert 5 < len(wrong) < 65
    assert {row["split"] for row in wrong} == {"test", "val"}
    rows = rows_of(prediction_tables(of_splits)[1])
    assert rows == sorted(wrong, key=lambda row: -float(row["loss"]))


def test_two_classes_ties_and_nan_have_the_prediction_of_the_confusion_matrix():
    logits = np.array([[1, 1], [0, np.nan], [3, 1], [-np.inf, 0]], np.float32)
    predictions = Predictions(logits, np.array([1, 0, 0, 1]), np.arange(4), ("a", "b"))
    rows = rows_of(prediction_tables({"test": predictions})[0])
    assert [row["prediction"] for row in rows] == [predictions.class_names[at] for at in predictions.preds]
    assert [row["class_2"] for row in rows] == ["b", "a", "b", "a"]
    assert list(rows[0])[-2:] == ["class_2", "probability_2"]
    equal = Predictions(np.zeros((1, 30), np.float32), np.array([7]), np.arange(1), tuple(map(str, range(30))))
    (row,) = rows_of(prediction_tables({"test": equal})[0])
    assert row["prediction"] == "0"
    assert len({row[name] for name in ("prediction", "class_2", "class_3", "class_4", "class_5")}) == 5


@pytest.mark.parametrize("lacking", ["", "predictions_val"])
def test_a_run_gets_both_files_with_the_splits_that_it_has(lacking, tmp_path):
    run = make_run(tmp_path / "run", n=40, names=("ant", "bee", "cow"))
    if lacking:
        getattr(run, lacking).unlink()
    results = read_results(run)
    write_prediction_tables(run, results)
    rows = rows_of(run.predictions_csv.read_text())
    assert len(rows) == 40 + 20 * (not lacking)
    assert rows[0]["path"] == "test/ant/00000.png"
    num_wrong = 40 - np.trace(results.test.confusion) + (0 if lacking else 20 - np.trace(results.val.confusion))
    assert len(rows_of(run.mistakes_csv.read_text())) == num_wrong


def test_label_issues_are_rows_that_no_spreadsheet_runs(tmp_path):
    run = make_run(tmp_path / "run", NAMES[:5], 200)
    issues = label_issues_of({"test": replace(made(200, 6), names=tuple(f"={at}.png" for at in range(200)))})
    write_label_issues(run, issues)
    rows = list(csv.DictReader(io.StringIO(run.label_issues.read_text(encoding="utf-8"), newline="")))
    assert [csv_text(row["path"]) for row in rows] == [issue["name"] for issue in issues]
    assert all(row["path"].startswith("'=") for row in rows)
    assert [csv_text(row["suggested"]) for row in rows] == [issue["suggested"] for issue in issues]
    for number in ("prob_of_label", "prob_of_suggested"):
        assert [float(row[number]) for row in rows] == pytest.approx([issue[number] for issue in issues], rel=1e-6)
