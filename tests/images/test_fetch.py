"""Downloads from a server on the loopback address."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from igpt_cli.errors import InputError, OutputError
from igpt_cli.images import fetch as module
from igpt_cli.images.fetch import Archive, fetch

DATA = bytes(range(256)) * 4000  # about 1 MB


class Server(ThreadingHTTPServer):
    """Serves DATA; remembers the Range headers; can break off, ignore ranges, or refuse."""

    def __init__(self):
        self.asked: list[str | None] = []
        self.break_after: int | None = None
        self.ranges = True
        self.status: int | None = None
        self.data = DATA
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            self.send_error(server.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start >= len(server.data):
            self.send_error(416)
            return
        body = server.data[start:]
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.break_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def archives(server):
    url = f"http://127.0.0.1:{server.server_port}/files/set.tar.gz"
    return {"cifar10": Archive(url, hashlib.md5(DATA).hexdigest())}


def test_a_download_is_checked_and_not_repeated(server, archives, tmp_path):
    seen = []
    path = fetch("cifar10", tmp_path / "new" / "folder", archives, lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "new" / "folder" / "set.tar.gz"
    assert path.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert fetch("cifar10", path.parent, archives) == path
    assert server.asked == [None]
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_download_goes_on_where_it_stopped(server, archives, tmp_path):
    server.break_after = 300_000
    with pytest.raises(
        InputError, match=r"it broke off\. 300,000 bytes are kept, the same command goes on behind them"
    ):
        fetch("cifar10", tmp_path, archives)
    server.break_after = None
    assert fetch("cifar10", tmp_path, archives).read_bytes() == DATA
    assert server.asked == [None, "bytes=300000-"]


def test_a_server_that_cannot_resume_sends_all(server, archives, tmp_path):
    (tmp_path / "set.tar.gz.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert fetch("cifar10", tmp_path, archives).read_bytes() == DATA


def test_a_part_that_is_complete_is_only_checked(server, archives, tmp_path):
    (tmp_path / "set.tar.gz.part").write_bytes(DATA)
    assert fetch("cifar10", tmp_path, archives).read_bytes() == DATA


def test_a_wrong_checksum_leaves_nothing(server, archives, tmp_path):
    server.data = b"another file"
    with pytest.raises(
        InputError, match=r"gave a file with MD5 [0-9a-f]{32}, published is [0-9a-f]{32}; it was deleted"
    ):
        fetch("cifar10", tmp_path, archives)
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_file(server, archives, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match="the server answered 404 Not Found; nothing was loaded"):
        fetch("cifar10", tmp_path, archives)


def test_no_network(tmp_path):
    archive = Archive("http://127.0.0.1:9/set.tar.gz", "0")
    with pytest.raises(
        InputError, match=r"cannot load http://127\.0\.0\.1:9/set\.tar\.gz: Connection refused\. Without a network"
    ):
        fetch("cifar10", tmp_path, {"cifar10": archive})


def test_another_file_in_the_place_is_kept(server, archives, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists and is not the published file"):
        fetch("cifar10", tmp_path, archives)
    assert (tmp_path / "set.tar.gz").read_bytes() == b"mine"
    assert server.asked == []


def test_the_command_fetches(server, archives, tmp_path, monkeypatch, igpt):
    monkeypatch.setattr(module, "ARCHIVES", archives)
    done = igpt("data", "fetch", "cifar10", "-o", tmp_path)
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'set.tar.gz'}\n")
    assert "checksum verified" in done.stderr
    assert igpt("data", "fetch", "cifar10", "-o", tmp_path, "-q").stderr == ""


def test_the_published_archives_are_these():
    assert {name: (a.file_name, a.md5) for name, a in module.ARCHIVES.items()} == {
        "cifar10": ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        "cifar100": ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        "stl10": ("stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0821fb"),
    }
