"""Rows 19 to 21 and 49: corrupt, truncated and malicious archives and servers with wrong responses, on localhost.

A small archive replaces CIFAR-10's real one.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.faults.bench import Trial, row
from benchmarks.faults.judge import Done
from benchmarks.faults.sabotage import ARCHIVE

_NAME = "cifar-10-python.tar.gz"
_FOLDER = "cifar-10-batches-py"
_PAYLOAD = hashlib.shake_256(b"images").digest(400_000)  # not compressible, so that it can be cut


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


_GOOD = _tar({f"{_FOLDER}/data_batch_1": _PAYLOAD})


_PAGE, _WRONG = b"<html>please log in</html>\n", ("page", "range", "slow")


class _Host(ThreadingHTTPServer):
    """Serve files as /NAME; close the connection after `cut_after` bytes of a body."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], cut_after: dict[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut_after = files, cut_after
        self.ranges: list[str | None] = []

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: _Host

    def do_GET(self) -> None:
        """Send a file, or the range of it that was requested."""
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        self.server.ranges.append(asked)
        if name in _WRONG:
            self._send_wrong(name)
            return
        data = self.server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.server.cut_after.get(name, len(data))])

    def _send_wrong(self, name: str) -> None:
        """Send a page with status 200, another range, or a byte a second."""
        self.send_response(206 if name == "range" else 200)
        if name == "range":
            self.send_header("Content-Range", f"bytes 0-{len(_PAGE) - 1}/{len(_GOOD)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # until the client gives up
            if name != "slow":
                self.wfile.write(_PAGE)
            while name == "slow":
                self.wfile.write(_PAGE[:1])
                time.sleep(1)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def _host(files: dict[str, bytes], **cut_after: int) -> Iterator[_Host]:
    with _Host(files, cut_after) as host:
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield host
        finally:
            host.shutdown()
            thread.join()


def _download(trial: Trial, root: Path, archive: bytes, *urls: str) -> Done:
    """Download an archive from some URLs."""
    known = {"size_bytes": len(archive), "sha256": hashlib.sha256(archive).hexdigest(), "urls": urls}
    return trial.run(["download", "--root", root], acts="archive@start", env={ARCHIVE: json.dumps(known)})


@row(19, "archive with a wrong hash", plain=False)
def wrong_hash(trial: Trial) -> str:
    """One byte is wrong: without and with a correct mirror."""
    wrong = bytearray(_GOOD)
    wrong[len(wrong) // 2] ^= 1
    with _host({"wrong": bytes(wrong), "good": _GOOD}) as host:
        root = trial.place / "wrong"
        done = _download(trial, root, _GOOD, host.url("wrong"))
        hashes = [hashlib.sha256(data).hexdigest() for data in (wrong, _GOOD)]
        trial.reported("alone", done, *hashes)
        _nothing_in_place(trial, "alone", root)
        done = _download(trial, trial.place / "good", _GOOD, host.url("wrong"), host.url("good"))
        if trial.worked("with a mirror", done):
            trial.expect(all(value in done.stdout for value in hashes), "expected and actual hash are not shown")
            found = (trial.place / "good" / _FOLDER / "data_batch_1").read_bytes()
            trial.expect(found == _PAYLOAD, "the unpacked file is not the mirror's")
    return "both hashes shown, nothing unpacked; the next mirror is used"


@row(20, "download cut off", plain=False)
def truncated_download(trial: Trial) -> str:
    """Twice in the middle; then at every attempt."""
    third = len(_GOOD) // 3 + 1
    with _host({"half": _GOOD, "never": _GOOD}, half=third, never=0) as host:
        root = trial.place / "half"
        if trial.worked("cut twice", _download(trial, root, _GOOD, host.url("half"))):
            found = (root / _FOLDER / "data_batch_1").read_bytes()
            trial.kept(found == _PAYLOAD, "the file is not the one that was served")
        asked = [None, *(f"bytes={part * third}-" for part in (1, 2))]
        trial.kept(host.ranges == asked, f"requested {host.ranges}, not the missing ranges")
        root = trial.place / "never"
        trial.reported("cut at once", _download(trial, root, _GOOD, host.url("never")), _NAME)
        _nothing_in_place(trial, "cut at once", root)
    return "continues at the missing byte; never complete: nothing is in place"


@row(49, "a server that sends a page, another range or a byte a second", plain=False)
def wrong_responses(trial: Trial) -> str:
    """Each alone, over a partial file of an earlier process; then with a mirror."""
    start = _GOOD[:200_000]
    with _host({"good": _GOOD}) as host:
        for name in _WRONG:
            root = trial.place / name
            root.mkdir()
            part = root / f"{_NAME}.part"
            part.write_bytes(start)
            trial.reported(f"{name} alone", _download(trial, root, _GOOD, host.url(name)), _NAME)
            trial.kept(part.exists() and part.read_bytes() == start, f"{name}: the partial file is lost")
            if trial.worked(f"{name}, then a mirror", _download(trial, root, _GOOD, host.url(name), host.url("good"))):
                trial.kept(
                    host.ranges[-1] == f"bytes={len(start)}-", f"{name}: the mirror was asked for {host.ranges[-1]}"
                )
    return "the partial file is kept, and the next mirror finishes it"


def _nothing_in_place(trial: Trial, what: str, root: Path) -> None:
    for name in (_NAME, _FOLDER):
        trial.expect(not (root / name).exists(), f"{what}: {name} is in place")


@row(21, "archive with ../ members", plain=False)
def outside_members(trial: Trial) -> str:
    """The hash is correct, as if somebody had changed the pinned one, too."""
    for number, name in enumerate(("../outside", f"{_FOLDER}/../../outside", str(trial.place / "outside"))):
        archive = _tar({f"{_FOLDER}/data_batch_1": b"x", name: b"y"})
        root = trial.place / f"inner{number}" / "root"
        with _host({"evil": archive}) as host:
            done = _download(trial, root, archive, host.url("evil"))
        if name.startswith("/"):  # treated as relative, as tar programs do
            trial.worked(name, done)
        else:
            trial.reported(name, done, _NAME)
            trial.expect(not (root / _FOLDER).exists(), f"{name}: unpacked")
        trial.expect(not list(trial.place.rglob("outside")), f"{name}: written outside of its folder")
    return "refused; an absolute path is treated as relative; nothing is written outside"
