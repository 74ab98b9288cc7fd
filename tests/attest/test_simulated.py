"""Simulated evidence verifies for named keys only, and always says SIMULATED."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.errors import AttestationError, EvidenceError, InputError
from motte.seal.primitives import new_ed25519, sign_header, sign_simulated_evidence

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PRIVATE, PUBLIC = new_ed25519()
ANCHORS = Anchors(simulated_signers=(PUBLIC,))
EVIDENCE = simulated.issue(b"r" * 64, private=PRIVATE, measurement=b"m" * 32, svn=3, debug=True, tcb_status="Old")


def check_of(evidence: Evidence, anchors: Anchors = ANCHORS) -> str | None:
    with pytest.raises((AttestationError, EvidenceError)) as caught:
        simulated.verify(evidence, anchors, NOW)
    return caught.value.check


def with_documents(**changes: bytes) -> Evidence:
    return Evidence("simulated", {**EVIDENCE.documents, **changes})


def test_it_says_what_it_was_told_to_say() -> None:
    assert simulated.verify(Evidence.decode(EVIDENCE.encode()), ANCHORS, NOW) == Claims(
        platform="simulated",
        simulated=True,
        report_data=b"r" * 64,
        measurements={"measurement": b"m".hex() * 32},
        signer="00" * 32,
        svn=3,
        debug=True,
        tcb_status="Old",
        instance="00" * 32,
    )


def test_every_lie_has_its_check() -> None:
    assert check_of(EVIDENCE, Anchors()) == "S-2"  # the default names no key
    assert check_of(EVIDENCE, Anchors(simulated_signers=(new_ed25519()[1],))) == "S-2"
    other_private, other_public = new_ed25519()
    statement = EVIDENCE.documents["statement"]
    assert check_of(with_documents(public=other_public)) == "S-2"
    assert check_of(with_documents(signature=sign_simulated_evidence(other_private, statement))) == "S-3"
    assert check_of(with_documents(statement=statement.replace(b'"debug":true', b'"debug":false'))) == "S-3"
    assert check_of(with_documents(signature=sign_header(PRIVATE, statement))) == "S-3"  # of another domain
    assert check_of(with_documents(signature=b"short")) == "S-1"
    assert check_of(with_documents(more=b"x")) == "E-2"
    small = bytes(32)  # a point of small order, for which anyone can sign
    assert check_of(with_documents(public=small, signature=bytes(64)), Anchors(simulated_signers=(small,))) == "S-3"
    for key, value in (("simulated", False), ("svn", -1), ("debug", 1), ("report_data", "00"), ("format", "x")):
        altered = json.dumps({**json.loads(statement), key: value}).encode()
        signed = with_documents(statement=altered, signature=sign_simulated_evidence(PRIVATE, altered))
        assert check_of(signed) == "S-4", key


def test_every_flipped_byte_is_refused() -> None:
    for name, data in EVIDENCE.documents.items():
        for offset in range(0, len(data), 7):
            flipped = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
            assert check_of(with_documents(**{name: flipped})) in {"S-2", "S-3"}


@given(st.binary(max_size=60))
def test_no_signed_bytes_crash_the_reader(data: bytes) -> None:
    evidence = with_documents(statement=b"{" + data, signature=sign_simulated_evidence(PRIVATE, b"{" + data))
    assert check_of(evidence) == "S-4"


def test_what_cannot_be_issued() -> None:
    for changes in ({"private": b"short"}, {"measurement": b"short"}, {"signer": b""}, {"instance": b""}):
        with pytest.raises(InputError):
            simulated.issue(b"r" * 64, **{"private": PRIVATE, **changes})
    with pytest.raises(InputError):
        simulated.issue(b"short", private=PRIVATE)
