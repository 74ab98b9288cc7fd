"""The 64 bytes that bind evidence: one encoding for one binding, and none shared."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.configuration import RunConfiguration
from motte.attest.report_data import Binding, report_data
from motte.errors import AttestationError, EvidenceError, InputError

BINDING = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"t" * 32, configuration_digest=b"c" * 32)
CONFIGURATION = RunConfiguration(
    bundle_id=b"i" * 16,
    release=3,
    signer=b"s" * 32,
    broker="https://broker.example",
    scheme="asymmetric",
    placement="split all",
    noise="gaussian residual 1.0 0.5",
    integrity="freivalds 2",
    ranks=2,
    peers=("tls://accelerator.example:7000",),
)


def test_the_encoding_is_the_one_of_the_specification() -> None:
    parts = b"".join((32).to_bytes(8, "big") + each * 32 for each in (b"n", b"k", b"t", b"c"))
    assert BINDING.report_data() == hashlib.sha512(b"motte-report-data-1\x00" + parts).digest()
    no_tls = replace(BINDING, tls_spki_digest=b"").report_data()
    parts = parts[:80] + bytes(8) + parts[120:]
    assert no_tls == hashlib.sha512(b"motte-report-data-1\x00" + parts).digest()


@pytest.mark.parametrize("field", ["nonce", "public_key", "tls_spki_digest", "configuration_digest"])
def test_every_field_counts(field: str) -> None:
    other = replace(BINDING, **{field: b"x" * 32})
    BINDING.require(BINDING.report_data())
    for found in (other.report_data(), BINDING.report_data()[:63], b"", bytes(64)):
        with pytest.raises(AttestationError) as caught:
            BINDING.require(found)
        assert caught.value.check == "R-2"
    with pytest.raises(EvidenceError) as malformed:
        replace(BINDING, **{field: b"x" * 31})
    assert malformed.value.check == "R-1"
    if field != "tls_spki_digest":
        with pytest.raises(EvidenceError):
            replace(BINDING, **{field: b""})


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_fields_that_trade_places_are_another_binding(values: list[bytes], one: int, two: int) -> None:
    def of(fields: list[bytes]) -> bytes:
        names = ("nonce", "public_key", "tls_spki_digest", "configuration_digest")
        return report_data(**dict(zip(names, fields, strict=True)))

    swapped = list(values)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    assert (of(values) == of(swapped)) == (values == swapped)
    assert len(of(values)) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle_id": b"j" * 16},
        {"release": 4},
        {"signer": b"r" * 32},
        {"broker": "https://other.example"},
        {"broker": ""},
        {"scheme": "trusted"},
        {"placement": "split all but the last"},
        {"noise": None},
        {"noise": "None"},
        {"integrity": "off"},
        {"ranks": 1},
        {"peers": ("tls://elsewhere.example:7000",)},
        {"peers": ()},
    ],
)
def test_every_field_of_the_configuration_counts(changes: dict[str, object]) -> None:
    assert replace(CONFIGURATION, **changes).digest() != CONFIGURATION.digest()  # type: ignore[arg-type]
    assert replace(CONFIGURATION).digest() == CONFIGURATION.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle_id": b"j"},
        {"release": 0},
        {"release": True},
        {"signer": b""},
        {"scheme": ""},
        {"noise": ""},
        {"integrity": ""},
        {"ranks": 0},
        {"peers": ("",)},
        {"peers": ("x" * 10_000,)},
        {"placement": "x" * 100_000},
    ],
)
def test_a_configuration_out_of_bounds(changes: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(CONFIGURATION, **changes)  # type: ignore[arg-type]
