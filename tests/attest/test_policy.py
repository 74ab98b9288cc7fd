"""Policies: what each refuses, and that none of them can be empty."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from motte.attest import policy as policies
from motte.attest.claims import Claims
from motte.attest.fresh import NonceBook
from motte.attest.policy import (
    AllOf,
    AnyOf,
    Configuration,
    Fresh,
    InsecureAllowSimulated,
    Measurement,
    MinSvn,
    NotDebug,
    Platform,
    PlatformInstance,
    Policy,
    Signer,
    TcbStatus,
    demands_freshness,
    with_nonce,
)
from motte.attest.report_data import Binding
from motte.errors import AttestationError, ResourceError, SettingError

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NONCE = b"n" * 32
BINDING = Binding(nonce=NONCE, public_key=b"k" * 32, tls_spki_digest=b"", configuration_digest=b"c" * 32)
CLAIMS = Claims(
    platform="sgx",
    simulated=False,
    report_data=BINDING.report_data(),
    measurements={"mrenclave": "aa", "other": "bb"},
    signer="cc",
    svn=5,
    tcb_status="UpToDate",
    instance="dd",
    details={"isvprodid": "7"},
    binding=BINDING,
)
FRESH = Fresh(60, NONCE, NOW - timedelta(seconds=30))
SIMULATED = replace(CLAIMS, simulated=True)
NOTHING = Claims(platform="tdx", simulated=False, report_data=bytes(64), measurements={})


def words(*values: str) -> frozenset[str]:
    return frozenset(values)


CONFIGURED = Configuration(words(b"c".hex() * 32))
SATISFIED: list[Policy] = [
    Platform(words("sgx", "tdx")),
    Measurement(words("aa", "ff")),
    Measurement(words("bb"), "other"),
    Signer(words("cc")),
    Signer(words("cc"), product=7),
    MinSvn(5),
    NotDebug(),
    TcbStatus(words("UpToDate")),
    PlatformInstance(words("dd")),
    CONFIGURED,
    FRESH,
]


def check_of(policy: Policy, claims: Claims, now: datetime = NOW) -> str | None:
    with pytest.raises(AttestationError) as caught:
        policy.check(claims, now)
    return caught.value.check


def test_every_condition_can_be_satisfied_and_refuses_simulated_claims() -> None:
    for policy in SATISFIED:
        policy.check(CLAIMS, NOW)
        assert check_of(policy, SIMULATED) == "P-1"
    AllOf(*SATISFIED).check(CLAIMS, NOW)


@pytest.mark.parametrize(
    ("policy", "claims", "check"),
    [
        (Platform(words("tdx")), CLAIMS, "P-2"),
        (Measurement(words("bb")), CLAIMS, "P-3"),  # of another field
        (Measurement(words("aa"), "none"), CLAIMS, "P-3"),
        (Measurement(words("aa")), NOTHING, "P-3"),
        (Signer(words("aa")), CLAIMS, "P-4"),
        (Signer(words("aa")), NOTHING, "P-4"),
        (Signer(words("cc"), product=8), CLAIMS, "P-4"),
        (Signer(words("cc"), product=7), replace(CLAIMS, details={}), "P-4"),
        (MinSvn(6), CLAIMS, "P-5"),
        (MinSvn(0), NOTHING, "P-5"),
        (NotDebug(), replace(CLAIMS, debug=True), "P-6"),
        (TcbStatus(words("OutOfDate")), CLAIMS, "P-7"),
        (TcbStatus(words("UpToDate")), NOTHING, "P-7"),
        (PlatformInstance(words("aa")), CLAIMS, "P-8"),
        (PlatformInstance(words("aa")), NOTHING, "P-8"),
        (Configuration(words(b"x".hex() * 32)), CLAIMS, "P-9"),
        (CONFIGURED, replace(CLAIMS, binding=None), "P-9"),
        (Fresh(60), CLAIMS, "P-10"),  # as it stands in a file
        (FRESH, replace(CLAIMS, binding=None), "P-10"),
        (FRESH, replace(CLAIMS, binding=replace(BINDING, nonce=b"m" * 32)), "P-10"),
        (Fresh(60, NONCE, NOW - timedelta(seconds=61)), CLAIMS, "P-11"),
        (Fresh(60, NONCE, NOW + timedelta(seconds=1)), CLAIMS, "P-11"),  # the clock went back
        (InsecureAllowSimulated(), CLAIMS, "P-12"),
        (InsecureAllowSimulated(), SIMULATED, "P-12"),
        (AllOf(NotDebug(), Platform(words("tdx"))), CLAIMS, "P-2"),
        (AnyOf(Platform(words("tdx")), MinSvn(6)), CLAIMS, "P-13"),
        (AnyOf(MinSvn(6)), CLAIMS, "P-5"),
    ],
)
def test_what_is_refused(policy: Policy, claims: Claims, check: str) -> None:
    assert check_of(policy, claims) == check


@pytest.mark.parametrize(
    "make",
    [
        AllOf,
        AnyOf,
        lambda: AllOf(InsecureAllowSimulated()),
        lambda: AnyOf(InsecureAllowSimulated()),
        lambda: AnyOf(InsecureAllowSimulated(), NotDebug()),
        lambda: AllOf(CLAIMS),
        lambda: AllOf(type("Lenient", (NotDebug,), {})()),
        lambda: Measurement(words()),
        lambda: Signer(words()),
        lambda: TcbStatus(words()),
        lambda: Platform(words()),
        lambda: PlatformInstance(words()),
        lambda: Configuration(words()),
        lambda: Measurement("aabb"),
        lambda: Measurement(words("AA")),
        lambda: Measurement(words("a")),
        lambda: Measurement(words("")),
        lambda: Measurement(words("aa"), ""),
        lambda: Configuration(words("aa")),
        lambda: Platform(words("sgy")),
        lambda: TcbStatus(words("")),
        lambda: Signer(words("aa"), product=-1),
        lambda: MinSvn(-1),
        lambda: MinSvn(True),
        lambda: Fresh(0),
        lambda: Fresh(float("nan")),
        lambda: Fresh(float("inf")),
        lambda: Fresh(1e9),
        lambda: Fresh(60, NONCE),
        lambda: Fresh(60, b"short", NOW),
        lambda: Fresh(60, NONCE, datetime(2030, 1, 1)),
        lambda: TcbStatus(frozenset(map(str, range(5000)))),
    ],
)
def test_what_cannot_be_made(make: Any) -> None:
    with pytest.raises(SettingError):
        make()


def test_nesting_is_bounded() -> None:
    policy: Policy = NotDebug()
    for _ in range(policies.MAX_DEPTH - 1):
        policy = AllOf(policy)
    policy.check(CLAIMS, NOW)
    with pytest.raises(SettingError):
        AnyOf(policy)


def test_the_permission_for_simulated_claims_reaches_its_own_members_only() -> None:
    development, production = Measurement(words("aa")), Signer(words("cc"))
    permitted = AllOf(InsecureAllowSimulated(), development)
    permitted.check(SIMULATED, NOW)
    permitted.check(CLAIMS, NOW)
    assert check_of(permitted, replace(SIMULATED, measurements={"mrenclave": "bb"})) == "P-3"
    # nested below it: permitted; beside it: not
    AllOf(InsecureAllowSimulated(), AnyOf(MinSvn(9), AllOf(production))).check(SIMULATED, NOW)
    assert check_of(AllOf(permitted, production), SIMULATED) == "P-1"
    AnyOf(production, permitted).check(SIMULATED, NOW)
    only_production = replace(SIMULATED, measurements={"mrenclave": "bb"})
    assert check_of(AnyOf(production, permitted), only_production) == "P-13"
    # as a member of an inner group it says nothing about the outer one
    assert check_of(AllOf(AnyOf(permitted), NotDebug()), SIMULATED) == "P-1"


def test_a_nonce_is_taken_once_and_knows_when_it_was_issued() -> None:
    book = NonceBook(60)
    nonce = book.issue(NOW)
    claims = replace(CLAIMS, binding=replace(BINDING, nonce=nonce))
    fresh = book.take(nonce)
    fresh.check(claims, NOW + timedelta(seconds=60))
    assert check_of(fresh, claims, NOW + timedelta(seconds=61)) == "P-11"
    assert check_of(fresh, CLAIMS) == "P-10"
    for unknown in (nonce, b"x" * 32, b""):
        with pytest.raises(AttestationError) as caught:
            book.take(unknown)
        assert caught.value.check == "P-10"
    with pytest.raises(SettingError):
        NonceBook(0)


def test_open_nonces_are_bounded_and_expired_ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motte.attest.fresh.MAX_OPEN_NONCES", 3)
    book = NonceBook(60)
    assert len({book.issue(NOW) for _ in range(3)}) == 3
    with pytest.raises(ResourceError):
        book.issue(NOW + timedelta(seconds=60))
    book.issue(NOW + timedelta(seconds=61))


def test_a_nonce_is_put_into_every_fresh() -> None:
    policy = AllOf(NotDebug(), Fresh(60), AnyOf(AllOf(Fresh(30)), MinSvn(1)))
    filled = with_nonce(policy, NONCE, NOW)
    filled.check(CLAIMS, NOW)
    assert filled == AllOf(NotDebug(), Fresh(60, NONCE, NOW), AnyOf(AllOf(Fresh(30, NONCE, NOW)), MinSvn(1)))
    assert demands_freshness(policy)
    assert demands_freshness(AnyOf(Fresh(1), AllOf(NotDebug(), Fresh(2))))
    assert not demands_freshness(AnyOf(Fresh(1), NotDebug()))
    assert not demands_freshness(AllOf(NotDebug()))
