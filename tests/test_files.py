"""Durable small files."""

import errno
import json
import math
import os

import pytest

from cifar_lightning import files
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_bytes_durably, write_json, write_text_durably
from cifar_lightning.runs.contents import read_json


def test_a_failed_write_leaves_the_old_file_and_nothing_next_to_it_and_names_the_path(tmp_path, monkeypatch):
    target = tmp_path / "split.json"
    write_text_durably(target, "old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text_durably(target, "new")
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_durable_write_replaces_the_file_and_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_bytes_durably(tmp_path / "file", b"1")
    write_bytes_durably(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"2"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_reads_back_equal_with_umlauts_legible_and_without_nan(tmp_path):
    file = tmp_path / "x.json"
    path = os.fsdecode(b"caf\xe9")  # not UTF-8
    write_json(file, {"a": [1, 0.1, math.nan, -math.inf], "Käfer": None, "path": path})
    assert read_json(file) == {"a": [1, 0.1, None, None], "Käfer": None, "path": path}
    assert "Käfer" in file.read_text(encoding="utf-8")
    json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


def test_damaged_json_is_a_user_error_that_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    for name in ("x.json", "none.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)
