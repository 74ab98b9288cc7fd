"""The one door, from evidence to verdict: replays, foreign nonces, and configurations that no owner signed."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from attest_makers.dcap_maker import AT, Maker

from motte.attest.claims import Claims
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import PLATFORMS, Evidence
from motte.attest.fresh import NonceBook
from motte.attest.platforms import simulated
from motte.attest.policy import (
    AllOf,
    Configuration,
    InsecureAllowSimulated,
    Measurement,
    NotDebug,
    Platform,
    Policy,
    Signer,
    TcbStatus,
)
from motte.attest.policy_text import loads
from motte.attest.report_data import Binding
from motte.attest.verify import verify
from motte.errors import AttestationError, EvidenceError, InputError, MotteError, SettingError

SIGNED = RunConfiguration(
    bundle_id=b"i" * 16,
    release=3,
    signer=b"s" * 32,
    broker="https://broker.example",
    scheme="asymmetric",
    placement="split all",
    noise="gaussian residual 1.0 0.5",
    integrity="freivalds 2",
    peers=("tls://accelerator.example:7000",),
)
GENUINE = AllOf(
    InsecureAllowSimulated(),
    Platform(frozenset({"sgx"})),
    Measurement(frozenset({b"E".hex() * 32})),
    Signer(frozenset({b"S".hex() * 32}), product=7),
    NotDebug(),
    TcbStatus(frozenset({"UpToDate"})),
    Configuration(frozenset({SIGNED.digest().hex()})),
)


class Relying:
    """A relying party with its nonces, and a genuine enclave that answers it."""

    def __init__(self) -> None:
        self.book = NonceBook(60)
        self.maker = Maker()

    def bound(self, nonce: bytes, configuration: RunConfiguration = SIGNED) -> Binding:
        return Binding(nonce, b"k" * 32, b"t" * 32, configuration.digest())

    def evidence(self, binding: Binding, **changes: object) -> Evidence:
        return self.maker.but(report_data=binding.report_data(), **changes).evidence()

    def check_of(self, evidence: Evidence, binding: Binding, policy: Policy, now: datetime = AT) -> str | None:
        with pytest.raises((AttestationError, EvidenceError)) as caught:
            verify(evidence, policy, now, anchors=self.maker.anchors(), binding=binding)
        return caught.value.check


def test_a_verdict() -> None:
    relying = Relying()
    nonce = relying.book.issue(AT)
    binding = relying.bound(nonce)
    evidence = Evidence.decode(relying.evidence(binding).encode())
    policy = AllOf(*GENUINE.members, relying.book.take(nonce))
    verdict = verify(evidence, policy, AT + timedelta(seconds=20), anchors=relying.maker.anchors(), binding=binding)
    assert verdict.claims.binding == binding
    assert verdict.at == AT + timedelta(seconds=20)
    assert nonce.hex() not in verdict.policy_text
    assert isinstance(loads(verdict.policy_text), AllOf)


def test_replayed_evidence_and_foreign_nonces() -> None:
    relying = Relying()
    first, second = relying.book.issue(AT), relying.book.issue(AT)
    old = relying.bound(first)
    evidence = relying.evidence(old)
    asked_first = AllOf(*GENUINE.members, relying.book.take(first))
    verify(evidence, asked_first, AT, anchors=relying.maker.anchors(), binding=old)
    # the same evidence again, as an answer to a new nonce: as it is, and said to be bound to the new one
    asked_second = AllOf(*GENUINE.members, relying.book.take(second))
    assert relying.check_of(evidence, old, asked_second) == "P-10"
    assert relying.check_of(evidence, relying.bound(second), asked_second) == "R-2"
    # again for its own nonce, which is used up
    with pytest.raises(AttestationError) as caught:
        relying.book.take(first)
    assert caught.value.check == "P-10"
    # kept until the nonce is old: the time of issue is the book's, whatever the evidence says
    assert relying.check_of(evidence, old, asked_first, AT + timedelta(seconds=61)) == "P-11"


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": None},
        {"integrity": "off"},
        {"peers": ("tls://the-hosts-own.example:7000",)},
        {"broker": "https://the-hosts-own.example"},
        {"scheme": "trusted"},
        {"placement": "split everything"},
        {"ranks": 2},
        {"release": 2},
        {"signer": b"h" * 32},
    ],
)
def test_a_genuine_enclave_with_a_configuration_that_the_owner_did_not_sign(changes: dict[str, object]) -> None:
    relying = Relying()
    nonce = relying.book.issue(AT)
    policy = AllOf(*GENUINE.members, relying.book.take(nonce))
    chosen = relying.bound(nonce, replace(SIGNED, **changes))  # type: ignore[arg-type]
    evidence = relying.evidence(chosen)
    assert relying.check_of(evidence, chosen, policy) == "P-9"
    assert relying.check_of(evidence, relying.bound(nonce), policy) == "R-2"  # and it cannot be passed off as signed


def test_another_key_or_certificate_in_the_middle() -> None:
    relying = Relying()
    binding = relying.bound(relying.book.issue(AT))
    evidence = relying.evidence(binding)
    for changes in ({"public_key": b"m" * 32}, {"tls_spki_digest": b"m" * 32}, {"tls_spki_digest": b""}):
        assert relying.check_of(evidence, replace(binding, **changes), GENUINE) == "R-2"


def test_a_genuine_platform_with_something_else_on_it() -> None:
    relying = Relying()
    binding = relying.bound(b"n" * 32)
    assert relying.check_of(relying.evidence(binding, code=b"X"), binding, GENUINE) == "P-3"
    assert relying.check_of(relying.evidence(binding, cpu_svn=bytes([2]) * 16), binding, GENUINE) == "P-7"
    assert relying.check_of(relying.evidence(binding, attributes=bytes([7]) + bytes(15)), binding, GENUINE) == "G-12"
    for_production = AllOf(*GENUINE.members[1:])
    assert relying.check_of(relying.evidence(binding), binding, for_production) == "P-1"  # a root of our own


def test_without_a_binding_nothing_is_fresh_or_configured() -> None:
    relying = Relying()
    evidence = relying.evidence(relying.bound(b"n" * 32))
    with pytest.raises(AttestationError) as caught:
        verify(evidence, GENUINE, AT, anchors=relying.maker.anchors())
    assert caught.value.check == "P-9"


@pytest.mark.parametrize("changes", [{"platform": "sgx"}, {"report_data": bytes(63)}])
def test_a_verifier_that_answers_for_something_else(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims("simulated", simulated=False, report_data=bytes(64), measurements={})
    monkeypatch.setattr(simulated, "verify", lambda *_: replace(claims, **changes))  # type: ignore[arg-type]
    with pytest.raises(AttestationError) as caught:
        verify(Evidence("simulated", {}), NotDebug(), AT)
    assert caught.value.check == "E-3"


def test_times_and_policies_that_are_none() -> None:
    relying = Relying()
    evidence = relying.evidence(relying.bound(b"n" * 32))
    elsewhere = AT.astimezone(timezone(timedelta(hours=2)))
    for now in (AT.replace(tzinfo=None), elsewhere):
        with pytest.raises(InputError):
            verify(evidence, GENUINE, now)

    class AcceptsAll(NotDebug):
        def check(self, claims: object, now: object) -> None:
            pass

    with pytest.raises(SettingError):
        verify(evidence, AcceptsAll(), AT, anchors=relying.maker.anchors())


@pytest.mark.parametrize("platform", [*PLATFORMS, "unheard-of"])
def test_every_platform_refuses_what_says_nothing(platform: str) -> None:
    with pytest.raises(MotteError) as caught:
        verify(Evidence(platform, {}), NotDebug(), AT)
    assert caught.value.check in {"E-2", "N-1", "T-1", "V-1"}
