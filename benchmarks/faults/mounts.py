"""Temporary mounts of the fault rows: small file systems and others than that of a folder."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults.bench import Skipped


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a size, such as "4m", and yield its folder.

    Raises:
        Skipped: It cannot be mounted.
    """
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def other_file_system(beside: Path) -> Iterator[Path]:
    """Yield an empty folder on another file system than that of `beside`.

    Raises:
        Skipped: There is none.
    """
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shared.stat().st_dev != beside.stat().st_dev:
        folder = shared / f"faults-{os.getpid()}-{beside.name}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    else:
        with small_disk(beside / "tmpfs", "64m") as folder:
            yield folder


def _mount(*arguments: str) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skipped("needs root on Linux, to mount a file system")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise Skipped(f"no file system can be mounted here ({done.stderr.strip()})")


def fill(folder: Path, left_bytes: int = 0) -> None:
    """Fill the file system of a folder, except for some bytes."""
    block = bytes(4096)
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize > left_bytes:
            file.write(block)


def without_privileges() -> Sequence[str]:
    """Return the prefix of a command for which file permissions hold: root has to drop a capability.

    Raises:
        Skipped: This is root and it cannot be given up.
    """
    if os.geteuid() != 0:
        return ()
    tool = shutil.which("setpriv")
    if tool is None:
        raise Skipped("runs as root, and there is no setpriv to give its rights up")
    return (tool, "--bounding-set", "-dac_override,-dac_read_search")
