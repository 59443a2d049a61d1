"""The lock of a run folder, released by the operating system when the process ends."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Self

from cifar_lightning.errors import UserError
from cifar_lightning.files import NO_LOCKS, check_is_only_link, open_regular

if sys.platform != "win32":
    import fcntl

_PATIENCE_S = 0.2  # `is_locked` of another process holds the lock for some microseconds


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a run folder, from its lock file, which is only read."""
    try:
        with open_regular(path) as file:
            if sys.platform == "win32":
                file.read(1)  # refused where it is locked
            else:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # missing, a link, or a file system without locks
        return isinstance(error, PermissionError if sys.platform == "win32" else BlockingIOError)
    return False


class RunLock:
    """The exclusive right to write into a run folder, held until `release` or the end of the process.

    It is a lock on an open file, so SIGKILL or a power cut leaves nothing stale behind. Forked children (loader
    workers) do not hold it. The file holds the process id of its last holder and stays: it marks the folder as a run's.

    Args:
        path: The lock file.
        is_new: Whether the run is new, so that it could have another folder.

    Raises:
        UserError: Another process holds the lock, or the file cannot be written or is a link, a FIFO or a folder.
    """

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        from filelock import FileLock, Timeout  # takes 30 ms, which `--help` does not wait for

        self._lock = FileLock(
            path,
            timeout=_PATIENCE_S,
            thread_local=False,
            preserve_lock_file=True,
            on_acquired=_check_and_write_process_id,
        )
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"run folder {path.parent}: process {_read_process_id(path)} is writing into it.\n"
                f"Wait until it has ended{', or choose another folder with --run_dir' if is_new else ''}."
            ) from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise UserError(
                    f"run folder {path.parent}: cannot write {path.name} ({error.strerror}).\n"
                    f"Fix its permissions, or {'choose another folder with --run_dir' if is_new else 'copy the run'}."
                ) from error
            warnings.warn(
                f"{path.parent}: this file system has no locks; two runs into one folder go unnoticed.", stacklevel=3
            )

    def release(self) -> None:
        """Release the lock; calling it again does nothing."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _check_and_write_process_id(fd: int) -> None:
    check_is_only_link(fd)
    with contextlib.suppress(OSError):  # disk full: the id only serves a message, and the next file will fail
        os.ftruncate(fd, 0)
        os.write(fd, f" {os.getpid()}\n".encode())


def _read_process_id(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        file.seek(1 if sys.platform == "win32" else 0)  # Windows lets nobody read the first byte, which is locked
        return file.read(32).decode("ascii", "replace").strip() or "unknown"
    return "unknown"
