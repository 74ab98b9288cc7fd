"""Who gets in: TLS with pins, tokens, certificates of clients, and what is never served in the clear."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from motte.accelerator.calculator import Calculator
from motte.accelerator.connect import connect
from motte.accelerator.listen import Listener, ListenSettings, read_token
from motte.errors import InputError, PeerClosed, PeerRefused, ResourceError, SignatureError
from motte.linear.operation import LinearOperation
from motte.link.address import TcpAddress, UnixAddress
from motte.link.recording import Recording
from motte.seal.tls import TlsIdentity

LOCAL = TcpAddress("127.0.0.1", 0)
LINEAR = LinearOperation("linear", 5, 3)
BIG = LinearOperation("linear", 64, 64)


def works(client: Any, operation: LinearOperation = LINEAR, rows: int = 2) -> bool:
    with client:
        client.register("layer", operation)
        weight = torch.ones(operation.weight_shape)
        client.put_weight("layer", weight)
        x = torch.ones(rows, operation.in_channels)
        return torch.equal(client.forward("layer", x, step=1, hold=False).result(), x @ weight.t())


@pytest.fixture
def listen() -> Iterator[Callable[..., str]]:
    """``listen(address=..., ...)`` serves in a thread and gives the address to connect to."""
    started: list[tuple[Listener, threading.Thread]] = []

    def start(**options: Any) -> str:
        listener = Listener(ListenSettings(**{"region_bytes": 1 << 20, **options}), Calculator)
        found: list[str] = []
        up = threading.Event()
        problem: list[BaseException] = []

        def run() -> None:
            try:
                listener.run(on_listening=lambda where: (found.append(str(where)), up.set()))
            except BaseException as raised:
                problem.append(raised)
                up.set()

        thread = threading.Thread(target=run)
        thread.start()
        assert up.wait(30)
        if problem:
            thread.join()
            raise problem[0]
        started.append((listener, thread))
        return found[0]

    yield start
    for listener, thread in started:
        listener.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


# --- TLS -------------------------------------------------------------------------------------------------------------
def test_the_pinned_server_is_reached(listen: Any) -> None:
    identity = TlsIdentity.new("server")
    address = listen(address=LOCAL, identity=identity)
    assert works(connect(address, pin=identity.pin))


def test_another_server_than_the_pinned_one_is_refused_before_anything_is_sent(listen: Any) -> None:
    recording = Recording()
    address = listen(address=LOCAL, identity=TlsIdentity.new("server"), token="t" * 20)
    with pytest.raises(SignatureError, match="another key than the pinned one"):
        connect(address, pin=TlsIdentity.new("server").pin, token="t" * 20, recorder=recording)
    assert recording.frames == []


def test_a_renewed_certificate_of_the_same_key_keeps_its_pin() -> None:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    identity = TlsIdentity.new("server")
    key = serialization.load_pem_private_key(identity.key, None)
    old = x509.load_pem_x509_certificate(identity.certificate)
    now = datetime.datetime.now(datetime.UTC)
    renewed = (
        x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), 7, now, now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    assert TlsIdentity(renewed, identity.key).pin == identity.pin


def test_only_holders_of_a_known_certificate_get_in(listen: Any) -> None:
    server, known, stranger = (TlsIdentity.new(name) for name in ("server", "known", "stranger"))
    address = listen(address=LOCAL, identity=server, clients=(known.certificate,))
    assert works(connect(address, pin=server.pin, identity=known))
    with pytest.raises(PeerClosed):
        connect(address, pin=server.pin, identity=stranger, retries=0)
    with pytest.raises(PeerClosed):
        connect(address, pin=server.pin, retries=0)


def test_a_client_of_a_plaintext_server_that_expects_tls_fails_at_once(listen: Any) -> None:
    address = listen(address=LOCAL)
    with pytest.raises(PeerClosed, match="TLS handshake failed"):
        connect(address, pin=TlsIdentity.new("x").pin, retries=0)


# --- tokens ----------------------------------------------------------------------------------------------------------
def test_only_who_knows_the_token_gets_in(listen: Any) -> None:
    token = "a token of some length"
    address = listen(address=LOCAL, token=token)
    assert works(connect(address, token=token))
    for wrong in ("another token of some length", token[:-1], None):
        with pytest.raises(PeerRefused) as found:
            connect(address, token=wrong)
        assert "token is missing or wrong" in str(found.value.got)


def test_a_token_is_in_no_recording_and_every_byte_is_counted_all_the_same(listen: Any) -> None:
    token, recording = 'a token with "quotes" in it', Recording()
    with connect(listen(address=LOCAL, token=token), token=token, recorder=recording) as client:
        hello = recording.frames[0]
        assert b"quotes" not in hello.head
        assert b"****" in hello.head
        assert client.link_bytes().stream_sent == hello.stream_bytes


def test_token_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  0123456789abcdef\n")
    path.chmod(0o600)
    assert read_token(path) == "0123456789abcdef"
    path.chmod(0o640)
    with pytest.raises(InputError, match="others can read"):
        read_token(path)
    path.chmod(0o600)
    for content in ("short", "x" * 5000, "ÿ" * 20):
        path.write_text(content)
        with pytest.raises(InputError):
            read_token(path)
    with pytest.raises(InputError):
        read_token(tmp_path / "none")


# --- what is never done ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "2001:db8::1"])
def test_beyond_loopback_nothing_is_served_in_the_clear_or_to_strangers(host: str) -> None:
    address = TcpAddress(host, 0)
    with pytest.raises(InputError, match="over TLS only"):
        ListenSettings(address=address, token="0123456789abcdef")
    with pytest.raises(InputError, match="only known clients"):
        ListenSettings(address=address, identity=TlsIdentity.new("x"))
    ListenSettings(address=address, identity=TlsIdentity.new("x"), token="0123456789abcdef")


@pytest.mark.parametrize("address", ["tcp:192.0.2.1:9000", "tcp:[2001:db8::1]:9000", "tcp:0.0.0.0:9000"])
def test_nothing_leaves_this_machine_in_the_clear(address: str) -> None:
    with pytest.raises(InputError, match="over TLS only") as found:
        connect(address)
    assert "pin" in str(found.value.hint)


@pytest.mark.parametrize("pin", ["", "sha256:", "sha256:zz", "md5:" + "0" * 64, "sha256:" + "0" * 63, "0" * 64])
def test_a_pin_that_is_none_is_refused(pin: str) -> None:
    with pytest.raises(InputError, match="not a pin"):
        connect("tcp:127.0.0.1:1", pin=pin)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    unix = UnixAddress(tmp_path / "a.sock")
    with pytest.raises(InputError):
        ListenSettings(address=unix, identity=TlsIdentity.new("x"))
    with pytest.raises(InputError):
        ListenSettings(address=LOCAL, clients=(TlsIdentity.new("x").certificate,))
    with pytest.raises(InputError):
        ListenSettings(address=LOCAL, token="short")
    with pytest.raises(InputError):
        connect(f"unix:{tmp_path}/a.sock", pin="sha256:" + "0" * 64)


def test_key_files_are_checked(tmp_path: Path) -> None:
    identity = TlsIdentity.new("x")
    identity.save(tmp_path / "x.crt", tmp_path / "x.key")
    assert stat.S_IMODE(os.stat(tmp_path / "x.key").st_mode) == 0o600
    assert TlsIdentity.load(tmp_path / "x.crt", tmp_path / "x.key") == identity
    assert "PRIVATE" not in repr(identity)
    with pytest.raises(InputError, match="exists already"):
        identity.save(tmp_path / "x.crt", tmp_path / "y.key")
    (tmp_path / "x.key").chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        TlsIdentity.load(tmp_path / "x.crt", tmp_path / "x.key")
    with pytest.raises(InputError, match="not a certificate"):
        TlsIdentity(b"nothing", b"").pin  # noqa: B018


# --- sockets in the file system --------------------------------------------------------------------------------------
def test_the_socket_is_its_owners_alone_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listener = Listener(ListenSettings(address=UnixAddress(path), region_bytes=1 << 20), Calculator)
    modes: list[int] = []

    def listening(where: object) -> None:
        modes.append(stat.S_IMODE(os.stat(path).st_mode))
        listener.stop()

    listener.run(on_listening=listening)
    assert modes == [0o600]
    assert not path.exists()


def test_the_file_of_a_dead_listener_is_replaced_and_everything_else_is_not(tmp_path: Path, listen: Any) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    address = listen(address=UnixAddress(path))
    assert works(connect(address))
    with pytest.raises(InputError, match="something else is there"):
        listen(address=UnixAddress(path))
    assert works(connect(address))
    (tmp_path / "b.sock").write_text("a file")
    with pytest.raises(InputError, match="something else is there"):
        listen(address=UnixAddress(tmp_path / "b.sock"))
    assert (tmp_path / "b.sock").read_text() == "a file"


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeerClosed, match="no accelerator there") as found:
        connect(f"unix:{tmp_path}/none.sock", timeout_s=60)
    assert "motte accelerator serve" in str(found.value.hint)


def test_clients_come_together_and_one_after_the_other(tmp_path: Path, listen: Any) -> None:
    address = listen(address=UnixAddress(tmp_path / "a.sock"))
    together = [connect(address) for _ in range(3)]
    assert all(works(client) for client in together)
    assert works(connect(address))


def test_a_stranger_who_says_nothing_keeps_nobody_out(tmp_path: Path, listen: Any) -> None:
    address = listen(address=UnixAddress(tmp_path / "a.sock"))
    with socket.socket(socket.AF_UNIX) as mute, socket.socket(socket.AF_UNIX) as noisy:
        mute.connect(address.removeprefix("unix:"))
        noisy.connect(address.removeprefix("unix:"))
        noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        assert works(connect(address))


def test_a_listener_that_comes_back_is_found_again(tmp_path: Path, listen: Any) -> None:
    path = tmp_path / "a.sock"

    def run(listener: Listener) -> threading.Thread:
        up = threading.Event()
        thread = threading.Thread(target=listener.run, kwargs={"on_listening": lambda where: up.set()})
        thread.start()
        assert up.wait(30)
        return thread

    settings = ListenSettings(address=UnixAddress(path), region_bytes=1 << 20)
    first, second = Listener(settings, Calculator), Listener(settings, Calculator)
    thread = run(first)
    client = connect(f"unix:{path}", timeout_s=30, retries=1)
    client.register("layer", LINEAR)
    client.put_weight("layer", torch.ones(LINEAR.weight_shape))
    x = torch.ones(2, 5)
    y = client.forward("layer", x, step=1, hold=False).result()
    first.stop()
    thread.join(timeout=30)
    starter = threading.Timer(0.1, lambda: threads.append(run(second)))
    threads: list[threading.Thread] = []
    starter.start()
    assert torch.equal(client.forward("layer", x, step=2, hold=False).result(), y)
    client.close()
    starter.join()
    second.stop()
    threads[0].join(timeout=30)


# --- for a process that can be passed no descriptor ------------------------------------------------------------------
def test_shared_memory_by_path(tmp_path: Path, listen: Any) -> None:
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(1 << 20))
    address = listen(address=LOCAL, region_path=shared)
    client = connect(address, shared_memory=str(shared))
    assert client.greeting.shared_memory == "path"
    other = connect(address, shared_memory=str(shared))
    assert other.greeting.shared_memory == "none", "one region serves one client at a time"
    assert works(other, BIG, 128)
    client.register("layer", BIG)
    client.put_weight("layer", torch.ones(BIG.weight_shape))
    x = torch.ones(128, 64)
    assert torch.equal(client.forward("layer", x, step=1, hold=False).result(), x * 64)
    assert client.link_bytes().region_sent == x.nbytes
    client.close()
    for _ in range(200):
        with connect(address, shared_memory=str(shared)) as again:
            if again.greeting.shared_memory == "path":
                break
        time.sleep(0.05)
    else:
        pytest.fail("the region was not freed")


def test_an_absent_or_too_small_file_of_shared_memory_is_refused(tmp_path: Path, listen: Any) -> None:
    with pytest.raises(ResourceError, match="cannot open shared memory"):
        listen(address=LOCAL, region_path=tmp_path / "none")
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(bytes(1 << 20))
    small.write_bytes(bytes(1 << 12))
    address = listen(address=LOCAL, region_path=big)
    with pytest.raises(ResourceError, match="too small"):
        connect(address, shared_memory=str(small))


def test_an_inherited_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    from motte.link.address import DescriptorAddress

    listener = Listener(ListenSettings(address=DescriptorAddress(theirs.detach()), region_bytes=1 << 20), Calculator)
    thread = threading.Thread(target=listener.run)
    thread.start()
    assert works(connect(f"fd:{ours.detach()}"))
    thread.join(timeout=30)
    assert not thread.is_alive()
    with (tmp_path / "file").open("w") as file, pytest.raises(InputError, match="not an open socket"):
        connect(f"fd:{file.fileno()}")
