"""The lock of a run folder, which the system drops when the process dies."""

import contextlib
import errno
import os
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from cifar_lightning.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Past the end of the file: Windows also blocks reading what is locked, and the process id must stay legible.
_LOCKED_BYTE = 1 << 20


class RunLock:
    """The sole right to write into a run folder, held until `release` or until the process ends.

    It is a lock of the system on an open file, not the presence of a file: nothing stale is left behind by SIGKILL or a
    power cut. Forked children (loader workers) close their copy at once, so that one which outlives its parent for a
    moment does not hold up the next one. The file itself stays: it marks the folder as a run's.

    Raises:
        UserError: Another holder has the lock, or the file cannot be written.
    """

    _held: set["RunLock"] = set()  # noqa: RUF012 - shared by design: a forked child closes them all

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"run folder {path.parent}: cannot write there ({error.strerror}).\n"
                "Choose another one with --run_dir, or mend its permissions."
            ) from error
        try:
            self._acquire()
        except UserError:
            os.close(self._fd)
            raise
        with contextlib.suppress(OSError):  # a full disk: the id is for a message alone, and the next file will fail
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        RunLock._held.add(self)

    def _acquire(self) -> None:
        try:
            if sys.platform == "win32":
                os.lseek(self._fd, _LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(self._fd, msvcrt.LK_NBLCK, 1)
                os.lseek(self._fd, 0, os.SEEK_SET)
            else:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                warnings.warn(
                    f"{self.path.parent}: this file system has no locks; two runs into one folder go unnoticed.",
                    stacklevel=4,
                )
                return
            os.lseek(self._fd, 0, os.SEEK_SET)
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"run folder {self.path.parent}: process {holder} is writing into it.\n"
                "Wait until it has ended, or choose another folder with --run_dir."
            ) from error

    def release(self) -> None:
        """Let go; calling it again does nothing."""
        if self in RunLock._held:
            RunLock._held.discard(self)
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    @classmethod
    def _release_in_child(cls) -> None:
        for lock in tuple(cls._held):
            lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=RunLock._release_in_child)
