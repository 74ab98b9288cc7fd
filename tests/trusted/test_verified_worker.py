"""A client that demands evidence: TLS ends in the worker, and before it proved itself it is sent only the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.attest.policy_text import loads
from motte.errors import AttestationError, InputError, MotteError, ResourceError
from motte.run.verified import Verifier
from motte.seal.primitives import new_ed25519

X = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16) / 768
MEASUREMENT = b"\x07" * 32
PRIVATE, PUBLIC = new_ed25519()
ANCHORS = Anchors(simulated_signers=(PUBLIC,))
POLICY = """{"format": "motte-policy-1", "policy": {"all_of": [
    {"insecure_allow_simulated": {}}, {"platform": ["simulated"]}, {"not_debug": {}},
    {"measurement": {"allowed": ["MEASUREMENT"]}}, {"fresh": {"max_age_s": 120}}]}}"""


def verifier(measurement: bytes = MEASUREMENT, anchors: Anchors | None = ANCHORS) -> Verifier:
    return Verifier(loads(POLICY.replace("MEASUREMENT", measurement.hex())), anchors)


def issue(**facts: Any) -> Callable[[bytes], Evidence]:
    given = {"private": PRIVATE, "measurement": MEASUREMENT, **facts}
    return lambda report_data: simulated.issue(report_data, **given)


def test_a_verified_worker_answers_inside_of_tls(sealed) -> None:
    with sealed.load(verifier=verifier(), issue=issue()) as model, torch.inference_mode():
        assert torch.equal(model(X), sealed.model(X))
        assert model.verdict is not None
        assert model.verdict.claims.simulated
        assert model.verdict.claims.binding.public_key == model._worker.hello.public_key
        # What crosses is TLS: the worker's stream is not the socket that it was started with.
        assert type(model._worker.link._socket).__name__ == "TlsStream"


@pytest.mark.parametrize(
    ("given", "demanded", "check"),
    [
        ({"measurement": b"\x08" * 32}, {}, "P-3"),
        ({"debug": True}, {}, "P-6"),
        ({"private": new_ed25519()[0]}, {}, "S-2"),
        ({}, {"anchors": None}, "S-2"),
    ],
    ids=["changed worker", "debug", "unknown key", "no simulated signers"],
)
def test_who_does_not_satisfy_the_policy_is_sent_the_bundle_and_no_more(
    sealed, given: dict[str, Any], demanded: dict[str, Any], check: str
) -> None:
    frames: list[bytes] = []

    def record(direction: str, data: bytes) -> None:
        if direction == "sent":
            frames.append(data)

    with pytest.raises(AttestationError) as caught:
        sealed.load(verifier=verifier(**demanded), issue=issue(**given), recorder=record)
    assert caught.value.check == check
    # OPEN alone: neither a grant with keys nor an input.
    assert len(frames) == 1
    assert b'"bundle_bytes"' in frames[0]


def test_evidence_for_another_key_or_run_is_refused(sealed) -> None:
    # The host hands the worker evidence that was made over other report data.
    other = bytes(64)
    with pytest.raises(AttestationError) as caught:
        sealed.load(verifier=verifier(), issue=lambda report_data: issue()(other))
    assert caught.value.check == "R-2"


def test_a_host_that_makes_no_evidence_says_why(sealed) -> None:
    def broken(report_data: bytes) -> Evidence:
        raise ResourceError("the TPM is gone")

    with pytest.raises(ResourceError, match="the TPM is gone"):
        sealed.load(verifier=verifier(), issue=broken)
    with pytest.raises(MotteError):
        sealed.load(verifier=verifier())


def test_a_bundle_without_terms_cannot_be_verified(sealed, tmp_path: Path) -> None:
    from motte.seal import BytesPart, write_bundle

    path = tmp_path / "old.motte"
    recipients = [sealed.recipient.public]
    write_bundle(path, release=3, manifest=b"m", parts=[BytesPart(b"p")], recipients=recipients, signer=sealed.signer)
    with pytest.raises(InputError, match="without the terms of its runs"):
        sealed.load(path=path, verifier=verifier(), issue=issue(), engine="torch")


def test_evidence_for_another_key_than_the_one_that_hello_named_is_refused(sealed, monkeypatch) -> None:
    # Whoever carries HELLO puts in a key of his own: keys would be sealed to that one.
    from motte.run import verified

    def relayed(worker: Any, demand: Any, *, timeout_s: float) -> Any:
        worker.hello = replace(worker.hello, public_key=b"\x09" * 32)
        return verified.attested(worker, demand, timeout_s=timeout_s)

    monkeypatch.setattr("motte.run.model.attested", relayed)
    with pytest.raises(AttestationError, match="another key than the one that the worker named"):
        sealed.load(verifier=verifier(), issue=issue())
