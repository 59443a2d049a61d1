"""The tables of results average only runs of one hardware and one set of flags."""

import json

import pytest

from benchmarks import RESULTS
from benchmarks.accuracy import record, table
from benchmarks.accuracy.ablations import SUITES


def test_a_row_is_the_mean_over_runs_with_one_hardware_and_one_set_of_flags(tmp_path, monkeypatch):
    def run(hardware, accuracy, seconds, note="", flags="", settings=None):
        line = {"flags": flags, "hardware": hardware, "test_accuracy": accuracy, "elapsed_s": seconds, "note": note}
        line |= {"epochs": 2, "dirty": False}
        return line | {"settings": settings or {"seed": 1}, "seed": seconds or 0, "data_seed": 0}

    runs = [run("a CPU", 0.90, 600), run("a GPU", 0.93, 30), run("a CPU", 0.92, 660), run("a GPU", 0.93, 50, "busy")]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(runs))
    (tmp_path / "mine.yaml").write_text("seed: 1")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "CONFIGS", tmp_path)
    whole = "`python train.py fit --config configs/mine.yaml`"
    many = "(n=2, standard deviation)"
    rows = [
        f"| Mine, 2 epochs, seeds 600, 660 | 91.00 % ± 1.41 {many} | 10.5 min (10.0 to 11.0, n=2) | a CPU | {whole} |",
        f"| Mine, 2 epochs, seeds 30, 50 | 93.00 % ± 0.00 {many} | 30.0 s (n=1) | a GPU | {whole} |",
    ]
    assert table._rows("Mine", "mine", []) == rows
    path.write_text(json.dumps([run("a CPU", 0.85, 60, flags="--epochs 2")]))
    short = "`python train.py fit --config configs/mine.yaml --epochs 2`"
    row = f"| Mine, 2 epochs, seed 60 | 85.00 % (n=1, no spread) | 1.0 min (n=1) | a CPU | {short} |"
    assert table._rows("Mine", "mine", []) == [row]
    path.write_text(json.dumps([run("a CPU", 0.85, 60, flags="--epochs 2"), *runs]))
    assert table._rows("Mine", "mine", []) == [*rows, row]
    path.write_text(json.dumps([run("a CPU", 0.85, 120, "busy")]))
    notes = ["another remark"]
    assert table._rows("Mine", "mine", notes)[0].split(" | ")[2] == "at most 2.0 min (n=1) [2]"
    assert notes == ["another remark", "busy"]
    untimed = run("a CPU", 0.85, None, "an epoch was not timed")
    path.write_text(json.dumps([untimed]))
    assert table._rows("Mine", "mine", notes)[0].split(" | ")[1:3] == ["85.00 % (n=1, no spread)", "- [3]"]
    path.write_text(json.dumps([untimed, run("a CPU", 0.85, 120, "busy")]))
    assert table._rows("Mine", "mine", notes)[0].split(" | ")[2] == "at most 2.0 min (n=1) [2]", "named once"
    path.write_text(json.dumps([*runs, run("a CPU", 0.99, 600, settings={"seed": 2})]))
    assert table._rows("Mine", "mine", []) == rows, "a result of another version of the config counts no more"
    path.write_text(json.dumps([run("a CPU", 0.50, 600), *runs]))
    assert table._rows("Mine", "mine", []) == rows, "of each seed the newest counts"
    path.write_text(json.dumps([run("a CPU", 0.50, 600) | {"dirty": True}]))
    assert table._rows("Mine", "mine", ["another remark"])[0].split(" | ")[1] == "50.00 % (n=1, no spread) [2]"
    assert table._rows("Mine", "not measured", []) == []


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("", ""),
        ("--data.dataset folder --data.root images --checkpoint.every_n_minutes 10", ""),
        ("--epochs 9 --data.root=images --trainer.precision bf16-mixed", "--epochs 9 --trainer.precision bf16-mixed"),
        ("--model.compile --lr=1", "--model.compile --lr=1"),
        ("--data.dataset cifar100", "--data.dataset cifar100"),
        ("--seed_everything 1 --data.seed 1", ""),
    ],
)
def test_flags_that_change_what_is_measured_are_kept_with_the_result(flags, kept):
    command = f"python train.py fit --config configs/smallnet.yaml {flags}".split()
    assert record.other_flags(command) == kept


def test_ablations_of_other_hardware_or_precision_have_tables_of_their_own(tmp_path, monkeypatch):
    def line(setting, accuracy, hardware="a CPU", precision="32-true", asked=None):
        of_run = {"suite": "training", "setting": setting, "seed": 0, "accuracy": accuracy, "num_images": 100}
        return of_run | {"hardware": hardware, "precision": precision, "asked_precision": asked}

    lines = [line("base", 0.7), line("ema", 0.9), line("base", 0.5, "a GPU"), line("ema", 0.4, "a GPU")]
    lines += [line("base", 0.6, precision="bf16-mixed", asked="bf16-mixed")]
    (tmp_path / "ablations.json").write_text(json.dumps(lines))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = table.ablations_table()
    assert "+20.00 points" in text.partition("a CPU, 32-true")[2].partition("a GPU, 32-true")[0]
    assert "-10.00 points" in text.partition("a GPU, 32-true")[2].partition("a CPU, bf16-mixed")[0]
    assert "Base: 60.00 %" in text.partition("a CPU, bf16-mixed")[2]
    assert "--precision bf16-mixed" in text


def test_every_measured_setting_has_its_row():
    lines = json.loads((RESULTS / "ablations.json").read_text(encoding="utf-8"))
    assert {line["setting"] for line in lines if line["setting"] not in SUITES[line["suite"]].settings} == set()
