"""Downloads against a server on this machine that cuts connections, and serves wrong, truncated and foreign files."""

import errno
import hashlib
import os
import re
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from errors import UserError
from models import build_model, published
from models.published import RemoteFile, provide
from scripts import fetch
from tests.conftest import message_of

CONTENT = bytes(range(256)) * 2000
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers with `content`; ends each connection after `cut` bytes, if set."""

    content, cut, ranges, kind, length = CONTENT, None, True, "application/octet-stream", True
    #: What else it can do: answer 416 to everything, redirect, name any length, send a byte at a time.
    refuses, location, claims, drips = False, None, None, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/repo"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        if "absent" in self.path:
            self.send_error(404)
            return
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(start[1]) if start and server.ranges else 0
        size = len(server.content)
        if start >= size or server.refuses:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.length:
            self.send_header("Content-Length", server.claims or str(size - start))
        self.send_header("Content-Type", server.kind)
        self.end_headers()
        rest = server.content[start:]
        if server.drips:
            with suppress(OSError):  # until nobody listens
                for byte in rest:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            return
        self.wfile.write(rest if server.cut is None else rest[: server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def remote(server, tmp_path, name: str = "file.pth", sha256: str = SUM[:8], check=None) -> RemoteFile:
    return RemoteFile(tmp_path / "here" / name, server.url, name, sha256, check)


def refusal(file: RemoteFile) -> str:
    with pytest.raises(UserError) as caught:
        provide(file)
    assert "\n" not in str(caught.value) and not file.target.exists()
    return str(caught.value)


def test_a_file_is_fetched_once_and_checked_ever_after(server, tmp_path):
    file = remote(server, tmp_path)
    assert provide(file) == file.target and file.target.read_bytes() == CONTENT
    provide(file)
    assert len(server.asked) == 1 and not list(tmp_path.glob("here/*.part"))
    file.target.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not the right file"):
        provide(file)


def test_cut_connections_are_continued_where_they_ended(server, tmp_path):
    server.cut = len(CONTENT) // 3
    file = remote(server, tmp_path)
    assert provide(file).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [
        None,
        *(f"bytes={k * server.cut}-" for k in range(1, len(server.asked))),
    ]


def test_what_came_is_kept_for_the_next_try(server, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ATTEMPTS", 2)
    server.cut = len(CONTENT) // 3
    file = remote(server, tmp_path)
    message = refusal(file)
    assert "ends too early" in message and "resumes" in message and str(file.target) in message
    server.cut = None
    assert provide(file).read_bytes() == CONTENT and server.asked[-1][1] == f"bytes={2 * (len(CONTENT) // 3)}-"


def test_a_server_without_ranges_starts_again(server, tmp_path):
    file = remote(server, tmp_path)
    file.target.parent.mkdir()
    file.target.with_name("file.pth.part").write_bytes(CONTENT[:100])
    server.ranges = False
    assert provide(file).read_bytes() == CONTENT


def test_a_part_that_is_whole_or_too_long_is_not_fetched_behind(server, tmp_path):
    file = remote(server, tmp_path)
    file.target.parent.mkdir()
    part = file.target.with_name("file.pth.part")
    for beginning in (CONTENT, CONTENT + b"more"):
        part.write_bytes(beginning)
        assert provide(file).read_bytes() == CONTENT
        file.target.unlink()


def test_a_wrong_file_is_not_kept(server, tmp_path):
    server.content = CONTENT[::-1]
    file = remote(server, tmp_path)
    message = refusal(file)
    assert SUM[:8] in message and server.url in message
    assert not [path for path in (tmp_path / "here").iterdir() if not path.name.startswith(".")]


def test_a_truncated_file_whose_length_nobody_tells_is_not_kept(server, tmp_path):
    server.length, server.cut = False, 1000
    assert "not the right file" in refusal(remote(server, tmp_path))


def test_a_web_page_is_not_a_file(server, tmp_path):
    server.content, server.kind = b"<html>please log in</html>", "text/html; charset=utf-8"
    assert "web page" in refusal(remote(server, tmp_path))


def test_what_is_missing_and_where_to_put_it_is_said_offline(server, tmp_path):
    absent = remote(server, tmp_path, "absent.pth")
    message = refusal(absent)
    assert "404" in message and str(absent.target) in message and published.MIRROR in message
    assert len(server.asked) == 1, "a file that is not there is not asked for again"
    nobody = RemoteFile(tmp_path / "x.pth", "http://127.0.0.1:9", "x.pth", SUM)
    assert "x.pth is missing" in refusal(nobody)
    (tmp_path / "file").touch()
    assert "cannot be made" in refusal(RemoteFile(tmp_path / "file" / "x" / "x.pth", server.url, "x.pth", SUM))


def test_a_mirror_may_be_a_url_or_a_folder(server, tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "file.pth").write_bytes(CONTENT)
    for mirror in (str(folder), folder.as_uri(), server.url):
        monkeypatch.setenv(published.MIRROR, mirror)
        file = RemoteFile(tmp_path / "here" / "file.pth", "http://127.0.0.1:9", "file.pth", SUM)
        assert provide(file).read_bytes() == CONTENT
        file.target.unlink()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_server_that_refuses_every_range_is_one_line(server, tmp_path, keeps):
    server.refuses = True
    file = remote(server, tmp_path)
    file.target.parent.mkdir()
    if keeps:
        file.target.with_name("file.pth.part").write_bytes(CONTENT[:100])
    assert "416" in refusal(file)
    assert len(server.asked) == 1 + keeps, "it is asked once more for the whole file, and no more"


def test_a_length_that_is_none_is_not_believed(server, tmp_path):
    for claim in ("many", "-1", "1e3"):
        server.claims = claim
        file = remote(server, tmp_path, f"{claim}.pth")
        assert provide(file).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "http://[::1", "http://127.0.0.1:port/x", "nowhere://x", "\x7f"]
)
def test_a_redirect_to_nowhere_is_one_line(server, tmp_path, location):
    server.location = location
    assert "cannot be downloaded" in refusal(remote(server, tmp_path))


@pytest.mark.parametrize(
    "mirror", ["://", "http://", "http://[x/", "foo://bar", "http://a b", "http://\u00e4:x/", "~/nowhere"]
)
def test_a_mirror_that_is_none_is_one_line(server, tmp_path, mirror, monkeypatch):
    monkeypatch.setenv(published.MIRROR, mirror)
    assert "cannot be downloaded" in refusal(remote(server, tmp_path))
    monkeypatch.setenv(published.MIRROR, server.url)
    server.location = f"{server.url}/loop"
    assert "cannot be downloaded" in refusal(remote(server, tmp_path))


def test_an_answer_larger_than_the_file_can_be_is_not_stored(server, tmp_path):
    file = remote(server, tmp_path)._replace(largest=len(CONTENT) // 2)
    assert "larger than" in refusal(file)
    server.length = False
    assert "larger than" in refusal(file)
    assert not file.target.with_name("file.pth.part").exists()
    assert provide(file._replace(largest=len(CONTENT))).read_bytes() == CONTENT


def test_a_server_that_drips_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "LONGEST", 0.5)
    server.drips = True
    assert "not done after 0.5 s" in refusal(remote(server, tmp_path))
    assert len(server.asked) == 1


def refuse_to_write(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_cache_that_cannot_be_written_is_read(server, tmp_path, monkeypatch):
    file = remote(server, tmp_path)
    provide(file)
    file.target.with_name(".file.pth.lock").unlink(missing_ok=True)
    looked_at = []
    unpinned = remote(server, tmp_path, sha256="", check=looked_at.append)
    written = set(file.target.parent.iterdir())
    with monkeypatch.context() as patch:
        for name in ("write_text", "touch", "mkdir"):
            patch.setattr(Path, name, refuse_to_write)
        patch.setattr(os, "open", refuse_to_write)
        assert provide(file) == provide(unpinned) == file.target and looked_at == [file.target]
        assert "cannot be made (Read-only" in refusal(remote(server, tmp_path, "other.pth"))
    assert set(file.target.parent.iterdir()) == written


def cifar_weights(tmp_path, model: str, folder: str = "resnet56_vanilla"):
    path = tmp_path / "mirror" / folder / "ckpt_epoch_240.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 240, "model": build_model(model, 100).state_dict()}, path)
    return path


def test_a_cifar_teacher_is_known_by_its_structure_and_pinned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(published.MIRROR, str(tmp_path / "mirror"))
    source = cifar_weights(tmp_path, "resnet56")
    (path,) = fetch.main(["cifar", "resnet56"])
    assert str(path) == "save/models/resnet56_vanilla/ckpt_epoch_240.pth" and "72.34" in capsys.readouterr().out
    pin = path.with_name("ckpt_epoch_240.pth.sha256").read_text()
    assert pin.split() == [hashlib.sha256(source.read_bytes()).hexdigest(), path.name]
    path.unlink()
    cifar_weights(tmp_path, "resnet56")  # other values
    assert "since its first use" in message_of(fetch.main, ["cifar", "resnet56"])
    assert not path.exists()


def test_a_file_of_another_network_is_no_cifar_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(published.MIRROR, str(tmp_path / "mirror"))
    cifar_weights(tmp_path, "resnet20")
    assert "resnet20" in message_of(fetch.main, ["cifar", "resnet56"])
    damaged = cifar_weights(tmp_path, "resnet56")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    assert "cannot be read" in message_of(fetch.main, ["cifar", "resnet56"])
    assert not list((tmp_path / "save/models/resnet56_vanilla").glob("ckpt*"))
    assert "resnet32x4" in message_of(fetch.main, ["cifar", "resnet34"])
