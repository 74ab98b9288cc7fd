"""Paths, revocation lists and bare signatures: what holds, and what is refused under the caller's check."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.attest import certificates
from motte.attest.certificates import load_der, load_pem, load_pem_chain, verify_chain, verify_not_revoked
from motte.attest.platforms.vendor_roots import AMD_ARKS, NVIDIA_DEVICE_ROOT
from motte.errors import AttestationError, EvidenceError, MotteError

sys.modules.setdefault("attest_makers", ModuleType("attest_makers")).__path__ = [str(Path(__file__).parent)]
make: Any = importlib.import_module("attest_makers.certificate_maker")
NOW = make.NOW


def read(issuer: Any) -> certificates.Certificate:
    return load_der(issuer.der, where=issuer.certificate.subject.rfc4514_string(), check="X-1")


def path(
    leaf: Any, *others: Any, root: Any, now: datetime = NOW, **options: Any
) -> tuple[certificates.Certificate, ...]:
    return verify_chain(
        read(leaf), [read(each) for each in others], [read(root)], now, check="X-2", expiry_check="X-3", **options
    )


def path_of(leaf: bytes, middle: certificates.Certificate, root: certificates.Certificate) -> None:
    verify_chain(load_der(leaf, where="leaf", check="X-1"), [middle], [root], NOW, check="X-2", expiry_check="X-3")


@pytest.fixture(scope="module")
def family() -> Any:
    """root (RSA) > middle (EC) > leaf."""
    root = make.sign("root", make.rsa_key("root"))
    middle = make.sign("middle", make.ec_key("middle"), root, path_length=0)
    return root, middle, make.sign("leaf", make.ec_key("leaf"), middle, ca=None)


def test_a_path_is_found_in_any_order_and_returned_from_leaf_to_root(family: Any) -> None:
    root, middle, leaf = family
    assert [each.subject for each in path(leaf, root, middle, root=root)] == ["CN=leaf", "CN=middle", "CN=root"]
    assert len(path(leaf, middle, root=root)) == 3


def broken_paths(family: Any) -> dict[str, tuple[str, Callable[[], object]]]:
    root, middle, leaf = family
    key = make.ec_key("broken")
    no_ca = make.sign("middle", key, root, ca=False)
    unmarked = make.sign("middle", key, root, ca=None)
    no_sign = make.sign("middle", key, root, may_issue=False)
    deeper = make.sign("deeper", key, middle)
    critical = make.sign("leaf", key, middle, ca=None, extra=[("1.2.3.4", b"\x05\x00", True)])
    impostor = make.sign("middle", key, make.sign("root", make.rsa_key("impostor")))
    late = make.sign("leaf", key, middle, ca=None, begin=NOW + timedelta(days=1))
    old = make.sign("middle", make.ec_key("middle"), root, end=NOW - timedelta(days=1))

    def under(middle_: Any) -> Any:
        return make.sign("leaf", make.ec_key("leaf"), middle_, ca=None)

    return {
        "nobody's issuer": ("X-2", lambda: path(leaf, root=root)),
        "another root of the same name": (
            "X-2",
            lambda: path(leaf, middle, root=make.sign("root", make.rsa_key("impostor"))),
        ),
        "an issuer of the same name": ("X-2", lambda: path(leaf, impostor, root=root)),
        "a certificate left over": ("X-2", lambda: path(leaf, middle, deeper, root=root)),
        "an issuer that is no CA": ("X-2", lambda: path(under(no_ca), no_ca, root=root)),
        "an issuer that is not marked": ("X-2", lambda: path(under(unmarked), unmarked, root=root)),
        "an issuer whose key is for something else": ("X-2", lambda: path(under(no_sign), no_sign, root=root)),
        "longer than allowed": ("X-2", lambda: path(under(deeper), deeper, middle, root=root)),
        "an unknown critical extension": ("X-2", lambda: path(critical, middle, root=root)),
        "too many": ("X-2", lambda: path(leaf, *[deeper] * 9, root=root)),
        "a leaf of tomorrow": ("X-3", lambda: path(late, middle, root=root)),
        "an issuer of yesterday": ("X-3", lambda: path(under(old), old, root=root)),
        "a root of next year": ("X-3", lambda: path(leaf, middle, root=root, now=NOW + timedelta(days=365))),
    }


def test_each_broken_rule_is_refused(family: Any) -> None:
    for label, (check, attempt) in broken_paths(family).items():
        with pytest.raises(AttestationError) as caught:
            attempt()
        assert caught.value.check == check, label
    critical = make.sign("leaf", make.ec_key("x"), family[1], ca=None, extra=[("1.2.3.4", b"\x05\x00", True)])
    assert path(critical, family[1], root=family[0], allow_critical=frozenset({"1.2.3.4"}))


def test_every_flipped_byte_of_a_leaf_is_refused(family: Any) -> None:
    root, middle, leaf = family
    for at in range(len(leaf.der)):
        data = bytearray(leaf.der)
        data[at] ^= 1 << at % 8
        with pytest.raises(MotteError) as caught:
            path_of(bytes(data), read(middle), read(root))
        assert caught.value.check in ("X-1", "X-2"), at


def test_weak_and_foreign_keys_are_refused() -> None:
    for key in (
        rsa.generate_private_key(65537, 1024),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        data = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with pytest.raises(EvidenceError) as caught:
            certificates.key_kind(data, where="key", check="X-1")
        assert caught.value.check == "X-1"


def test_pem_is_read_strictly(family: Any) -> None:
    _, middle, leaf = family
    both = leaf.pem + b"\n" + middle.pem
    assert [each.der for each in load_pem_chain(both, where="w", check="X-1")] == [leaf.der, middle.der]
    assert load_pem(leaf.pem.replace(b"\n", b"\r\n"), where="w", check="X-1").der == leaf.der
    for bad in (
        b"",
        b"text" + leaf.pem,
        leaf.pem + b"text",
        leaf.pem + b"text\n" + middle.pem,
        leaf.pem * 9,
        both[:-30],
    ):
        with pytest.raises(EvidenceError):
            load_pem_chain(bad, where="w", check="X-1")
    for bad in (both, leaf.pem.replace(b"M", b"MM", 1), leaf.der):
        with pytest.raises(EvidenceError):
            load_pem(bad, where="w", check="X-1")
    with pytest.raises(EvidenceError):
        load_der(leaf.der + b"\x00", where="w", check="X-1")


def test_revocation(family: Any) -> None:
    root, middle, leaf = family
    found = path(leaf, middle, root=root)

    def check(*lists: bytes, required: int = 0) -> datetime | None:
        return verify_not_revoked(lists, found, NOW, required=found[:required], check="X-4")

    of_middle, of_root = make.revocation_list(middle), make.revocation_list(root, end=NOW + timedelta(days=1))
    stranger = make.revocation_list(make.sign("stranger", make.ec_key("stranger")))
    assert check() is None
    assert check(stranger) is None
    assert check(of_middle, of_root, required=2) == NOW + timedelta(days=1)
    no_lists = make.sign("root", make.rsa_key("root"), may_list=False)
    for label, lists, required in (
        ("revoked", (make.revocation_list(middle, [leaf.certificate]),), 0),
        ("an issuer revoked", (make.revocation_list(root, [middle.certificate]),), 0),
        ("not by its issuer", (make.revocation_list(middle, signer=make.ec_key("stranger")),), 0),
        ("over", (make.revocation_list(middle, end=NOW - timedelta(days=1)),), 0),
        ("not yet", (make.revocation_list(middle, begin=NOW + timedelta(days=1), end=NOW + timedelta(days=2)),), 0),
        ("partial", (make.revocation_list(middle, partial=True),), 0),
        ("demanded and absent", (of_root,), 1),
    ):
        with pytest.raises(AttestationError) as caught:
            check(*lists, required=required)
        assert caught.value.check == "X-4", label
    bare = path(make.sign("l", make.ec_key("leaf"), no_lists, ca=None), root=no_lists)
    with pytest.raises(AttestationError):
        verify_not_revoked([of_root], bare, NOW, required=(), check="X-4")
    for bad in (b"", b"\x30\x00", of_middle[:-1], leaf.der):
        with pytest.raises(EvidenceError):
            check(bad)


def test_bare_signatures_and_keys() -> None:
    key, other, data = make.ec_key("leaf"), make.rsa_key("root"), b"what was signed"
    curve, modulus = make.spki_of(key), make.spki_of(other)
    numbers, exponent = key.public_key().public_numbers(), other.public_key().public_numbers()
    assert certificates.ec_spki("secp384r1", numbers.x, numbers.y, where="w", check="X-1") == curve
    assert certificates.rsa_spki(exponent.n, exponent.e, where="w", check="X-1") == modulus
    kinds = [certificates.key_kind(each, where="w", check="X-1") for each in (curve, modulus)]
    assert kinds == ["secp384r1", "rsa2048"]
    der = key.sign(data, ec.ECDSA(hashes.SHA384()))
    for form in (der, decode_dss_signature(der)):
        certificates.verify_ecdsa(curve, form, data, hash_name="sha384", where="w", check="X-1")
    pss = other.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), 20), hashes.SHA256())
    plain = other.sign(data, padding.PKCS1v15(), hashes.SHA256())
    for scheme, signature in (("pss", pss), ("pkcs1", plain)):
        for changed, holds in ((data, True), (data + b"!", False)):
            arguments = {"hash_name": "sha256", "scheme": scheme, "where": "w", "check": "X-1"}
            if holds:
                certificates.verify_rsa(modulus, signature, changed, **arguments)
            else:
                with pytest.raises(AttestationError):
                    certificates.verify_rsa(modulus, signature, changed, **arguments)
    for bad in (der[:-1], (0, 0), (1 << 400, 1), (-1, 5), pss):
        with pytest.raises(AttestationError):
            certificates.verify_ecdsa(curve, bad, data, hash_name="sha384", where="w", check="X-1")
    for attempt in (
        lambda: certificates.verify_ecdsa(modulus, der, data, hash_name="sha384", where="w", check="X-1"),
        lambda: certificates.verify_rsa(curve, pss, data, hash_name="sha256", scheme="pss", where="w", check="X-1"),
        lambda: certificates.ec_spki("secp384r1", 1, 1, where="w", check="X-1"),
        lambda: certificates.ec_spki("secp256k1", 1, 1, where="w", check="X-1"),
        lambda: certificates.rsa_spki(15, 3, where="w", check="X-1"),
        lambda: certificates.key_kind(b"\x30\x00", where="w", check="X-1"),
    ):
        with pytest.raises(EvidenceError):
            attempt()


def test_the_pinned_roots_are_themselves() -> None:
    # The digests of docs/spec/evidence/snp_nvidia.md: a changed pin has to be changed in both places.
    text = (Path(__file__).resolve().parents[2] / "docs/spec/evidence/snp_nvidia.md").read_text()
    for name, der in {**{f"ARK-{name}": der for name, der in AMD_ARKS.items()}, "NVIDIA": NVIDIA_DEVICE_ROOT}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            root = load_der(der, where=name, check="X-1")
        assert name in root.subject
        assert root.subject == root.issuer
        assert verify_chain(root, [], [root], datetime(2026, 1, 1, tzinfo=UTC), check="X-2") == (root,)
        assert certificates._issued_by(root, root) is None
        assert root.fingerprint.hex() in text
        assert certificates.spki_digest(root.spki).hex() in text


@settings(max_examples=60)
@given(data=st.binary(max_size=200), at=st.integers(0, 2000), what=st.binary(min_size=1, max_size=4))
def test_no_bytes_crash_a_reader(data: bytes, at: int, what: bytes) -> None:
    good = AMD_ARKS["Milan"]
    mutated = good[: at % len(good)] + what + good[at % len(good) + len(what) :]
    for candidate in (data, mutated):
        for attempt in (
            lambda candidate=candidate: load_der(candidate, where="w", check="X-1"),
            lambda candidate=candidate: load_pem_chain(candidate, where="w", check="X-1"),
            lambda candidate=candidate: certificates.key_kind(candidate, where="w", check="X-1"),
            lambda candidate=candidate: verify_not_revoked([candidate], [], NOW, required=(), check="X-1"),
        ):
            try:
                attempt()
            except EvidenceError as problem:
                refused = problem.check
            else:
                refused = "X-1"
            assert refused == "X-1"
