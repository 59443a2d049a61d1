"""The lock of a run folder."""

import os
import sys

import pytest

from cifar_lightning.errors import UserError
from cifar_lightning.runs.lock import RunLock

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX links, FIFOs and fork")


def test_the_lock_file_holds_the_process_id_and_stays(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("a longer text of an earlier holder")
    with RunLock(path) as lock:
        assert path.read_text() == f" {os.getpid()}\n"
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            RunLock(path)
    lock.release()
    assert path.read_text() == f" {os.getpid()}\n"
    RunLock(path).release()


@posix_only
@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "hard link", "fifo", "folder"])
def test_only_a_regular_file_with_one_link_is_locked_and_the_target_stays_as_it_is(tmp_path, kind):
    target, path = tmp_path / "precious", tmp_path / "run" / ".lock"
    path.parent.mkdir()
    if kind != "dangling symlink":
        target.write_text("precious")
    if kind.endswith("symlink"):
        path.symlink_to(target)
    elif kind == "hard link":
        path.hardlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"\.lock") as caught:
        RunLock(path)
    assert len(str(caught.value).splitlines()) <= 2
    assert not target.exists() if kind == "dangling symlink" else target.read_text() == "precious"


@posix_only
def test_a_folder_reached_through_a_link_is_locked(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with RunLock(tmp_path / "link" / ".lock"), pytest.raises(UserError, match="is writing"):
        RunLock(tmp_path / "run" / ".lock")


@posix_only
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    import errno
    import fcntl

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="no locks"):
        lock = RunLock(tmp_path / ".lock")
    lock.release()
    assert (tmp_path / ".lock").exists()
