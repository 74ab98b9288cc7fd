"""primitives: known answers of other implementations, domains that do not mix, and strict channels."""

from __future__ import annotations

import ast
import hashlib
import hmac
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

import motte
from motte.errors import DecryptError, InputError, SignatureError
from motte.seal import primitives

PACKAGE = Path(motte.__file__).parent


def test_only_these_files_import_cryptography() -> None:
    users = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "cryptography" for name in names):
                users.add(path.relative_to(PACKAGE).as_posix())
    assert users == {"digests.py", "seal/primitives.py", "seal/keystream.py", "seal/tls.py", "attest/certificates.py"}


# --- small order --------------------------------------------------------------------------------------------------

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def decoded(encoding: bytes) -> tuple[int, int] | None:
    """A point of Edwards25519, the slow obvious way (RFC 8032, 5.1.3, taking y modulo p)."""
    y = int.from_bytes(encoding[:-1] + bytes([encoding[-1] & 0x7F]), "little") % P
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (x, y) if x * x % P == square else None


def doubled(point: tuple[int, int]) -> tuple[int, int]:
    x, y = point
    t = D * x * x * y * y % P
    return 2 * x * y * pow(1 + t, -1, P) % P, (y * y + x * x) * pow(1 - t, -1, P) % P


def small_order(encoding: bytes) -> bool:
    point = decoded(encoding)
    return point is not None and doubled(doubled(doubled(point))) == (0, 1)


def test_every_point_of_small_order_is_refused() -> None:
    found = {bytes.fromhex(y) for y in SMALL_ORDER}
    for y in found:
        for sign in (0, 0x80):
            encoding = y[:-1] + bytes([y[-1] | sign])
            assert small_order(encoding)
            assert not primitives.ed25519_usable(encoding)
    # Eight points have five y-coordinates; two of those have a second encoding below 2^255.
    assert len(found) == 7
    assert len({decoded(y)[1] for y in found if decoded(y) is not None}) == 5  # type: ignore[index]


SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


def test_why_small_order_is_refused() -> None:
    """OpenSSL accepts, under the neutral element, a signature that nobody needed a key for."""
    neutral = b"\x01" + bytes(31)
    Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"anything")
    with pytest.raises(SignatureError):
        primitives.verify_header(neutral, neutral + bytes(32), b"anything")


def test_keys_of_people_are_usable() -> None:
    for _ in range(20):
        assert primitives.ed25519_usable(primitives.new_ed25519()[1])
        assert primitives.x25519_usable(primitives.new_x25519()[1])
    for raw in (bytes(32), b"\x01" + bytes(31)):
        assert not primitives.x25519_usable(raw)
        with pytest.raises(InputError):
            primitives.hpke_seal(raw, b"secret", info=b"")


# --- known answers and the slow obvious way -----------------------------------------------------------------------


def test_ed25519_known_answer() -> None:
    """RFC 8032, 7.1, test 1."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert primitives.ed25519_public(seed).hex() == public


def extract(salt: bytes, key: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), key, hashlib.sha256)


def expand(key: bytes, info: bytes, length: int) -> bytes:
    assert length <= 32
    return hmac.digest(key, info + b"\x01", hashlib.sha256)[:length]


def slow_hpke_open(private: bytes, sealed: bytes, info: bytes) -> bytes:
    """RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, step by step (4.1, 5.1, 6.1)."""
    enc, ciphertext = sealed[:32], sealed[32:]
    kem = b"KEM" + (0x20).to_bytes(2, "big")
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x20, 1, 2))

    def labeled_extract(of: bytes, salt: bytes, label: bytes, key: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + of + label + key)

    def labeled_expand(of: bytes, key: bytes, label: bytes, context: bytes, length: int) -> bytes:
        return expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + of + label + context, length)

    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(enc))
    kem_context = enc + primitives.x25519_public(private)
    prk = labeled_extract(kem, b"", b"eae_prk", shared)
    shared_secret = labeled_expand(kem, prk, b"shared_secret", kem_context, 32)
    context = (
        b"\x00" + labeled_extract(suite, b"", b"psk_id_hash", b"") + labeled_extract(suite, b"", b"info_hash", info)
    )
    secret = labeled_extract(suite, shared_secret, b"secret", b"")
    key = labeled_expand(suite, secret, b"key", context, 32)
    nonce = labeled_expand(suite, secret, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")


@settings(deadline=None, max_examples=50)
@given(plaintext=st.binary(max_size=100), info=st.binary(max_size=60))
def test_hpke_agrees_with_rfc_9180_written_out(plaintext: bytes, info: bytes) -> None:
    private, public = primitives.new_x25519()
    sealed = primitives.hpke_seal(public, plaintext, info=info)
    assert len(sealed) == len(plaintext) + primitives.HPKE_EXTRA_BYTES
    assert slow_hpke_open(private, sealed, b"motte-hpke-1\x00" + info) == plaintext
    assert primitives.hpke_open(private, sealed, info=info) == plaintext


@settings(deadline=None, max_examples=50)
@given(flip=st.integers(0, 8 * 80 - 1))
def test_hpke_refuses_what_was_altered(flip: int) -> None:
    private, public = primitives.new_x25519()
    sealed = bytearray(primitives.hpke_seal(public, bytes(32), info=b"here"))
    sealed[flip // 8] ^= 1 << flip % 8
    # X25519 ignores the top bit of a public key (RFC 7748, 5), but HPKE hashes the encapsulated key as it was sent.
    with pytest.raises(DecryptError):
        primitives.hpke_open(private, bytes(sealed), info=b"here")


def test_hpke_is_bound_to_recipient_and_context() -> None:
    private, public = primitives.new_x25519()
    sealed = primitives.hpke_seal(public, b"key", info=b"here")
    for key, info, data in (
        (primitives.new_x25519()[0], b"here", sealed),
        (private, b"there", sealed),
        (private, b"", sealed),
        (private, b"here", sealed[:-1]),
        (private, b"here", sealed[:40]),
        (private, b"here", b""),
    ):
        with pytest.raises(DecryptError):
            primitives.hpke_open(key, data, info=info)


def test_signature_is_bound_to_key_domain_and_bytes() -> None:
    private, public = primitives.new_ed25519()
    signature = primitives.sign_header(private, b"front")
    primitives.verify_header(public, signature, b"front")
    for key, sig, data in (
        (primitives.new_ed25519()[1], signature, b"front"),
        (public, signature, b"fronT"),
        (public, signature[:-1], b"front"),
        (public, b"", b"front"),
        (public, bytes(64), b"front"),
        (b"", signature, b"front"),
    ):
        with pytest.raises(SignatureError):
            primitives.verify_header(key, sig, data)


def test_wrapped_keys_are_bound_to_their_place() -> None:
    kek, key, bundle_id = os.urandom(32), os.urandom(32), os.urandom(16)
    wrapped = primitives.wrap_data_key(kek, key, bundle_id=bundle_id, release=3, section=2)
    assert len(wrapped) == primitives.WRAPPED_KEY_BYTES
    assert primitives.unwrap_data_key(kek, wrapped, bundle_id=bundle_id, release=3, section=2) == key
    assert wrapped != primitives.wrap_data_key(kek, key, bundle_id=bundle_id, release=3, section=2)
    for other in (
        {"bundle_id": bytes(16), "release": 3, "section": 2},
        {"bundle_id": bundle_id, "release": 4, "section": 2},
        {"bundle_id": bundle_id, "release": 3, "section": 1},
    ):
        with pytest.raises(DecryptError):
            primitives.unwrap_data_key(kek, wrapped, **other)  # type: ignore[arg-type]


def test_a_refused_chunk_leaves_zeros() -> None:
    cipher = primitives.SectionCipher(os.urandom(32), bundle_id=bytes(16), section=1)
    sealed = bytearray(116)
    cipher.seal(0, True, memoryview(b"p" * 100), memoryview(sealed))
    into = bytearray(b"\xee" * 100)
    sealed[-1] ^= 1
    with pytest.raises(DecryptError):
        cipher.open(0, True, memoryview(sealed), memoryview(into))
    assert into == bytes(100)


# --- channels -----------------------------------------------------------------------------------------------------


def channel(direction: bytes = b"to worker") -> tuple[primitives.ChannelCipher, primitives.ChannelCipher]:
    key = os.urandom(32)
    return primitives.ChannelCipher(key, direction), primitives.ChannelCipher(key, direction)


def test_channel_carries_messages_in_order() -> None:
    sender, receiver = channel()
    for number in range(5):
        message = os.urandom(number * 100)
        assert receiver.open(sender.seal(message, b"head"), b"head") == message


@pytest.mark.parametrize("attack", ["replay", "skip", "swap", "alter", "other aad", "reflect", "cut", "empty"])
def test_channel_refuses_and_then_refuses_everything(attack: str) -> None:
    key = os.urandom(32)
    sender, receiver = primitives.ChannelCipher(key, b"a"), primitives.ChannelCipher(key, b"a")
    first, second = sender.seal(b"first", b""), sender.seal(b"second", b"")
    reflected = primitives.ChannelCipher(key, b"b").seal(b"first", b"")
    if attack == "replay":
        assert receiver.open(first, b"") == b"first"
    bad = {
        "replay": first,
        "skip": second,
        "swap": second,
        "alter": first[:-1] + bytes([first[-1] ^ 1]),
        "other aad": first,
        "reflect": reflected,
        "cut": first[:-1],
        "empty": b"",
    }[attack]
    with pytest.raises(DecryptError):
        receiver.open(bad, b"other" if attack == "other aad" else b"")
    good = second if attack == "replay" else first
    with pytest.raises(DecryptError, match="used up, or broken"):
        receiver.open(good, b"")


def test_channel_never_uses_a_nonce_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, _ = channel()
    assert len({sender.seal(b"same", b"") for _ in range(50)}) == 50
    monkeypatch.setattr(primitives, "MAX_CHANNEL_MESSAGES", 51)
    sender.seal(b"the last", b"")
    with pytest.raises(DecryptError, match="used up"):
        sender.seal(b"one more", b"")


def test_channel_key_has_a_length() -> None:
    with pytest.raises(InputError):
        primitives.ChannelCipher(bytes(31), b"a")


def test_key_ids_depend_on_the_kind() -> None:
    raw = os.urandom(32)
    assert primitives.key_id("signer", raw) != primitives.key_id("recipient", raw)
    assert primitives.key_checksum("signer", raw) != primitives.key_checksum("recipient", raw)
