import math

import pytest

from cifar_lightning.errors import UserError
from cifar_lightning.runs.metrics_table import MetricsTable

ROWS = [{"epoch": 0, "train/loss": 0.1 + 0.2, "val/acc": 1 / 3}, {"epoch": 1, "train/loss": 1e-30, "val/acc": 1.0}]


def test_the_numbers_of_a_table_read_back_equal_under_one_header(tmp_path):
    file = tmp_path / "metrics.csv"
    MetricsTable(file).append(ROWS[0])
    MetricsTable(file).append(ROWS[1])  # a second process
    assert MetricsTable(file).read() == ROWS
    assert file.read_text().splitlines()[0] == "epoch,train/loss,val/acc"
    assert file.read_text().splitlines()[2].startswith("1,")


def test_nan_is_kept_and_an_absent_column_stays_absent(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"epoch": 0, "train/loss": math.nan, "val/acc": math.inf})
    table.append({"epoch": 1, "train/loss": 2.0})
    first, second = table.read()
    assert math.isnan(first["train/loss"])
    assert first["val/acc"] == math.inf
    assert second == {"epoch": 1, "train/loss": 2.0}


def test_a_column_that_the_first_row_had_not_is_added(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append(ROWS[0])
    more = {"epoch": 1, "lr": 0.1, "val/kappa": 0.5}
    table.append(more)
    assert table.read() == [ROWS[0], more]
    assert table.path.read_text().splitlines()[0] == "epoch,train/loss,val/acc,lr,val/kappa"


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_cut_short_by_a_crash_is_dropped_and_the_table_continues(tmp_path, cut):
    file = tmp_path / "metrics.csv"
    table = MetricsTable(file)
    for row in ROWS:
        table.append(row)
    file.write_bytes(file.read_bytes()[:-cut])
    left = MetricsTable(file).read()
    assert left == (ROWS[:1] if cut <= len("1,1e-30,1\n") else [])
    MetricsTable(file).append(ROWS[1])
    assert MetricsTable(file).read() == [*left, ROWS[1]]


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path):
    file = tmp_path / "metrics.csv"
    table = MetricsTable(file)
    table.cut_after(3)  # nothing there yet
    for epoch in range(5):
        table.append({"epoch": epoch, "train/loss": epoch / 7})
    before = file.read_bytes()
    resumed = MetricsTable(file)
    resumed.cut_after(2)
    assert [row["epoch"] for row in resumed.read()] == [0, 1, 2]
    for epoch in (3, 4):
        resumed.append({"epoch": epoch, "train/loss": epoch / 7})
    assert file.read_bytes() == before


def test_a_damaged_table_is_a_user_error_that_names_the_line(tmp_path):
    file = tmp_path / "metrics.csv"
    for damaged in ("1,x\n", "1\n", ",0.5\n"):
        file.write_text("epoch,train/loss\n0,0.5\n" + damaged)
        with pytest.raises(UserError, match=r"metrics\.csv: damaged: line 3"):
            MetricsTable(file).read()
        with pytest.raises(UserError, match=r"metrics\.csv: damaged: line 3"):
            MetricsTable(file).cut_after(0)
