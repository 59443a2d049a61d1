"""The README's table of results puts together only what compares."""

import json

import table


def test_runs_of_one_hardware_are_put_together_and_those_of_another_are_a_row_of_their_own(tmp_path, monkeypatch):
    def run(hardware, accuracy, seconds, note=""):
        return {"hardware": hardware, "test_accuracy": accuracy, "elapsed_s": seconds, "note": note}

    runs = [run("a CPU", 0.90, 600), run("a GPU", 0.93, 30), run("a CPU", 0.92, 660), run("a GPU", 0.93, 50, "busy")]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.json").write_text(json.dumps(runs))
    monkeypatch.setattr(table, "HERE", tmp_path)
    assert table._rows("Mine", "mine", "fit") == [
        "| Mine | 91.00 % ± 1.41 (n=2, standard deviation) | 10.5 min (n=2) | a CPU | `fit` |",
        "| Mine | 93.00 % ± 0.00 (n=2, standard deviation) | 30.0 s (n=1) | a GPU | `fit` |",
    ]
    assert table._rows("Mine", "other", "fit") == ["| Mine | not measured | not measured | - | `fit` |"]
