"""Downloads against a real HTTP server on 127.0.0.1 that lies in every way a server can lie."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motte.errors import InputError, ResourceError, TrustError
from motte.zoo import download

BODY = bytes(range(256)) * 5000
HASH = hashlib.sha256(BODY).hexdigest()[:8]
GOOD = f"tiny-{HASH}.pth"
WRONG = "tiny-00000000.pth"


class Liar(http.server.BaseHTTPRequestHandler):
    """What it answers stands in the first folder of the path."""

    def do_GET(self) -> None:
        behaviour = self.path.split("/")[1]
        if behaviour in ("good", "truncated", "chunkless"):
            self.send_response(200)
            if behaviour != "chunkless":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY if behaviour != "truncated" else BODY[: len(BODY) // 2])
        elif behaviour == "huge":
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 50))
            self.end_headers()
        elif behaviour == "missing":
            self.send_error(404)
        elif behaviour == "nonsense":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        else:
            targets = {
                "moved": f"/good/{GOOD}",
                "to-file": "file:///etc/hostname",
                "to-ftp": f"ftp://127.0.0.1/{GOOD}",
                "loop": self.path,
            }
            self.send_response(302)
            self.send_header("Location", targets[behaviour])
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "motte" / "weights"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_good_download_is_checked_named_and_reported(server: str, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download.fetch(f"{server}/good/{GOOD}", progress=lambda done, total: seen.append((done, total)))
    assert path == cache / GOOD
    assert path.read_bytes() == BODY
    assert files_in(cache) == [GOOD]
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_second_fetch_reads_the_cache_and_not_the_network(server: str, cache: Path) -> None:
    first = download.fetch(f"{server}/good/{GOOD}")
    assert download.fetch(f"http://127.0.0.1:1/good/{GOOD}") == first
    assert download.cached(f"http://127.0.0.1:1/{GOOD}") == first


def test_an_unknown_length_is_no_obstacle(server: str, cache: Path) -> None:
    seen: list[int | None] = []
    assert download.fetch(f"{server}/chunkless/{GOOD}", progress=lambda _, total: seen.append(total)).is_file()
    assert set(seen) == {None}


def test_a_redirect_over_http_is_followed(server: str, cache: Path) -> None:
    assert download.fetch(f"{server}/moved/{GOOD}").read_bytes() == BODY


def test_a_wrong_hash_leaves_nothing(server: str, cache: Path) -> None:
    with pytest.raises(TrustError, match="do not match the hash") as caught:
        download.fetch(f"{server}/good/{WRONG}")
    assert HASH in str(caught.value)
    assert files_in(cache) == []


@pytest.mark.parametrize("behaviour", ["truncated", "missing", "nonsense", "to-file", "loop"])
def test_a_failing_server_is_a_missing_resource_and_leaves_nothing(server: str, cache: Path, behaviour: str) -> None:
    with pytest.raises(ResourceError) as caught:
        download.fetch(f"{server}/{behaviour}/{GOOD}")
    assert caught.value.where is not None
    assert caught.value.hint
    assert files_in(cache) == []


@pytest.mark.parametrize("behaviour", ["to-ftp", "huge"])
def test_an_unsafe_answer_is_not_trusted_and_leaves_nothing(server: str, cache: Path, behaviour: str) -> None:
    with pytest.raises(TrustError):
        download.fetch(f"{server}/{behaviour}/{GOOD}")
    assert files_in(cache) == []


def test_https_is_never_left(cache: Path) -> None:
    import urllib.request
    from email.message import Message
    from http.client import HTTPMessage
    from io import BytesIO

    assert issubclass(HTTPMessage, Message)
    request = urllib.request.Request(f"https://example.org/{GOOD}")
    with pytest.raises(TrustError, match="unsafe redirect"):
        download._SafeRedirects().redirect_request(
            request, BytesIO(), 302, "Found", HTTPMessage(), f"http://example.org/{GOOD}"
        )


def test_a_refused_connection_names_the_two_ways_out(cache: Path) -> None:
    with socket.socket() as closed:  # bound and never listening: the port is ours, and nobody answers
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError) as caught:
            download.fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/{GOOD}")
    assert caught.value.hint is not None
    assert "--weights FILE" in caught.value.hint
    assert "--random-weights" in caught.value.hint
    assert files_in(cache) == []


def test_an_interrupt_leaves_nothing(server: str, cache: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(f"{server}/good/{GOOD}", progress=interrupt)
    assert files_in(cache) == []


def test_a_cache_that_cannot_be_written_is_said(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "motte").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ResourceError, match="cannot write to the cache"):
        download.fetch(f"{server}/good/{GOOD}")


def test_a_damaged_cached_file_is_not_used(server: str, cache: Path) -> None:
    path = download.fetch(f"{server}/good/{GOOD}")
    path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(TrustError, match="cached weights") as caught:
        download.fetch(f"{server}/good/{GOOD}")
    assert caught.value.hint is not None
    assert "delete" in caught.value.hint


@pytest.mark.parametrize("name", ["tiny.pth", "tiny-ABCDEF12.pth", "tiny-1234567.pth", "-12345678", ""])
def test_a_name_without_a_hash_is_refused(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match="no hash"):
        download.fetch(f"http://127.0.0.1:1/{name}")


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_only_the_web_is_asked(cache: Path, scheme: str) -> None:
    with pytest.raises(InputError, match="not a web address"):
        download.fetch(f"{scheme}://127.0.0.1/{GOOD}")
    assert files_in(cache) == []


def test_a_relative_cache_home_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/place")
    assert download.cache_folder() == tmp_path / ".cache" / "motte" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == tmp_path / ".cache" / "motte" / "weights"
