"""Public sets over the network: a server on 127.0.0.1 that lies, a cache that fills once, and no network at all."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motte.errors import ResourceError, TrustError
from motte.train.data import open_data
from motte.train.datasets import published


class Files(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` by the last part of the path; below /lie/ with one byte changed, below /gone/ not at all."""

    content: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        _, behaviour, name = self.path.split("/")
        body = self.content.get(name)
        if body is None or behaviour == "gone":
            self.send_error(404)
            return
        if behaviour == "lie":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if behaviour == "long":
            body += b"more"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, makers: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tiny CIFAR-10 whose hash is the known one."""
    archive = makers.cifar10(tmp_path / "source").read_bytes()
    file = published.PublishedFile("cifar-10-binary.tar.gz", len(archive), hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(Files, "content", {file.name: archive})
    monkeypatch.setattr(Files, "asked", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        address = f"http://127.0.0.1:{running.server_address[1]}/"
        known = dataclasses.replace(published.SETS["cifar10"], files=(file,), mirrors=(address + "good/",))
        monkeypatch.setattr(published, "SETS", {**published.SETS, "cifar10": known})
        yield address
        running.shutdown()
        thread.join()


def mirrors(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    known = dataclasses.replace(published.SETS["cifar10"], mirrors=addresses)
    monkeypatch.setattr(published, "SETS", {**published.SETS, "cifar10": known})


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_set_is_downloaded_once_and_checked(server: str, tmp_path: Path) -> None:
    seen: list[int] = []
    data = open_data("cifar10", seed=0, progress=lambda done, total: seen.append(done))
    assert (len(data.train), len(data.test)) == (40, 8)
    assert data.provenance.endswith("cache/motte/data/cifar10: the published bytes")
    assert seen
    assert cached(tmp_path) == ["cifar-10-binary.tar.gz"]
    open_data("cifar10", seed=0)
    assert len(Files.asked) == 1


def test_the_second_mirror_is_asked_when_the_first_fails(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors(monkeypatch, server + "gone/", server + "good/")
    assert len(open_data("cifar10", seed=0).train) == 40
    assert len(Files.asked) == 2


@pytest.mark.parametrize("behaviour", ["lie", "long"])
def test_other_bytes_are_not_kept_and_no_other_mirror_is_asked(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    mirrors(monkeypatch, f"{server}{behaviour}/", server + "good/")
    with pytest.raises(TrustError):
        open_data("cifar10", seed=0)
    assert cached(tmp_path) == []
    assert len(Files.asked) == 1


def test_a_cached_file_that_changed_is_said(server: str, tmp_path: Path, makers: Any) -> None:
    open_data("cifar10", seed=0)
    makers.cifar10(tmp_path / "cache" / "motte" / "data" / "cifar10", each=2)
    with pytest.raises(TrustError, match="cached"):
        open_data("cifar10", seed=0)


def test_offline_is_one_clear_error_that_names_the_way_out(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors(monkeypatch, "http://127.0.0.1:1/a/", "http://127.0.0.1:1/b/")
    with pytest.raises(ResourceError, match="cannot download") as caught:
        open_data("cifar10", seed=0)
    assert caught.value.hint is not None
    assert "--data-dir" in caught.value.hint
    assert cached(tmp_path) == []


def test_a_data_folder_is_never_filled_from_the_network(server: str, tmp_path: Path) -> None:
    from motte.errors import InputError

    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not all there"):
        open_data("cifar10", data_dir=tmp_path / "empty", seed=0)
    assert Files.asked == []


def test_the_table_of_published_sets_is_sound() -> None:
    for name, known in published.SETS.items():
        assert known.mirrors
        assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in known.mirrors)
        digests = [file.sha256 for file in known.files] + [f.content_sha256 for f in known.files if f.content_sha256]
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
        assert len(set(digests)) == len(digests)
        assert len(known.classes) == len(set(known.classes)) == (100 if name == "cifar100" else 10)
        assert len(known.mean) == len(known.std) == (3 if name.startswith("cifar") else 1)
