"""The attested channel as a link's stream, with hosts in between that read, alter, cut off, replay and divert."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from motte.attest.certificates import load_der
from motte.attest.ra_tls import EVIDENCE_OID, issue_certificate
from motte.errors import (
    AttestationError,
    EvidenceError,
    FrameError,
    LinkError,
    MotteError,
    PeerClosed,
    PeerStalled,
    ResourceError,
)
from motte.link.attested import attested_client, attested_mutual_server, attested_server
from motte.link.frames import Frame, Kind, WireTensor
from motte.link.local import Link
from motte.link.tls_stream import TlsStream
from motte.seal.primitives import ChannelCipher
from motte.seal.tls import TlsIdentity, TlsKey, attested_server_context, client_context

SECRET = b"the photograph of a patient" * 200
HELLO = b"MOTA\x01"


class Host:
    """Relays between a client and a server, keeps what it saw, and may change what passes; None: it cuts them off."""

    def __init__(self, change: Callable[[str, bytes], bytes | None] | None = None) -> None:
        self.seen = bytearray()
        self._change = change
        client, self._left = socket.socketpair()
        self._right, server = socket.socketpair()
        self.ends = (client, server)
        self._threads = [
            threading.Thread(target=self._relay, args=way, daemon=True)
            for way in ((self._left, self._right, "up"), (self._right, self._left, "down"))
        ]
        for thread in self._threads:
            thread.start()

    def _relay(self, source: socket.socket, target: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                self.seen += data
                passed = data if self._change is None else self._change(way, data)
                if passed is None:
                    break
                target.sendall(passed)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (*self.ends, self._left, self._right):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for sock in (self._left, self._right):
            sock.close()


@pytest.fixture
def relay() -> Iterator[Callable[..., Host]]:
    with contextlib.ExitStack() as stack:

        def made(change: Callable[[str, bytes], bytes | None] | None = None) -> Host:
            host = Host(change)
            stack.callback(host.close)
            return host

        yield made


def echo(stream: TlsStream) -> int:
    """Serve as a worker: answer each frame with its own tensors, until the client goes."""
    link, count = Link(stream, peer="client"), 0
    try:
        while True:
            frame = link.receive(timeout_s=30)
            link.send(Frame(Kind.ERROR, {"echo": frame.meta["text"]}), timeout_s=30)
            count += 1
    except PeerClosed:
        return count


def test_a_link_runs_over_it_and_the_relay_sees_nothing(trusted: Any, meet: Any, relay: Any) -> None:
    host = relay()
    text = SECRET.decode()

    def client(sock: socket.socket) -> tuple[list[str], Any]:
        stream, verdict = attested_client(sock, trusted.demand, clock=trusted.now)
        assert stream.version == "TLSv1.3"
        link = Link(stream, peer="worker")
        answers = []
        for number in range(3):
            link.send(Frame(Kind.HELLO, {"text": f"{number} {text}"}), timeout_s=30)
            answers.append(link.receive(timeout_s=30).meta["echo"])
        link.close()
        return answers, verdict

    met = meet(client, lambda sock: echo(attested_server(sock, trusted.shown, timeout_s=None)), host.ends)
    answers, verdict = met.left
    assert answers == [f"{number} {text}" for number in range(3)]
    assert met.right == 3
    assert verdict.claims.binding.public_key == trusted.public_key
    assert verdict.claims.simulated
    assert len(host.seen) > 6 * len(SECRET)
    assert SECRET[:40] not in host.seen
    assert bytes(host.seen).startswith(HELLO)


def test_sealed_frames_of_any_size_pass_it(trusted: Any, meet: Any) -> None:
    body = bytes(range(256)) * 12_000  # 3 MB: many records, more than any buffer of the socket

    def ciphers() -> dict[str, ChannelCipher]:
        return {name: ChannelCipher(b"k" * 32, b"test") for name in ("sending", "receiving")}

    def client(sock: socket.socket) -> bytes:
        link = Link(attested_client(sock, trusted.demand)[0], peer="worker")
        link.secure(**ciphers())
        link.send(Frame(Kind.RUN, {}, [WireTensor("u8", (len(body),), body)]), timeout_s=60)
        return bytes(link.receive(timeout_s=60).tensors[0].data)

    def server(sock: socket.socket) -> None:
        link = Link(attested_server(sock, trusted.shown), peer="client")
        link.secure(**ciphers())
        frame = link.receive(timeout_s=60)
        link.send(Frame(Kind.ANSWER, {}, frame.tensors), timeout_s=60)

    met = meet(client, server)
    assert met.right is None
    assert met.left == body


# --- the client refuses -----------------------------------------------------------------------------------------------
def stranger(extension: tuple[str, bytes] = ("1.3.5.7", b"-")) -> TlsIdentity:
    """A key that no trusted process holds, and a certificate for it."""
    now, day = datetime.now(UTC), timedelta(days=1)
    return TlsKey.new().certify("motte", extension=extension, begin=now - day, end=now + day)


def _thief(trusted: Any, *, with_evidence: bool) -> Any:
    """A server without an enclave: it has a genuine one's evidence for this client's nonce, and a key of its own."""

    def serve(sock: socket.socket) -> bytes:
        nonce = sock.recv(43)[11:]
        genuine = issue_certificate(trusted.shown, nonce, trusted.now())
        value = load_der(genuine.der(), where="stolen", check="-").extension(EVIDENCE_OID)
        assert value is not None
        own = stranger((EVIDENCE_OID, value) if with_evidence else ("1.3.5.7", value))
        stream = TlsStream(sock, attested_server_context(own), server=True)
        stream.settimeout(30)
        stream.handshake()
        data = memoryview(bytearray(100))
        try:
            return bytes(data[: stream.recv_into(data)])
        except OSError:
            return b""

    return serve


@pytest.mark.parametrize(("with_evidence", "check"), [(True, "X-6"), (False, "X-4")])
def test_nothing_is_sent_to_who_holds_another_key(trusted: Any, meet: Any, with_evidence: bool, check: str) -> None:
    def client(sock: socket.socket) -> None:
        stream, _ = attested_client(sock, trusted.demand)
        stream.sendmsg([SECRET])

    met = meet(client, _thief(trusted, with_evidence=with_evidence))
    assert isinstance(met.left, AttestationError)
    assert met.left.check == check
    assert met.right == b""  # TLS stood, and not a byte of payload came through it


def test_what_the_client_refuses(trusted: Any, meet: Any) -> None:
    def check_of(demand: Any, shown: Any, clock: Any = trusted.now) -> str | None:
        met = meet(
            lambda sock: attested_client(sock, demand, clock=clock), lambda sock: attested_server(sock, shown).version
        )
        assert isinstance(met.left, AttestationError | EvidenceError)
        return met.left.check

    demand, shown = trusted.demand, trusted.shown
    assert check_of(replace(demand, policy=trusted.strict), shown) == "P-1"  # SIMULATED
    assert check_of(demand, trusted.attester(debug=True)) == "P-6"
    assert check_of(demand, trusted.attester(measurement=b"x" * 32)) == "P-3"
    assert check_of(demand, trusted.attester(configuration=b"h" * 32)) == "X-8"
    assert check_of(demand, shown, clock=lambda: trusted.now() + timedelta(days=2)) == "X-3"


def test_a_certificate_of_an_earlier_connection_is_refused(trusted: Any, meet: Any) -> None:
    """A genuine process that answers every nonce with the certificate that it once made."""
    old = issue_certificate(trusted.shown, b"o" * 32, trusted.now())

    def serve(sock: socket.socket) -> None:
        sock.recv(43)
        stream = TlsStream(sock, attested_server_context(old), server=True)
        stream.settimeout(30)
        stream.handshake()

    met = meet(lambda sock: attested_client(sock, trusted.demand), serve)
    assert isinstance(met.left, AttestationError)
    assert met.left.check == "X-7"


def test_a_relay_cannot_change_the_nonce(trusted: Any, meet: Any, relay: Any) -> None:
    host = relay(lambda way, data: data[:20] + b"!" + data[21:] if data.startswith(HELLO) else data)
    met = meet(
        lambda sock: attested_client(sock, trusted.demand), lambda sock: attested_server(sock, trusted.shown), host.ends
    )
    assert isinstance(met.left, AttestationError)
    assert met.left.check == "X-7"


# --- the host in between ----------------------------------------------------------------------------------------------
def test_an_altered_byte_and_a_cut_end_are_errors(trusted: Any, meet: Any, relay: Any) -> None:
    for how in ("alter", "cut"):
        state: dict[str, int] = {}

        def change(way: str, data: bytes, how: str = how, state: dict[str, int] = state) -> bytes | None:
            if way == "down" and state.get("armed"):
                return None if how == "cut" else data[:-1] + bytes([data[-1] ^ 1])
            return data

        host = relay(change)

        def client(sock: socket.socket, state: dict[str, int] = state) -> Any:
            stream, _ = attested_client(sock, trusted.demand)
            link = Link(stream, peer="worker")
            link.send(Frame(Kind.HELLO, {"text": "1"}), timeout_s=30)
            assert link.receive(timeout_s=30).meta["echo"] == "1"
            state["armed"] = 1
            link.send(Frame(Kind.HELLO, {"text": "2"}), timeout_s=30)
            with pytest.raises(PeerClosed, match="broke") as caught:
                link.receive(timeout_s=30)
            # What failed once stays so.
            with pytest.raises(OSError):
                stream.recv_into(memoryview(bytearray(1)))
            link.close()
            return caught.value

        met = meet(client, lambda sock: echo(attested_server(sock, trusted.shown)), host.ends)
        assert isinstance(met.left, PeerClosed)
        assert met.right == 2


def test_farewell_is_an_end_and_silence_a_stall(trusted: Any, meet: Any) -> None:
    def client(sock: socket.socket) -> Any:
        stream, _ = attested_client(sock, trusted.demand)
        stream.settimeout(0.05)
        data = memoryview(bytearray(10))
        with pytest.raises(TimeoutError):
            stream.recv_into(data)
        stream.sendmsg([b"", b"go"])
        stream.settimeout(30)
        found = stream.recv_into(data)  # a time limit while receiving spoils nothing
        assert bytes(data[:found]) == b"ok"
        assert stream.recv_into(data) == 0
        assert stream.recv_into(data[:0]) == 0
        stream.close()
        stream.close()
        with pytest.raises(OSError, match="closed before"):
            stream.sendmsg([b"more"])
        return "done"

    def server(sock: socket.socket) -> Any:
        stream = attested_server(sock, trusted.shown)
        stream.settimeout(30)
        data = memoryview(bytearray(10))
        assert stream.recv_into(data) == 2
        stream.sendmsg([b"ok"])
        stream.close()
        return "done"

    met = meet(client, server)
    assert (met.left, met.right) == ("done", "done")


def _send_much(stream: TlsStream) -> None:
    for _ in range(64):
        stream.sendmsg([bytes(1 << 20)])


def test_a_peer_that_takes_nothing_is_a_stall_and_ends_it(trusted: Any, meet: Any) -> None:
    def client(sock: socket.socket) -> Any:
        stream, _ = attested_client(sock, trusted.demand)
        stream.settimeout(0.2)
        with pytest.raises(TimeoutError):
            _send_much(stream)
        with pytest.raises(OSError, match="failed"):
            stream.sendmsg([b"more"])
        return "done"

    met = meet(client, lambda sock: attested_server(sock, trusted.shown))
    assert met.left == "done"


class NoTimeLimits:
    """As a worker's standard streams are: whoever sets a time limit is wrong."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._socket = sock
        self.close = sock.close

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview], /) -> int:
        return self._socket.sendmsg(buffers)

    def recv_into(self, buffer: memoryview, /) -> int:
        return self._socket.recv_into(buffer, min(len(buffer), 7))  # and only a few bytes at a time

    def settimeout(self, value: float | None, /) -> None:
        if value is not None:
            raise ValueError("no time limits")


def test_over_a_stream_without_time_limits(trusted: Any, meet: Any) -> None:
    def client(sock: socket.socket) -> str:
        link = Link(attested_client(sock, trusted.demand)[0], peer="worker")
        link.send(Frame(Kind.HELLO, {"text": "x"}), timeout_s=30)
        answer = str(link.receive(timeout_s=30).meta["echo"])
        link.close()
        return answer

    def server(sock: socket.socket) -> None:
        stream = attested_server(NoTimeLimits(sock), trusted.shown, timeout_s=None)
        link = Link(stream, peer="client")
        link.send(Frame(Kind.ERROR, {"echo": link.receive().meta["text"]}))
        with pytest.raises(PeerClosed):
            link.receive()
        link.close()

    met = meet(client, server)
    assert met.right is None
    assert met.left == "x"


# --- mutual -----------------------------------------------------------------------------------------------------------
def test_both_sides_prove_themselves(trusted: Any, meet: Any) -> None:
    def client(sock: socket.socket) -> Any:
        stream, verdict = attested_client(sock, trusted.demand, shown=trusted.shown)
        stream.sendmsg([b"to the server"])
        return stream, verdict

    def server(sock: socket.socket) -> Any:
        stream, verdict = attested_mutual_server(sock, trusted.shown, trusted.demand)
        data = memoryview(bytearray(30))
        return bytes(data[: stream.recv_into(data)]), verdict

    met = meet(client, server)
    assert met.right[0] == b"to the server"
    nonces = {result[1].claims.binding.nonce for result in (met.left, met.right)}
    assert len(nonces) == 2  # each its own


def test_what_a_mutual_server_refuses(trusted: Any, meet: Any) -> None:
    def refused(demand: Any, shown: Any, clock: Any = trusted.now) -> tuple[str | None, Any]:
        met = meet(
            lambda sock: attested_client(sock, trusted.demand, shown=shown, clock=clock),
            lambda sock: attested_mutual_server(sock, trusted.shown, demand),
        )
        assert isinstance(met.right, AttestationError | EvidenceError)
        return met.right.check, met.left

    check, other = refused(replace(trusted.demand, policy=trusted.strict), trusted.shown)
    assert check == "P-1"
    assert isinstance(other, LinkError)  # refused before TLS began
    assert refused(trusted.demand, trusted.attester(configuration=b"h" * 32))[0] == "X-8"
    assert refused(trusted.demand, trusted.attester(debug=True))[0] == "P-6"
    assert refused(trusted.demand, trusted.shown, clock=lambda: trusted.now() - timedelta(days=9))[0] == "X-3"


@pytest.mark.parametrize("identity", [stranger(), None], ids=["another", "none"])
def test_a_shown_certificate_without_its_key_completes_no_handshake(
    trusted: Any, meet: Any, identity: TlsIdentity | None
) -> None:
    """A host that shows a genuine process's certificate for the server's nonce, and then has to speak TLS itself."""

    def thief(sock: socket.socket) -> Any:
        sock.sendall(HELLO + b"\x01" + struct.pack(">I", 33) + b"\x01" + b"n" * 32)
        nonce = sock.recv(42)[10:]
        der = issue_certificate(trusted.shown, nonce, trusted.now()).der()
        sock.sendall(HELLO + b"\x03" + struct.pack(">I", len(der)) + der)
        stream = TlsStream(sock, client_context(identity), server=False)
        stream.settimeout(30)
        stream.handshake()
        return stream.recv_into(memoryview(bytearray(10)))

    met = meet(thief, lambda sock: attested_mutual_server(sock, trusted.shown, trusted.demand))
    assert isinstance(met.right, LinkError)
    assert isinstance(met.left, OSError)


def test_nobody_talks_a_mutual_channel_down(trusted: Any, meet: Any) -> None:
    met = meet(
        lambda sock: attested_client(sock, trusted.demand),
        lambda sock: attested_mutual_server(sock, trusted.shown, trusted.demand),
    )
    assert isinstance(met.right, FrameError)
    assert "evidence of the client too" in str(met.right)
    met = meet(
        lambda sock: attested_client(sock, trusted.demand, shown=trusted.shown),
        lambda sock: attested_server(sock, trusted.shown),
    )
    assert isinstance(met.right, FrameError)


# --- frames before TLS ------------------------------------------------------------------------------------------------
ASK = HELLO + b"\x01" + struct.pack(">I", 33)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", FrameError),
        (b"MOTA\x02" + ASK[5:] + bytes(33), FrameError),
        (HELLO + b"\x03" + struct.pack(">I", 33) + bytes(33), FrameError),
        (HELLO + b"\x01" + struct.pack(">I", 34) + bytes(34), FrameError),
        (HELLO + b"\x01" + struct.pack(">I", 0xFFFFFFFF), FrameError),
        (ASK + b"\x02" + bytes(32), FrameError),
        (ASK + bytes(10), PeerClosed),
        (b"", PeerClosed),
        (ASK + bytes(33) + b"no TLS at all, and long enough to be told from it", LinkError),
        (ASK + bytes(33), LinkError),
    ],
    ids=["http", "version", "step", "size", "huge", "flag", "cut", "nothing", "no tls", "end"],
)
def test_what_is_no_channel(trusted: Any, meet: Any, data: bytes, kind: type[MotteError]) -> None:
    def client(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    met = meet(client, lambda sock: attested_server(sock, trusted.shown))
    assert type(met.right) is kind, met.right


def test_who_does_not_answer_and_who_cannot_prove_anything(trusted: Any, meet: Any) -> None:
    met = meet(lambda sock: attested_client(sock, trusted.demand, timeout_s=0.1), lambda sock: sock.recv(43))
    assert isinstance(met.left, PeerStalled)
    met = meet(lambda sock: None, lambda sock: attested_server(sock, trusted.shown, timeout_s=0.1))
    assert isinstance(met.right, PeerStalled)

    def none(report_data: bytes) -> Any:
        raise ResourceError("no SGX quote from Gramine")

    met = meet(
        lambda sock: attested_client(sock, trusted.demand),
        lambda sock: attested_server(sock, replace(trusted.shown, issue=none)),
    )
    assert isinstance(met.right, ResourceError)
    assert isinstance(met.left, LinkError)


def test_a_worker_that_opens_no_channel_loads_no_second_openssl() -> None:
    script = "import sys, motte.link.attested; print(sorted({'ssl', '_ssl', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
