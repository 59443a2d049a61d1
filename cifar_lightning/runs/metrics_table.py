"""Tables of a run with a row for each epoch, as CSV files: metrics.csv and timing.csv."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from cifar_lightning.errors import UserError
from cifar_lightning.files import csv_table, read_bytes, write_text_durably

MAX_TABLE_BYTES = 64 << 20  # a million epochs


class MetricsTable:
    """A CSV file with one row per epoch, rewritten durably for each row.

    A row adds its new columns; cells of rows without a column are empty. Numbers read back equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, which has an `epoch`."""
        (header,) = self._cells()[:1] or [["epoch"]]
        self._write([*header, *(column for column in row if column not in header)], [*self.read(), row])

    def read(self) -> list[dict[str, float]]:
        """Return the rows in order, without empty cells; no rows if there is no file.

        A last line without a line end, as a crash may leave it, is not read.

        Raises:
            UserError: The file cannot be read, has no column `epoch` or a line without one, or a cell is not a number.
        """
        rows = []
        header, *lines = self._cells() or [["epoch"]]
        if "epoch" not in header:
            raise UserError(f"{self.path}: damaged: no column epoch.")
        for number, cells in enumerate(lines, start=2):
            if len(cells) != len(header):
                raise UserError(f"{self.path}: damaged: line {number}: {len(cells)} cells under {len(header)} columns.")
            try:
                rows.append({name: float(cell) for name, cell in zip(header, cells, strict=True) if cell})
            except ValueError as error:
                raise UserError(f"{self.path}: damaged: line {number}: {error}.") from error
            if "epoch" not in rows[-1]:
                raise UserError(f"{self.path}: damaged: line {number}: no epoch.")
        return rows

    def cut_after(self, epoch: int) -> None:
        """Drop the rows of later epochs, which a resumed run writes again."""
        if cells := self._cells():
            self._write(cells[0], [row for row in self.read() if row["epoch"] <= epoch])

    def _cells(self) -> list[list[str]]:
        if not os.path.lexists(self.path):
            return []
        try:
            text = read_bytes(self.path, MAX_TABLE_BYTES).decode("utf-8", "replace")
            return list(csv.reader(text.split("\n")[:-1]))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        except csv.Error as error:
            raise UserError(f"{self.path}: damaged: {error}.") from error

    def _write(self, columns: list[str], rows: list[Mapping[str, float]]) -> None:
        cells = ([_number(row[column]) if column in row else "" for column in columns] for row in rows)
        write_text_durably(self.path, csv_table(columns, cells))


def _number(value: float) -> str:
    as_float = float(value)
    # Epochs and counts stay integers when they come back from `read` as floats.
    return str(int(as_float)) if as_float.is_integer() and abs(as_float) < 2**53 else repr(as_float)
