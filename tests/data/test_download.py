"""The archive arrives whole, from wherever it can be had, or nothing has its name."""

import hashlib
import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from special_files import POSIX_KINDS, make_special

from cifar_lightning.cli.main import run_command
from cifar_lightning.data import download as module
from cifar_lightning.data.download import ARCHIVES, Archive, download
from cifar_lightning.errors import UserError


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# Not compressible, so that there is something to cut.
PAYLOAD = hashlib.shake_256(b"tiny").digest(160_000)
GOOD = tar_bytes({"tiny-folder/batch": PAYLOAD, "tiny-folder/meta": b"names"})


class Server:
    """One local host: what it serves under /NAME, how it misbehaves, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: dict[str, int] = {}  # bytes of a body before the connection is closed
        self.ignores_range = False
        self.responses: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}  # instead of a file
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                asked = self.headers.get("Range")
                server.requests.append((name, asked))
                if name in server.responses:
                    server.responses[name](self)
                    return
                if name not in server.files:
                    self.send_error(404)
                    return
                data, start = server.files[name], 0
                if asked and not server.ignores_range:
                    start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                else:
                    self.send_response(200)
                body = data[start:]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cut_after.get(name, len(body))])

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True  # a slow response is not waited for
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Puts an archive of these bytes, served at these addresses, into the table as "tiny"."""

    def put(data: bytes, *urls: str) -> Archive:
        archive = Archive(
            filename="tiny.tar.gz",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            folder="tiny-folder",
            variable="TINY_URL",
            urls=urls,
        )
        monkeypatch.setitem(ARCHIVES, "tiny", archive)
        return archive

    monkeypatch.delenv("TINY_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return put


def assert_unpacked(folder: Path) -> None:
    assert (folder / "batch").read_bytes() == PAYLOAD
    assert (folder / "meta").read_bytes() == b"names"


def names(root: Path) -> set[str]:
    """What lies in a folder, but for the lock that stays."""
    return {path.name for path in root.iterdir()} - {".tiny.tar.gz.lock"}


def test_an_archive_is_downloaded_checked_and_unpacked(server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    folder = download("tiny", tmp_path / "new" / "data")
    assert folder == tmp_path / "new" / "data" / "tiny-folder"
    assert_unpacked(folder)
    assert names(folder.parent) == {"tiny-folder", "tiny.tar.gz"}
    assert server.requests == [("good", None)]


def test_an_unpacked_folder_and_a_whole_archive_need_no_network(use, tmp_path):
    use(GOOD, "http://127.0.0.1:9/nobody")
    (tmp_path / "tiny.tar.gz").write_bytes(GOOD)
    assert_unpacked(download("tiny", tmp_path))
    (tmp_path / "tiny.tar.gz").unlink()
    assert_unpacked(download("tiny", tmp_path))


def test_a_cut_transfer_resumes_where_it_was(server, use, tmp_path):
    server.files["good"] = GOOD
    server.cut_after["good"] = 100_000
    use(GOOD, server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-"]


def test_a_part_of_an_earlier_process_is_finished_by_another_mirror(server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("missing"), server.url("good"))
    (tmp_path / "tiny.tar.gz.part").write_bytes(GOOD[:70_000])
    assert_unpacked(download("tiny", tmp_path))
    assert server.requests[-1] == ("good", "bytes=70000-")


def test_a_server_without_range_starts_over(server, use, tmp_path):
    server.files["good"] = GOOD
    server.ignores_range = True
    use(GOOD, server.url("good"))
    (tmp_path / "tiny.tar.gz.part").write_bytes(GOOD[:70_000])
    assert_unpacked(download("tiny", tmp_path))
    assert server.requests == [("good", "bytes=70000-")]


def test_a_part_of_other_bytes_is_thrown_away(server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    (tmp_path / "tiny.tar.gz.part").write_bytes(b"x" * 70_000)
    assert_unpacked(download("tiny", tmp_path))
    assert [asked for _, asked in server.requests] == ["bytes=70000-", None]


HTML = b"<html>please log in</html>\n"


def respond(status: int, body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def drip(every_s: float, *, headers: bool) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: " * headers + b"\r\n" * (not headers))
        with suppress(OSError):  # until nobody listens
            while True:
                handler.wfile.write(b"x")
                time.sleep(every_s)

    return send


WRONG_ANSWERS = {
    "a page with its length": respond(200, HTML, Content_Length=str(len(HTML))),
    "a page": respond(200, HTML),
    "nothing": respond(200, b""),
    "another offset": respond(206, GOOD[:100], Content_Range=f"bytes 0-99/{len(GOOD)}"),
    "a range of another file": respond(206, HTML, Content_Range="bytes 70000-70026/70027"),
    "a range that it does not name": respond(206, HTML),
    "a range that is no numbers": respond(206, HTML, Content_Range="bytes seventy-"),
    "a shorter start": respond(200, GOOD[:69_999]),
    "a page as long as the archive": respond(200, (HTML * 9999)[: len(GOOD)], Content_Length=str(len(GOOD))),
    "a page longer than the archive": respond(200, HTML * 9999),
    "a page longer than the partial file": respond(200, HTML * 3000),
    "the archive and more": respond(200, GOOD + b"more"),
    "the right range of other bytes": respond(
        206, (HTML * 9999)[: len(GOOD) - 70_000], Content_Range=f"bytes 70000-{len(GOOD) - 1}/{len(GOOD)}"
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS.values(), ids=list(WRONG_ANSWERS))
def test_a_wrong_response_leaves_the_partial_file_and_the_next_mirror_finishes_it(wrong, server, use, tmp_path):
    part = tmp_path / "tiny.tar.gz.part"
    part.write_bytes(GOOD[:70_000])
    server.responses["wrong"] = wrong
    use(GOOD, server.url("wrong"))
    with pytest.raises(UserError, match=r"127\.0\.0\.1: "):
        download("tiny", tmp_path)
    assert part.read_bytes() == GOOD[:70_000]
    assert names(tmp_path) <= {part.name, f"{part.name}.new"}
    server.files["good"] = GOOD
    use(GOOD, server.url("wrong"), server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    assert server.requests[-1] == ("good", "bytes=70000-")


def test_a_longer_start_from_a_server_without_range_replaces_the_partial_file(server, use, tmp_path):
    part = tmp_path / "tiny.tar.gz.part"
    part.write_bytes(GOOD[:70_000])
    server.files["good"], server.cut_after["good"], server.ignores_range = GOOD, 90_000, True
    use(GOOD, server.url("good"))
    with pytest.raises(UserError):
        download("tiny", tmp_path)
    assert part.read_bytes() == GOOD[:90_000]
    assert names(tmp_path) == {part.name}


def test_wrong_bytes_of_a_cut_transfer_are_replaced_by_a_whole_download(server, use, tmp_path):
    (tmp_path / "tiny.tar.gz.part").write_bytes(GOOD[:70_000])
    server.responses["wrong"] = respond(206, HTML, Content_Range=f"bytes 70000-{len(GOOD) - 1}/{len(GOOD)}")
    server.files["good"] = GOOD
    use(GOOD, server.url("wrong"), server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    assert [asked for name, asked in server.requests if name == "good"] == [f"bytes={70_000 + len(HTML)}-", None]
    assert names(tmp_path) == {"tiny-folder", "tiny.tar.gz"}


@pytest.mark.parametrize("new", [b"", GOOD[:90_000], b"y" * 90_000])
def test_a_corrupt_partial_file_stays_until_a_whole_download_is_verified(new, server, use, tmp_path):
    part, scratch = tmp_path / "tiny.tar.gz.part", tmp_path / "tiny.tar.gz.part.new"
    part.write_bytes(b"x" * 70_000)
    if new:  # of an earlier process
        scratch.write_bytes(new)
    server.files["good"], server.cut_after["good"], server.ignores_range = GOOD, 100_000, True
    use(GOOD, server.url("good"))
    with pytest.raises(UserError, match="cut off"):
        download("tiny", tmp_path)
    assert part.read_bytes() == b"x" * 70_000
    assert scratch.read_bytes() == GOOD[:100_000]
    server.ignores_range = False
    server.requests.clear()
    assert_unpacked(download("tiny", tmp_path))
    assert [asked for _, asked in server.requests] == ["bytes=70000-", "bytes=100000-"]
    assert names(tmp_path) == {"tiny-folder", "tiny.tar.gz"}


@pytest.mark.parametrize("suffix", [".part", ".part.new"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", *POSIX_KINDS, "folder"])
def test_a_partial_file_that_is_a_link_or_no_file_is_refused_by_name(kind, suffix, server, use, tmp_path):
    mine, path = tmp_path / "mine", tmp_path / "data" / f"tiny.tar.gz{suffix}"
    path.parent.mkdir()
    mine.write_bytes(GOOD[:70_000])
    if kind == "hard link":
        path.hardlink_to(mine)
    elif "link" in kind:
        path.symlink_to(mine if kind == "link" else tmp_path / "nothing")
    else:
        make_special(path, kind)
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}'\nMake room, move.*--data\.root"):
        download("tiny", path.parent)
    assert mine.read_bytes() == GOOD[:70_000]
    assert os.path.lexists(path)
    assert server.requests == []
    assert {each.name for each in tmp_path.iterdir()} == {"mine", "data"}


def test_an_archive_that_is_a_link_is_replaced_and_its_target_kept(server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "tiny.tar.gz").symlink_to(tmp_path / "mine")
    assert_unpacked(download("tiny", tmp_path))
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "tiny.tar.gz").is_symlink()


EVIL = "\x1b[31mevil"
EVIL_ANSWERS = {
    "a reason": f"HTTP/1.1 404 {EVIL}\r\n\r\n",
    "a long reason": f"HTTP/1.1 404 {EVIL}{'x' * 9999}\r\n\r\n",
    "a status": f"HTTP/1.1 4{EVIL}\r\n\r\n",
    "no status": f"{EVIL}\r\n\r\n",
    "a range": f"HTTP/1.1 206 x\r\nContent-Range: {EVIL}\r\n\r\n",
    "a redirection": f"HTTP/1.1 302 x\r\nLocation: evil:{EVIL}\r\n\r\n",
}


@pytest.mark.parametrize("evil", EVIL_ANSWERS.values(), ids=list(EVIL_ANSWERS))
def test_what_a_server_says_is_escaped(evil, server, use, tmp_path, capsys):
    server.responses["evil"] = lambda handler: handler.wfile.write(evil.encode())
    use(GOOD, server.url("evil"))
    with pytest.raises(UserError) as caught:
        download("tiny", tmp_path)
    for said in (str(caught.value), capsys.readouterr().out):
        assert r"\x1b[31mevil" in said
        assert "\x1b" not in said
        assert len(said) < 1000


@pytest.mark.parametrize("url", ["http://\x1bevil:9/", "\x1bevil://host/"])
def test_a_url_of_the_environment_is_escaped(url, use, tmp_path, capsys, monkeypatch):
    use(GOOD)
    monkeypatch.setenv("TINY_URL", url)
    with pytest.raises(UserError) as caught:
        download("tiny", tmp_path)
    assert "\x1b" not in str(caught.value) + capsys.readouterr().out


@pytest.mark.parametrize("headers", [False, True])
def test_a_server_that_drips_is_left_for_the_next_mirror(headers, server, use, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 1.0)  # also of the good one
    (tmp_path / "tiny.tar.gz.part").write_bytes(GOOD[:70_000])
    server.responses["slow"] = drip(0.02, headers=headers)
    server.files["good"] = GOOD
    use(GOOD, server.url("slow"), server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    assert server.requests[-1] == ("good", "bytes=70000-")


def test_a_wrong_hash_is_shown_and_the_next_mirror_tried(server, use, tmp_path, capsys):
    wrong = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
    server.files |= {"wrong": wrong, "good": GOOD}
    archive = use(GOOD, server.url("wrong"), server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    said = capsys.readouterr()
    assert hashlib.sha256(wrong).hexdigest() in said.out
    assert archive.sha256 in said.out
    assert said.err == ""


def test_nothing_is_unpacked_when_every_hash_is_wrong(server, use, tmp_path):
    wrong = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
    server.files["wrong"] = wrong
    archive = use(GOOD, server.url("wrong"))
    with pytest.raises(UserError) as caught:
        download("tiny", tmp_path)
    assert archive.sha256 in str(caught.value)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("data", [GOOD + b"more", GOOD[:-5]])
def test_a_wrong_size_is_refused(data, server, use, tmp_path):
    server.files["odd"] = data
    use(GOOD, server.url("odd"))
    with pytest.raises(UserError, match=r"bytes"):
        download("tiny", tmp_path)
    assert "tiny.tar.gz" not in names(tmp_path)


def test_without_network_the_error_names_archive_place_override_and_synthetic(server, use, tmp_path):
    use(GOOD, server.url("missing"), "http://127.0.0.1:9/nobody")
    with pytest.raises(UserError) as caught:
        download("tiny", tmp_path)
    message = str(caught.value)
    for part in ("tiny.tar.gz", str(tmp_path / "tiny.tar.gz"), "TINY_URL", "--data.dataset synthetic", "HTTP 404"):
        assert part in message
    assert message.count("\n") == 1


def test_the_url_of_the_environment_comes_first(server, use, tmp_path, monkeypatch):
    server.files["good"] = GOOD
    use(GOOD, "http://127.0.0.1:9/nobody")
    monkeypatch.setenv("TINY_URL", server.url("good"))
    assert_unpacked(download("tiny", tmp_path))
    assert server.requests == [("good", None)]


def test_a_file_url_works(use, tmp_path, monkeypatch):
    use(GOOD, "http://127.0.0.1:9/nobody")
    (tmp_path / "elsewhere.tar.gz").write_bytes(GOOD)
    monkeypatch.setenv("TINY_URL", (tmp_path / "elsewhere.tar.gz").as_uri())
    assert_unpacked(download("tiny", tmp_path / "data"))


@pytest.mark.parametrize("value", ["/mnt/tiny.tar.gz", "http://[", "https://[::1/tiny"])
def test_a_variable_that_holds_no_url_is_refused_by_name(value, use, tmp_path, monkeypatch):
    use(GOOD)
    monkeypatch.setenv("TINY_URL", value)
    with pytest.raises(UserError, match=re.escape(f"TINY_URL={value}")):
        download("tiny", tmp_path)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_untouched(link, server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    (tmp_path / "private").write_text("mine")
    link(tmp_path / ".tiny.tar.gz.lock", tmp_path / "private")
    with pytest.raises(UserError, match=r"tiny\.tar\.gz cannot be written"):
        download("tiny", tmp_path)
    assert (tmp_path / "private").read_text() == "mine"
    assert names(tmp_path) == {"private"}


def test_an_archive_put_by_hand_with_a_wrong_hash_is_said_and_replaced(server, use, tmp_path, capsys):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    (tmp_path / "tiny.tar.gz").write_bytes(b"half")
    assert_unpacked(download("tiny", tmp_path))
    assert "4 bytes instead of" in capsys.readouterr().out
    assert (tmp_path / "tiny.tar.gz").read_bytes() == GOOD


def test_the_command_unpacks_an_archive_that_is_there(use, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ARCHIVES, "cifar10", use(GOOD))
    (tmp_path / "tiny.tar.gz").write_bytes(GOOD)
    assert run_command(["download", "--root", str(tmp_path)]) == 0
    assert_unpacked(tmp_path / "tiny-folder")
    assert f"cifar10: in {tmp_path / 'tiny-folder'}\n" in capsys.readouterr().out


def test_processes_that_come_at_the_same_time_download_once(server, use, tmp_path):
    server.files["good"] = GOOD
    use(GOOD, server.url("good"))
    threads = [threading.Thread(target=download, args=("tiny", tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_unpacked(tmp_path / "tiny-folder")
    assert len(server.requests) == 1


def test_a_root_that_cannot_be_written_is_named(use, tmp_path):
    use(GOOD)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file.*\n.*--data\.root"):
        download("tiny", tmp_path / "file")


def test_silence_is_an_error_after_the_timeout(use, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(GOOD, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(UserError, match="no response"):
            download("tiny", tmp_path)


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_the_pinned_names_are_those_of_torchvision(name):
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    archive = ARCHIVES[name]
    assert (archive.filename, archive.folder) == (reader.filename, reader.base_folder)
    assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
    assert all(url.startswith("https://") and url.endswith(archive.filename) for url in archive.urls)
