"""Labels in a file: a CSV, or JSON lines, of path, label and optionally split.

The first line of a CSV names the columns, in any order and case; each object of JSON lines has them as keys. `COLUMNS`
has their names, of which the first that is there counts; other columns are ignored. Text is UTF-8, with or without a
byte order mark, or UTF-16 with one. A CSV is separated by commas, semicolons or tabs, as Excel writes it.

A path is relative to the root of the images or, if there is no such file, to the folder of the labels file. Either way
it must lie below the root; a link there may lead elsewhere. Backslashes, and the other Unicode form of a name, are
tried where a file is not found as written.
"""

import codecs
import csv
import io
import json
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cifar_lightning.data.image_set import SPLIT_OF_WORD, Split
from cifar_lightning.data.progress import progress
from cifar_lightning.errors import UserError
from cifar_lightning.files import Stat, read_bytes, stat_numbers
from cifar_lightning.formatting import clipped, printable

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img"),
    "label": ("label", "class", "class_name", "target", "category"),
    "split": ("split", "set", "subset"),
}
_MAX_BYTES = 1 << 30
_EVERY = 1000  # lines after which a progress bar moves; a file of ten times as many has one
_Record = tuple[int, dict[str, Any]]  # line, and the values of `COLUMNS`


class Row(NamedTuple):
    """A labelled image."""

    name: str  # path below the root
    label: str  # in Unicode's form NFC, as the names of class folders
    split: Split | None  # None in a file without splits
    about: Stat


def read_labels(path: Path, root: Path) -> list[Row]:
    """Read a labels file and find its images.

    Raises:
        UserError: Names file, line and value: no header, not a label or split, a file that is missing, outside of the
            root or in two rows.
    """
    text = _text(path)
    records = _of_json(path, text) if text.lstrip().startswith("{") else _of_csv(path, text)
    rows: list[Row] = []
    line_of: dict[str, int] = {}
    missing: list[tuple[int, str]] = []
    tops = tuple(dict.fromkeys(os.path.join(top, "") for top in (os.path.abspath(root), os.path.realpath(root))))
    num_lines = text.count("\n")
    with progress(num_lines, "Finding images", hidden=num_lines < 10 * _EVERY) as show:
        for line, record in records:
            if line % _EVERY == 0:
                show(line)
            label, split = _label(path, line, record["label"]), _split(path, line, record)
            if rows and (split is None) != (rows[0].split is None):
                _refuse(path, line, "no split, which other rows have; give it in every row or in none")
            name, about = _find(path, line, record["path"], root, tops)
            if about is None:
                missing.append((line, name))
                continue
            if name in line_of:
                other = rows[[*line_of].index(name)]
                as_what = f" as {other.label}, here as {label}" if other.label != label else ""
                _refuse(path, line, f"{name} is also in line {line_of[name]}{as_what}; keep one of them")
            line_of[name] = line
            rows.append(Row(name, label, split, about))
    if missing:
        num = f"; so are {len(missing) - 1:,} more of {len(rows) + len(missing):,} rows" if len(missing) > 1 else ""
        _refuse(path, missing[0][0], f"{missing[0][1]} is no file in --data.root {root}{num}")
    if not rows:
        raise UserError(f"--data.labels {path}: no rows; a line for each image is needed.")
    return rows


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    raise UserError(printable(f"--data.labels {path}, line {line:,}: {reason}."))


def _text(path: Path) -> str:
    try:
        data = read_bytes(path, _MAX_BYTES, follow_links=True)
    except OSError as error:
        raise UserError(f"--data.labels {path}: cannot be read ({error.strerror or error}).") from error
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(path, data[: error.start].count(b"\n") + 1, "not UTF-8; save it as UTF-8 (Excel: CSV UTF-8)")


def _of_csv(path: Path, text: str) -> Iterator[_Record]:
    lines = io.StringIO(text, newline="")
    first = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = next((cells for cells in reader if any(cells)), [])
        places = _columns(path, max(1, reader.line_num), header)
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                quote = "; quote names that hold the separator" if len(cells) > len(header) else ""
                _refuse(path, reader.line_num, f"{len(cells)} cells, and the header has {len(header)}{quote}")
            yield reader.line_num, {kind: cells[at] for kind, at in places.items()}
    except csv.Error as error:
        _refuse(path, reader.line_num, f"not a CSV ({error})")


def _of_json(path: Path, text: str) -> Iterator[_Record]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            _refuse(path, line, f"not a JSON object ({error})")
        if not isinstance(record, dict):
            _refuse(path, line, 'not a JSON object; one a line is needed, {"path": "a.jpg", "label": "cat"}')
        places, values = _columns(path, line, list(record)), [*record.values()]
        yield line, {kind: values[at] for kind, at in places.items()}


def _columns(path: Path, line: int, names: Sequence[str]) -> dict[str, int]:
    """Return the position of each of `COLUMNS` among the names of a header; the split may be missing."""
    lowered = [name.strip().lower() for name in names]
    firsts = {kind: next((name for name in known if name in lowered), None) for kind, known in COLUMNS.items()}
    found = {kind: lowered.index(name) for kind, name in firsts.items() if name is not None}
    if lacking := [kind for kind in ("path", "label") if kind not in found]:
        of = f" among {clipped(', '.join(names))}" if names else ""
        reason = f"no {' and no '.join(lacking)}{of}; the header must be path,label or path,label,split"
        _refuse(path, line, reason)
    return found


def _label(path: Path, line: int, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        _refuse(path, line, f"label {json.dumps(value)} is not a name; give a text or a whole number")
    # JSON may hold half of a surrogate pair, which UTF-8 cannot: shown as \ud83d.
    label = unicodedata.normalize("NFC", str(value).strip().encode("utf-8", "backslashreplace").decode())
    if not label:
        _refuse(path, line, "the label is empty")
    return label


def _split(path: Path, line: int, record: dict[str, Any]) -> Split | None:
    if "split" not in record:
        return None
    split = SPLIT_OF_WORD.get(str(record["split"]).strip().casefold())
    if split is None:
        _refuse(path, line, f"split {clipped(str(record['split'])) or 'is empty'}: one of {', '.join(SPLIT_OF_WORD)}")
    return split


def _find(path: Path, line: int, value: Any, root: Path, tops: Sequence[str]) -> tuple[str, Stat | None]:
    """Return the path of an image below the root and its stat; the path as written, and None, if there is no file.

    `tops` are the spellings of the root, each with a separator at its end.
    """
    if not isinstance(value, str) or not value.strip():
        _refuse(path, line, "the path is empty" if value == "" else f"path {json.dumps(value)} is not a text")
    spellings = (value, value.replace("\\", "/"), *(unicodedata.normalize(form, value) for form in ("NFC", "NFD")))
    is_below = False
    for spelling in dict.fromkeys(spellings):
        for folder in (root, path.parent):
            full = os.path.abspath(os.path.join(folder, spelling))
            top = next((top for top in tops if full.startswith(top)), None)
            if top is None:
                continue
            is_below = True
            try:
                about = os.stat(full)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:  # a loop of links, no permission, a NUL in the name
                _refuse(path, line, f"{clipped(value)} cannot be read ({error})")
            if stat.S_ISREG(about.st_mode):
                return full.removeprefix(top), stat_numbers(about)
    if not is_below:
        _refuse(path, line, f"{clipped(value)} lies outside of --data.root {root}")
    return value, None
