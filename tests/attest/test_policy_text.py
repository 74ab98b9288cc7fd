"""Policies as text."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.evidence import PLATFORMS
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
)
from motte.attest.policy_text import dumps, loads
from motte.errors import FormatError, MotteError, SettingError

HEX = st.frozensets(st.binary(min_size=1, max_size=4).map(bytes.hex), min_size=1, max_size=3)
WORDS = st.frozensets(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=3)
SVN = st.integers(0, 65_535)
CONDITIONS = st.one_of(
    st.builds(Platform, st.frozensets(st.sampled_from(PLATFORMS), min_size=1)),
    st.builds(Measurement, HEX, st.none() | st.sampled_from(["rtmr1", "pcr11"])),
    st.builds(Signer, HEX, st.none() | SVN),
    st.builds(MinSvn, SVN),
    st.just(NotDebug()),
    st.builds(TcbStatus, WORDS),
    st.builds(PlatformInstance, HEX),
    st.builds(Configuration, st.frozensets(st.binary(min_size=32, max_size=32).map(bytes.hex), min_size=1)),
    st.builds(Fresh, st.floats(0.001, 86_400)),
)


def groups(members: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    several = st.lists(members, min_size=1, max_size=3)
    permitted = several.map(lambda found: AllOf(InsecureAllowSimulated(), *found))
    return st.one_of(several.map(lambda found: AllOf(*found)), several.map(lambda found: AnyOf(*found)), permitted)


@given(st.recursive(CONDITIONS, groups, max_leaves=8))
def test_a_text_round_trips(policy: Policy) -> None:
    text = dumps(policy)
    assert loads(text) == policy
    assert dumps(loads(text.encode())) == text


def test_a_nonce_never_stands_in_a_text() -> None:
    nonce = b"n" * 32
    text = dumps(Fresh(60, nonce, datetime(2030, 1, 1, tzinfo=UTC)))
    assert json.loads(text)["policy"] == {"fresh": {"max_age_s": 60.0}}
    assert loads(text) == Fresh(60)


def as_text(policy: object) -> str:
    return json.dumps({"format": "motte-policy-1", "policy": policy})


@pytest.mark.parametrize(
    "policy",
    [
        {},
        [],
        "not_debug",
        {"not_debug": {}, "min_svn": 1},
        {"not_debug": {"really": True}},
        {"not_debug": None},
        {"not_debugg": {}},
        {"min_svn": 1.0},
        {"min_svn": True},
        {"measurement": ["aa"]},
        {"measurement": {"allowed": ["aa"], "named": "pcr0"}},
        {"measurement": {"allowed": "aa"}},
        {"measurement": {"allowed": ["aa", "aa"]}},
        {"signer": {}},
        {"signer": {"allowed": ["aa"], "product": -1}},
        {"fresh": {"max_age_s": 60, "nonce": "aa"}},
        {"fresh": {}},
        {"tcb_status": [1]},
        {"tcb_status": [""]},
        {"tcb_status": ["\ud800"]},
        {"all_of": {}},
        {"all_of": [{"nothing": []}]},
    ],
)
def test_a_malformed_text(policy: object) -> None:
    with pytest.raises(FormatError):
        loads(as_text(policy))


@pytest.mark.parametrize(
    "policy",
    [
        {"all_of": []},
        {"any_of": []},
        {"all_of": [{"insecure_allow_simulated": {}}]},
        {"any_of": [{"insecure_allow_simulated": {}}, {"not_debug": {}}]},
        {"measurement": {"allowed": []}},
        {"measurement": {"allowed": ["AA"]}},
        {"tcb_status": []},
        {"platform": ["sgy"]},
        {"configuration": ["aa"]},
        {"fresh": {"max_age_s": 0}},
    ],
)
def test_a_text_of_a_policy_that_cannot_be_made(policy: object) -> None:
    with pytest.raises(SettingError):
        loads(as_text(policy))


def test_text_beside_and_depth() -> None:
    for text in ('{"format": "motte-policy-2", "policy": {"not_debug": {}}}', '{"policy": {"not_debug": {}}}', "", "1"):
        with pytest.raises(FormatError):
            loads(text)
    with pytest.raises(FormatError):
        loads(as_text({"not_debug": {}})[:-1] + ', "more": 1}')
    nested: object = {"not_debug": {}}
    for _ in range(16):
        nested = {"all_of": [nested]}
    with pytest.raises(FormatError):
        loads(as_text(nested))

    class Lenient(NotDebug):
        pass

    with pytest.raises(SettingError):
        dumps(Lenient())


@given(st.binary(max_size=80))
def test_no_text_crashes_the_reader(data: bytes) -> None:
    with pytest.raises(MotteError):
        loads(b'{"format": "motte-policy-1", "policy": ' + data)
