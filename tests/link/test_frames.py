"""Frames: what is sent is what arrives, and nothing malformed gets further than the reader."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.errors import DecryptError, FrameError, MotteError, PeerClosed, PeerStalled
from motte.limits import MAX_FRAME_BYTES
from motte.link.frames import (
    HEADER,
    MAGIC,
    Frame,
    FrameHeader,
    Kind,
    WireTensor,
    decode_header,
    decode_payload,
    encode_payload,
)
from motte.link.local import Link
from motte.provision.grant import GRANT_BYTES, SessionKeys, make_grant, open_grant
from motte.seal.primitives import hpke_seal, new_x25519
from motte.seal.reader import KeyEncryptionKey
from motte.strict_json import canonical

OPEN: list[socket.socket] = []


def sockets() -> tuple[socket.socket, socket.socket]:
    OPEN.extend(socket.socketpair())
    return OPEN[-2], OPEN[-1]


@pytest.fixture(autouse=True, scope="module")
def _close_all():
    yield
    for each in OPEN:
        each.close()


def pair(**options):
    a, b = sockets()
    return Link(a, peer="a", **options), Link(b, peer="b")


def secured():
    a, b = pair()
    keys = SessionKeys(b"1" * 32, b"2" * 32)
    sending, receiving = keys.client_ciphers()
    a.secure(sending=sending, receiving=receiving, clear_error_first=True)
    sending, receiving = keys.worker_ciphers()
    b.secure(sending=sending, receiving=receiving)
    return a, b


def test_round_trip_sealed() -> None:
    a, b = secured()
    tensors = (
        WireTensor("f32", (2, 3), bytes(range(24))),
        WireTensor("i64", (0, 4), b""),
        WireTensor("bool", (), b"\1"),
    )
    a.send(Frame(Kind.RUN, {"n": 1}, tensors))
    got = b.receive(timeout_s=5)
    assert got.kind is Kind.RUN
    assert got.meta == {"n": 1}
    assert [(t.dtype, t.shape, bytes(t.data)) for t in got.tensors] == [(t.dtype, t.shape, t.data) for t in tensors]


def test_sealed_frames_hold_no_plaintext() -> None:
    seen: list[bytes] = []
    a, b = sockets()
    link, other = Link(a, peer="a", recorder=lambda _, data: seen.append(data)), Link(b, peer="b")
    keys = SessionKeys(b"1" * 32, b"2" * 32)
    link.secure(sending=keys.client_ciphers()[0], receiving=keys.client_ciphers()[1])
    other.secure(sending=keys.worker_ciphers()[0], receiving=keys.worker_ciphers()[1])
    canary = b"canary-of-an-activation-0123456789"
    link.send(Frame(Kind.RUN, {"canary": canary.decode()}, [WireTensor("u8", (len(canary),), canary)]))
    assert bytes(other.receive(timeout_s=5).tensors[0].data) == canary
    assert len(seen) == 1
    assert canary not in seen[0]


def test_a_tensor_in_clear_is_refused() -> None:
    a, b = pair()
    a.send(Frame(Kind.RUN, {}, [WireTensor("u8", (1,), b"x")]))
    with pytest.raises(FrameError, match="must be sealed"):
        b.receive(timeout_s=5)


def test_clear_frame_after_keys_is_refused_but_one_error_is_allowed() -> None:
    a, b = sockets()
    raw = Link(b, peer="host")
    client = Link(a, peer="worker")
    sending, receiving = SessionKeys(b"1" * 32, b"2" * 32).client_ciphers()
    client.secure(sending=sending, receiving=receiving, clear_error_first=True)
    raw.send(Frame(Kind.ERROR, {"why": "no such bundle"}))
    assert client.receive(timeout_s=5).kind is Kind.ERROR
    raw.send(Frame(Kind.HELLO))
    with pytest.raises(FrameError, match="wrong state"):
        client.receive(timeout_s=5)


def test_clear_error_after_a_sealed_frame_is_refused() -> None:
    a, b = secured()
    b.send(Frame(Kind.READY, {}))
    assert a.receive(timeout_s=5).kind is Kind.READY
    forged = canonical({"fields": {}, "tensors": []})
    b._socket.sendall(FrameHeader(Kind.ERROR, False, 1, len(forged), 0).encode() + forged)
    with pytest.raises(FrameError, match="wrong state"):
        a.receive(timeout_s=5)


@pytest.mark.parametrize("flip", [0, 5, 12, 20, 27, 28, 40, -1])
def test_any_flipped_bit_of_a_sealed_frame_is_refused(flip: int) -> None:
    captured: list[bytes] = []
    a, b = sockets()
    keys = SessionKeys(b"1" * 32, b"2" * 32)
    sender = Link(a, peer="a", recorder=lambda _, data: captured.append(data))
    sender.secure(sending=keys.client_ciphers()[0], receiving=keys.client_ciphers()[1])
    sender.send(Frame(Kind.RUN, {}, [WireTensor("u8", (64,), bytes(64))]))
    altered = bytearray(captured[0])
    altered[flip] ^= 1
    c, d = sockets()
    c.sendall(altered)
    c.close()
    receiver = Link(d, peer="d")
    receiver.secure(sending=keys.worker_ciphers()[0], receiving=keys.worker_ciphers()[1])
    with pytest.raises((FrameError, PeerClosed)):
        receiver.receive(timeout_s=5)
    b.close()


def test_replayed_frame_is_refused() -> None:
    seen: list[bytes] = []
    a, b = sockets()
    keys = SessionKeys(b"1" * 32, b"2" * 32)
    sender = Link(a, peer="a", recorder=lambda _, data: seen.append(data))
    sender.secure(sending=keys.client_ciphers()[0], receiving=keys.client_ciphers()[1])
    receiver = Link(b, peer="b")
    receiver.secure(sending=keys.worker_ciphers()[0], receiving=keys.worker_ciphers()[1])
    sender.send(Frame(Kind.RUN))
    receiver.receive(timeout_s=5)
    a.sendall(seen[0])
    with pytest.raises(FrameError, match="out of sequence"):
        receiver.receive(timeout_s=5)
    # The host renumbers the copy: the header is authenticated, and the nonce has moved on.
    c, d = sockets()
    again = Link(d, peer="d")
    again.secure(sending=keys.worker_ciphers()[0], receiving=SessionKeys(b"1" * 32, b"2" * 32).worker_ciphers()[1])
    renumbered = bytearray(seen[0])
    renumbered[15] = 1
    c.sendall(seen[0] + renumbered)
    again.receive(timeout_s=5)
    with pytest.raises(FrameError, match="not authentic"):
        again.receive(timeout_s=5)


def test_silence_is_a_stall_and_a_closed_socket_is_an_end() -> None:
    a, b = pair()
    with pytest.raises(PeerStalled):
        a.receive(timeout_s=0.05)
    b.close()
    with pytest.raises(PeerClosed):
        a.receive(timeout_s=5)
    with pytest.raises(PeerClosed):
        a.send(Frame(Kind.STATS, {"x": "y" * 100}))


def test_a_peer_that_reads_nothing_stalls_the_sender() -> None:
    a, b = secured()
    big = WireTensor("u8", (1 << 24,), bytes(1 << 24))
    with pytest.raises(PeerStalled):
        a.send(Frame(Kind.RUN, {}, [big]), timeout_s=0.2)
    b.close()


def test_a_frame_cut_short_is_an_end() -> None:
    a, b = sockets()
    meta = canonical({"fields": {}, "tensors": []})
    a.sendall(FrameHeader(Kind.HELLO, False, 0, len(meta), 0).encode() + meta[:3])
    a.close()
    with pytest.raises(PeerClosed):
        Link(b, peer="b").receive(timeout_s=5)


def test_a_promise_of_a_gigabyte_allocates_nothing() -> None:
    a, b = sockets()
    a.sendall(FrameHeader(Kind.RUN, True, 0, 0, MAX_FRAME_BYTES).encode())
    a.close()
    link = Link(b, peer="b")
    keys = SessionKeys(b"1" * 32, b"2" * 32)
    link.secure(sending=keys.worker_ciphers()[0], receiving=keys.worker_ciphers()[1])
    with pytest.raises(PeerClosed):
        link.receive(timeout_s=5)


def test_large_frames_cross_while_the_other_side_reads() -> None:
    a, b = secured()
    data = bytes(range(256)) * (1 << 14)
    sender = threading.Thread(target=a.send, args=(Frame(Kind.RUN, {}, [WireTensor("u8", (len(data),), data)]),))
    sender.start()
    got = b.receive(timeout_s=30)
    sender.join()
    assert bytes(got.tensors[0].data) == data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (HEADER.pack(b"MOTX", 1, 1, 0, 0, 0, 0), "not a frame"),
        (HEADER.pack(MAGIC, 2, 1, 0, 0, 0, 0), "not a frame"),
        (HEADER.pack(MAGIC, 1, 99, 0, 0, 0, 0), "unknown kind"),
        (HEADER.pack(MAGIC, 1, 1, 2, 0, 0, 0), "unknown flags"),
        (HEADER.pack(MAGIC, 1, 1, 0, 0, 1 << 31, 0), "too large"),
        (HEADER.pack(MAGIC, 1, 5, 1, 0, 0, 1 << 40), "too large"),
        (HEADER.pack(MAGIC, 1, 1, 0, 0, 2, 5), "must be sealed"),
    ],
)
def test_bad_headers(raw: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode_header(raw, peer="test")


@pytest.mark.parametrize(
    ("types", "body", "message"),
    [
        ([{"dtype": "f99", "shape": [1]}], b"1234", "unknown value"),
        ([{"dtype": "f32", "shape": [-1]}], b"", "not an extent"),
        ([{"dtype": "f32", "shape": [1], "stride": [1]}], b"1234", "unknown field"),
        ([{"dtype": "f32", "shape": [2]}], b"1234", "longer than the body"),
        ([{"dtype": "u8", "shape": [1]}], b"1234", "longer than its tensors"),
        ([{"dtype": "u8", "shape": [1] * 17}], b"1", "not a list in bounds"),
        ([{"dtype": "u8", "shape": [True]}], b"1", "not an extent"),
    ],
)
def test_bad_tensor_types(types: list[object], body: bytes, message: str) -> None:
    header = FrameHeader(Kind.RUN, True, 0, 0, len(body))
    with pytest.raises(FrameError, match=message):
        decode_payload(header, canonical({"fields": {}, "tensors": types}), memoryview(body), peer="test")


def test_tensor_of_wrong_length_is_not_sent() -> None:
    with pytest.raises(FrameError, match="do not match"):
        encode_payload(Frame(Kind.RUN, {}, [WireTensor("f32", (2,), b"1234")]))


def refuse(data: bytes) -> None:
    a, b = socket.socketpair()
    with a, b:
        a.sendall(data)
        a.shutdown(socket.SHUT_WR)
        with pytest.raises(MotteError):
            Link(b, peer="noise").receive(timeout_s=5)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_never_crashes_the_reader(noise: bytes) -> None:
    refuse(noise)


@given(st.integers(0, 255), st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_noise_behind_a_good_header_never_crashes_the_reader(kind: int, payload: bytes) -> None:
    raw = struct.pack(">4sBBHQIQ", MAGIC, 1, kind, 0, 0, len(payload), 0)
    refuse(raw + payload)


def test_grant_opens_only_for_its_worker_bundle_and_release() -> None:
    private, public = new_x25519()
    bundle = bytes(range(16))
    kek = KeyEncryptionKey.from_bytes(bundle + (3).to_bytes(8, "big") + b"k" * 32)
    sealed, keys = make_grant(kek, public, bundle_id=bundle, release=3)
    opened, session = open_grant(sealed, private, bundle_id=bundle, release=3)
    assert len(sealed) == GRANT_BYTES
    assert opened.to_bytes() == kek.to_bytes()
    assert (session.to_worker, session.to_client) == (keys.to_worker, keys.to_client)
    assert b"k" * 8 not in sealed
    for other in ({"bundle_id": bytes(16), "release": 3}, {"bundle_id": bundle, "release": 4}):
        with pytest.raises(DecryptError):
            open_grant(sealed, private, **other)
    with pytest.raises(DecryptError):
        open_grant(sealed, new_x25519()[0], bundle_id=bundle, release=3)
    short = hpke_seal(public, keys.to_worker + keys.to_client, info=b"motte grant 1" + bundle + (3).to_bytes(8, "big"))
    with pytest.raises(MotteError):
        open_grant(short, private, bundle_id=bundle, release=3)


def test_session_keys_are_not_printed() -> None:
    assert "111" not in repr(SessionKeys(b"1" * 32, b"2" * 32))
