"""Durable small files."""

import errno
import json
import math
import os
import sys

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


def test_windows_waits_while_another_process_has_the_file_open(tmp_path, monkeypatch):
    target, waits, real = tmp_path / "metrics.csv", [], os.replace

    def replace(source, path):
        if len(waits) < fails:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        real(source, path)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    monkeypatch.setattr(files.sys, "platform", "linux")
    fails = 2
    with pytest.raises(PermissionError):
        write_text_durably(target, "1")
    assert waits == []
    monkeypatch.setattr(files.sys, "platform", "win32")
    write_text_durably(target, "1")
    assert (target.read_text(), len(waits)) == ("1", 2)
    waits.clear()
    fails = 100
    with pytest.raises(PermissionError):
        write_text_durably(target, "2")
    assert (target.read_text(), len(waits)) == ("1", 5)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("platform", "number"), [(sys.platform, errno.EPERM), ("win32", errno.EINVAL)])
def test_a_file_system_without_links_keeps_a_copy(tmp_path, monkeypatch, platform, number):
    def refuse(*_):
        raise OSError(number, "no links")

    monkeypatch.setattr(files.os, "link", refuse)
    monkeypatch.setattr(files.sys, "platform", platform)
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for content in (b"1", b"2"):
        write_bytes_durably(last, content, keep_as=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"2", b"1")
    assert sorted(tmp_path.iterdir()) == [last, previous]


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
