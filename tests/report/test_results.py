import sys
from types import SimpleNamespace

import numpy as np
import pytest
from made_run import make_run

from cifar_lightning.errors import UserError
from cifar_lightning.report.results import Predictions, read_predictions, read_results
from cifar_lightning.runs import contents


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", n=200, names=("ant", "bee", "cow"))


def test_a_whole_run_is_read_back_without_problems(run):
    results = read_results(run)
    assert results.problems == []
    assert results.class_names == ("ant", "bee", "cow")
    with np.load(run.predictions) as arrays:
        assert (results.test.logits == arrays["logits"]).all()
    assert results.confusion.sum() == len(results.test.targets) == 200
    assert len(results.val.targets) == 100
    assert len(results.epochs) == len(results.timing) == 5
    assert results.origin.config["model"]["name"] == "smallnet"
    assert all(image.shape == (32, 32, 3) for image in results.images.values())


def test_images_have_the_names_in_the_file_and_in_runs_without_names_their_indices(run):
    assert read_results(run).test.names[:2] == ("test/ant/00000.png", "test/bee/00001.png")
    for file, split in ((run.predictions, "test"), (run.predictions_val, "val")):
        with np.load(file) as arrays:
            without = {name: arrays[name] for name in arrays if name != "names"}
        np.savez(file, **(without | {"indices": without["indices"][::-1]}))
        assert read_predictions(file).names[-2:] == (f"{split}[1]", f"{split}[0]")


@pytest.mark.parametrize("names", [["a"], [1] * 200, [["a"]] * 200])
def test_damaged_names_are_refused(names, run):
    with np.load(run.predictions) as arrays:
        np.savez(run.predictions, **({**arrays} | {"names": np.array(names)}))
    with pytest.raises(UserError, match="damaged"):
        read_predictions(run.predictions)


@pytest.mark.parametrize("is_within", [True, False])
def test_predictions_with_one_long_name_are_read_back_within_a_limit_of_all_arrays(is_within, run, monkeypatch):
    with np.load(run.predictions) as file:
        arrays = {**file}
    arrays["names"] = np.array(["a/" * 5000 + "0.png", *arrays["names"][1:]])
    np.savez_compressed(run.predictions, **arrays)
    num_bytes = sum(array.nbytes for array in arrays.values())
    assert num_bytes > 20 * run.predictions.stat().st_size
    monkeypatch.setattr(contents, "_MAX_ARRAY_BYTES", num_bytes if is_within else num_bytes - 1)
    if is_within:
        assert read_predictions(run.predictions).names == tuple(arrays["names"].tolist())
    else:
        with pytest.raises(UserError, match="too large"):
            read_predictions(run.predictions)


FILES = ["predictions_val", "gallery", "metrics_csv", "timing_csv", "config", "environment", "split"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_the_rest_is_there(run, name):
    file = getattr(run, name)
    file.unlink()
    results = read_results(run)
    assert results.problems == [f"{file.name} is missing."]
    assert len(results.test.targets) == 200


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 50, b"[1, 2", b'"text"', b"a,b\n1,x\n"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_rest_is_there(run, name, content):
    file = getattr(run, name)
    file.write_bytes(content)
    (problem,) = read_results(run).problems
    # Of a table without a whole line nothing is wrong but that its epochs are not in it.
    is_cut = file.suffix == ".csv" and b"\n" not in content
    assert problem.startswith(f"{file.name} is truncated: 5 of 5" if is_cut else f"{file.name} is damaged: ")
    assert "cannot be read" not in problem
    assert str(run.path) not in problem
    assert "\n" not in problem


@pytest.mark.parametrize("name", ["metrics_csv", "timing_csv"])
@pytest.mark.parametrize(("num_rows", "rest", "said"), [(2, "2,0.", "3 of 5"), (3, "", "2 of 5"), (0, "", "5 of 5")])
def test_a_table_that_was_cut_off_is_named_with_what_it_lost(run, name, num_rows, rest, said):
    file = getattr(run, name)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: num_rows + 1]) + rest)
    results = read_results(run)
    assert results.problems == [f"{file.name} is truncated: {said} epochs are missing."]
    assert results.cut_tables == (file.name,)


def test_an_epoch_that_is_lost_from_both_tables_is_missed_between_two_others(run):
    for file in (run.metrics_csv, run.timing_csv):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:2] + lines[3:]))
    assert len(read_results(run).problems) == 2


def test_an_incomplete_last_line_is_named_also_where_no_epoch_is_missed(run):
    with run.metrics_csv.open("a") as file:
        file.write("5,0.1,")
    assert read_results(run).problems == ["metrics.csv is truncated: its last line is incomplete and ignored."]


def test_a_run_that_was_stopped_early_or_began_in_the_middle_has_lost_nothing(run):
    for file in (run.metrics_csv, run.timing_csv):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:1] + lines[3:5]))  # epochs 2 and 3 of 5
    assert read_results(run).problems == []


def test_predictions_that_are_not_finite_are_named_and_the_rest_is_there(run):
    for file, value in ((run.predictions, np.nan), (run.predictions_val, np.inf)):
        arrays = dict(np.load(file))
        arrays["logits"][7, 1] = value
        np.savez(file, **arrays)
    results = read_results(run)
    assert [problem.partition(" has NaN")[0] for problem in results.problems] == [
        "predictions.npz: 1 of 200 predictions",
        "predictions_val.npz: 1 of 100 predictions",
    ]
    assert len(results.test.targets) == 200


def test_half_a_file_of_predictions_is_damage(run):
    whole = run.predictions_val.read_bytes()
    run.predictions_val.write_bytes(whole[: len(whole) // 2])
    assert read_results(run).val is None


def test_without_the_predictions_the_matrix_stands_in(run):
    from cifar_lightning.report.report import write_confusion

    whole = read_results(run)
    write_confusion(run, whole.confusion, whole.class_names)
    run.predictions.write_bytes(b"no archive")
    results = read_results(run)
    assert (results.confusion == whole.confusion).all()
    assert results.class_names == whole.class_names
    assert results.test is None
    assert results.problems[0].startswith("predictions.npz is damaged")


def test_a_run_that_was_not_tested_names_the_command_that_tests_it(run):
    run.predictions.unlink()
    with pytest.raises(UserError, match=r"predictions.npz is missing.\nMake them with: cifar-lightning test "):
        read_results(run)


def test_nothing_that_can_be_read_names_both_files_and_the_command(run):
    run.predictions.write_bytes(b"")
    with pytest.raises(UserError, match=r"predictions.npz is damaged: .* confusion_matrix.csv is missing.*\n.*test "):
        read_results(run)
    run.confusion_matrix_csv.write_text("true,a\nb\n")
    with pytest.raises(UserError, match="not a square table"):
        read_results(run)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"targets": np.array([0, 7])}, r"a class is not in 0..2"),
        ({"targets": np.array([0])}, "different lengths"),
        ({"indices": np.array([0])}, "different lengths"),
        ({"indices": np.array([3, 3])}, "an image occurs twice"),
        ({"logits": np.zeros((2, 4))}, "different lengths"),
        ({"logits": np.zeros((0, 3)), "targets": np.array([], int), "indices": np.array([], int)}, "shape (0, 3)"),
        ({"class_names": np.array(["a", object()], dtype=object)}, "class_names: object"),
    ],
)
def test_predictions_that_do_not_match_are_damage(run, changed, reason):
    arrays = {"logits": np.zeros((2, 3)), "targets": np.array([0, 1]), "indices": np.array([0, 1])}
    np.savez(run.predictions_val, **{**arrays, "class_names": np.array(["ant", "bee", "cow"]), **changed})
    (problem,) = read_results(run).problems
    assert reason in problem


def test_a_run_without_held_out_images_misses_nothing(run):
    from cifar_lightning.files import write_json

    write_json(run.split, {"sizes": {"train": 9, "val": 0, "test": 200}})
    run.predictions_val.unlink()
    results = read_results(run)
    assert results.val is None
    assert results.problems == []


EXPLAINED = {
    "indices": np.array([5, 9]),
    "cam": np.full((2, 32, 32), 7, np.uint8),
    "neighbours": np.zeros((2, 3, 8, 8, 3), np.uint8),
    "neighbour_names": np.array([["a", "b", "c"]] * 2),
    "neighbour_labels": np.array([[0, 1, 2]] * 2),
}


@pytest.mark.parametrize("reasons", [("", ""), ("no map", ""), ("", "no layer"), ("no test", "no test")])
def test_explanations_are_read_with_the_reasons_of_what_is_missing(run, reasons):
    kept = dict(EXPLAINED)
    for reason, start in zip(reasons, ("cam", "neighbour"), strict=True):
        kept = {name: array for name, array in kept.items() if not (reason and name.startswith(start))}
    np.savez(run.explanations, **(kept if len(kept) > 1 else {}), reasons=np.array(reasons))
    results = read_results(run)
    assert results.problems == []
    assert all(reason in results.explanations_reason for reason in reasons)
    assert (results.explanations_reason == "") == (reasons == ("", ""))
    found = {} if results.explanations is None else vars(results.explanations)
    assert {name for name, array in found.items() if array is not None} == (set(kept) if len(kept) > 1 else set())
    assert all(np.array_equal(found[name], kept[name]) for name in kept if found)


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("cam", np.zeros((3, 32, 32), np.uint8)),
        ("cam", np.zeros((2, 32, 32), np.uint16)),
        ("neighbours", np.zeros((2, 3, 8, 8, 1), np.uint8)),
        ("neighbours", np.zeros((2, 2, 8, 8, 3), np.uint8)),
        ("neighbour_labels", np.array([[0, 1, 99]] * 2)),
        ("neighbour_labels", np.array([[0, 1, -1]] * 2)),
        ("neighbour_names", np.zeros((2, 3))),
        ("reasons", np.array(["", "", ""])),
        ("reasons", np.array([3])),
    ],
)
def test_strange_explanations_are_named_and_the_rest_is_there(run, name, odd):
    np.savez(run.explanations, **{**EXPLAINED, "reasons": np.array(["", ""]), name: odd})
    results = read_results(run)
    assert results.explanations is None
    (problem,) = results.problems
    assert problem.startswith("explanations.npz is damaged: ")
    assert "damaged" in results.explanations_reason
    assert len(results.test.targets) == 200


def test_a_run_of_an_earlier_version_has_no_explanations_and_no_problem(run):
    results = read_results(run)
    assert results.explanations is None
    assert results.problems == []
    assert "explanations.npz" in results.explanations_reason


def test_no_class_takes_the_place_of_another_column(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    names = ("index", "name", "label", "prediction", "cat")
    predictions = Predictions(np.eye(5, dtype=np.float32), np.arange(5)[::-1].copy(), np.arange(5) + 7, names)
    table = predictions.to_dataframe()
    assert [str(table[name][0]) for name in names[:4]] == ["7", "test[7]", "cat", "index"]
    probs = [table[name][0] for name in [*(f"probability of {name}" for name in names[:4]), "cat"]]
    assert probs == predictions.probs[0].tolist()
