import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from torchtower.training.download import cache_folder, fetch_archive
from torchtower.training.errors import BadInput

MEMBER = "batches"


def _archive(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def serve():
    """Serve bytes on the loopback interface, promising perhaps more of them than are sent."""
    servers = []

    def start(content, missing=0):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200 if self.path == "/archive" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - missing])

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/archive", requests

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _left_in(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_an_archive_is_fetched_once_and_unpacked(serve, tmp_path):
    content = _archive(batches__data_batch_1=b"x" * 5000, batches__test=b"y")
    url, requests = serve(content)
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        folder = fetch_archive(url, _md5(content), MEMBER, cache)
        assert (folder / "data_batch_1").read_bytes() == b"x" * 5000
    assert requests == ["/archive"]
    assert _left_in(cache) == ["batches", "data_batch_1", "test"]


def test_another_checksum_keeps_nothing(serve, tmp_path):
    content = _archive(batches__test=b"y")
    url, _ = serve(content)
    with pytest.raises(BadInput, match=f"checksum {'0' * 32}, but got {_md5(content)}"):
        fetch_archive(url, "0" * 32, MEMBER, tmp_path)
    assert _left_in(tmp_path) == []


def test_a_download_cut_short_keeps_nothing(serve, tmp_path):
    content = _archive(batches__test=b"y" * 1000)
    url, _ = serve(content, missing=20)
    with pytest.raises(BadInput, match=r"cut short|IncompleteRead"):
        fetch_archive(url, _md5(content), MEMBER, tmp_path)
    assert _left_in(tmp_path) == []


def test_what_an_archive_holds_outside_its_folder_lands_nowhere(serve, tmp_path):
    cache = tmp_path / "cache"
    content = _archive(
        **{
            "..__..__escaped": b"!",
            "batches__..__..__escaped": b"!",
            "__absolute": b"!",
            "batches__test": b"y",
            "beside": b"!",
        }
    )
    url, _ = serve(content)
    fetch_archive(url, _md5(content), MEMBER, cache)
    assert _left_in(tmp_path) == ["batches", "cache", "test"]


def test_a_link_in_an_archive_is_not_followed(serve, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for kind, name in ((tarfile.SYMTYPE, "symbolic"), (tarfile.LNKTYPE, "hard")):
            entry = tarfile.TarInfo(f"{MEMBER}/{name}")
            entry.type, entry.linkname = kind, "../../secret"
            tar.addfile(entry)
        entry = tarfile.TarInfo(f"{MEMBER}/test")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"y"))
    url, _ = serve(buffer.getvalue())
    fetch_archive(url, _md5(buffer.getvalue()), MEMBER, tmp_path / "cache")
    assert _left_in(tmp_path) == ["batches", "cache", "test"]


def test_an_archive_without_the_folder_is_refused(serve, tmp_path):
    content = _archive(other__test=b"y")
    url, _ = serve(content)
    with pytest.raises(BadInput, match="folder 'batches' in the archive"):
        fetch_archive(url, _md5(content), MEMBER, tmp_path)
    assert _left_in(tmp_path) == []


@pytest.mark.parametrize("missing", ["server", "page"])
def test_no_network_is_one_line_that_says_what_to_do(serve, tmp_path, missing):
    url, _ = serve(b"")
    url = "http://127.0.0.1:9/archive" if missing == "server" else f"{url}/nowhere"
    with pytest.raises(BadInput, match="name it with --data") as caught:
        fetch_archive(url, "0" * 32, MEMBER, tmp_path)
    assert "\n" not in str(caught.value)
    assert _left_in(tmp_path) == []


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "torchtower"
