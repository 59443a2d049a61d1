"""Durable writes of small files, JSON and CSV."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cifar_lightning.errors import UserError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_WAITS_S = (0.05, 0.2, 1, 3, 6)  # a reader such as a virus scanner or a spreadsheet closes the file meanwhile, or never


def write_bytes_durably(path: Path, data: bytes, *, keep_as: Path | None = None) -> None:
    """Write a small file atomically and durably; its folder must exist.

    Args:
        path: The file.
        data: Its content.
        keep_as: New name, in the same folder, for the file that `path` replaces.

    Raises:
        OSError: It cannot be written (disk full, permissions); the old file is intact and the error names the path.
    """
    with in_place_of(path, keep_as=keep_as) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def in_place_of(path: Path, suffix: str = ".tmp", *, keep_as: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` once it is written and synced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")  # TMPDIR may be another disk
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _keep(path, keep_as)
        _replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk is noticed while writing, when Python no longer names the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _keep(path: Path, name: Path) -> None:
    """Link a file to a second name, replacing what is there; copy it on a file system without links."""
    temporary = name.with_name(f".{name.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            os.link(path, temporary)
        except OSError as error:
            # Windows has EINVAL for what exFAT lacks.
            if error.errno not in _NO_LINKS and (sys.platform, error.errno) != ("win32", errno.EINVAL):
                raise
            shutil.copyfile(path, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _replace(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _replace(source: Path, target: Path) -> None:
    """Rename a file over another one; on Windows wait while a process has that open."""
    for wait_s in _WAITS_S if sys.platform == "win32" else ():
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(wait_s)
    os.replace(source, target)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and its missing parents, durably; return the new ones, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders up to the first that is missing or holds a file."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk after a file in it was made or renamed."""
    if sys.platform == "win32":  # cannot open folders
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces the file of --output at the end.

    Raises:
        UserError: It cannot be written; what was there before is intact.
    """
    try:
        with in_place_of(path, path.suffix) as temporary:  # exporters look at the suffix
            yield temporary
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}).") from error


def check_output(path: Path, force: bool) -> None:
    """Check that --output can be written, before any work is done."""
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file.")
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path}: is a device or a pipe, not a file; choose another name.")
    if os.path.lexists(path) and not force:
        raise UserError(f"--output {path}: exists; choose another name, or overwrite it with --force.")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} cannot be written; choose another one.")


def write_text_durably(path: Path, text: str) -> None:
    """Write text in UTF-8 as `write_bytes_durably` does, with line ends as they are.

    Names of files that are not UTF-8 hold lone surrogates; they become \\udcXX, which JSON and YAML read back.
    """
    write_bytes_durably(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, obj: object) -> None:
    """Write plain types as indented JSON, durably. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_without_nan(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_durably(path, text + "\n")


def _without_nan(obj: object) -> object:
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {key: _without_nan(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_without_nan(value) for value in obj]
    return obj


def open_regular(path: Path, *, follow_links: bool = False) -> io.BufferedReader:
    """Open a regular file for reading, without ever waiting for it.

    Args:
        path: The file.
        follow_links: Also open the target of a symbolic link. False for the files of a run, which may be from a
            stranger; True for files that the user names.

    Raises:
        OSError: It is missing, not readable, a link, or not a regular file: a FIFO, a device, a folder.
    """
    fd = _open(path, os.O_RDONLY, follow_links=follow_links)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(fd, "rb")


def open_only_link(path: Path) -> io.BufferedRandom:
    """Open a regular file for reading and writing, without ever waiting for it; an empty one is made if it is missing.

    Raises:
        OSError: It cannot be opened, is a link or not a regular file, or has further hard links; the error names it.
    """
    fd = _open(path, os.O_RDWR | os.O_CREAT, follow_links=False)
    try:
        check_is_only_link(fd)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return os.fdopen(fd, "r+b")


def _open(path: Path, flags: int, *, follow_links: bool) -> int:
    no_links = 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | no_links, 0o666)
    except OSError as error:
        if no_links and path.is_symlink():
            raise OSError(error.errno, "it is a link", str(path)) from error
        raise


def read_bytes(path: Path, max_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a regular file whose size is within a limit, which is checked before memory is taken; see `open_regular`."""
    with open_regular(path, follow_links=follow_links) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"{size_bytes:,} bytes, which is too large", str(path))
        return file.read(size_bytes)


def expand_home(text: str) -> str:
    """Return a path that begins with `~/` or `~user/` as a shell would have expanded it; any other text as it is."""
    return os.path.expanduser(text) if re.match(r"~[\w.-]*/", text) else text


def check_is_only_link(fd: int) -> None:
    """Refuse an open file that is not a regular one with a single name: writing to it would change another file.

    Raises:
        OSError: It is a FIFO, a device or a folder, or has further hard links.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_nlink > 1:
        raise OSError(errno.EMLINK, "it has another hard link")


Stat = tuple[int, int, int, int]


def stat_numbers(about: os.stat_result) -> Stat:
    """Return size, modification and change time in ns, and the lower 63 bits of the inode."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino & (2**63 - 1)


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk that is full, or of which a user has no more."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Error numbers of a file system that has no locks."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with open_regular(path, follow_links=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def csv_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return the text of a CSV file; text from outside goes through `formatting.csv_cell` before."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    return table.getvalue()
