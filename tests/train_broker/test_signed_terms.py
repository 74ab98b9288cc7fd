"""The terms of training runs as a header spells them: what was signed before there were several processes stays so."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.policy import AllOf, Fresh, NotDebug
from motte.errors import BundleError, InputError, SettingError
from motte.link.address import parse_address
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.seal.run_terms import RunTerms
from motte.strict_json import parse
from motte.train.meeting import Meeting, ranks_word
from motte.train.settings import TrainSettings
from motte.train.signed_terms import check_settings, training_terms

ONE = RunTerms("", "asymmetric", "sha256:00", "n", "freivalds", ("tcp:a:1",))
TWO = replace(ONE, ranks=2, ranks_policy="sha256:11")


def test_one_process_is_spelled_as_ever() -> None:
    assert ONE.to_json().keys() == {"broker", "scheme", "placement", "noise", "integrity", "peers"}
    assert TWO.to_json().keys() - ONE.to_json().keys() == {"ranks", "ranks_policy"}
    for terms in (ONE, TWO):
        assert RunTerms.from_json(terms.to_json(), where="run") == terms


@pytest.mark.parametrize(
    "change",
    [{"ranks": 1}, {"ranks": 65_537}, {"ranks": True}, {"ranks": "2"}, {"ranks_policy": ""}, {"ranks_policy": 3}],
    ids=str,
)
def test_a_malformed_number_of_processes_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        RunTerms.from_json({**TWO.to_json(), **change}, where="run")
    for name in ("ranks", "ranks_policy"):
        with pytest.raises(BundleError):
            RunTerms.from_json({key: value for key, value in TWO.to_json().items() if key != name}, where="run")


def test_processes_without_a_policy_cannot_be_signed() -> None:
    for ranks, policy in ((2, ""), (1, "sha256:11"), (0, "")):
        with pytest.raises(InputError):
            replace(ONE, ranks=ranks, ranks_policy=policy)


class Header:
    bundle_id, release = b"i" * 16, 3

    class signer:
        raw = b"s" * 32

    def __init__(self, run: RunTerms) -> None:
        self.run = run


def test_the_configuration_binds_the_processes_and_their_policy() -> None:
    one, two = (RunConfiguration.of(Header(terms)) for terms in (ONE, TWO))  # type: ignore[arg-type]
    # docs/spec/evidence.md, section 4, word by word: of one process nothing has changed.
    text = (
        f'{{"broker":"","bundle_id":"{(b"i" * 16).hex()}","integrity":"freivalds","noise":"n","peers":["tcp:a:1"],'
        f'"placement":"sha256:00","ranks":1,"release":3,"scheme":"asymmetric","signer":"{(b"s" * 32).hex()}"}}'
    )
    assert one.digest() == hashlib.sha256(b"motte-run-configuration-1\0" + text.encode()).digest()
    assert (two.ranks, two.peers) == (2, ("tcp:a:1", "ranks sha256:11"))
    other = RunConfiguration.of(Header(replace(TWO, ranks_policy="sha256:12")))  # type: ignore[arg-type]
    assert len({one.digest(), two.digest(), other.digest()}) == 3


def test_the_word_of_a_policy_covers_its_roots_and_not_what_changes_while_a_run_goes_on() -> None:
    policy = AllOf(NotDebug(), Fresh(60.0))
    word = ranks_word(policy, Anchors(simulated_signers=(b"a" * 32,)))
    assert word == ranks_word(policy, Anchors(simulated_signers=(b"a" * 32,), intel_collateral=b"new"))
    others = [
        ranks_word(AllOf(NotDebug(), Fresh(61.0)), Anchors(simulated_signers=(b"a" * 32,))),
        ranks_word(policy, Anchors(simulated_signers=(b"b" * 32,))),
        ranks_word(policy, Anchors(simulated_signers=(b"a" * 32,), tpm_enrolled=(b"t",))),
        ranks_word(policy, None),
    ]
    assert len({word, *others}) == 5
    assert ranks_word(policy, None) == ranks_word(policy, Anchors())


def test_processes_meet_where_all_can_come() -> None:
    assert parse_address("fd:3")
    with pytest.raises(SettingError):
        Meeting(issue=lambda data: pytest.fail("evidence"), policy=AllOf(NotDebug()), address="fd:3")


def test_every_setting_that_decides_what_leaves_is_in_the_terms() -> None:
    base = Asymmetric(noise=None)
    changes: list[dict[str, Any]] = [
        {"noise": Gaussian(residual=Mechanism(1.0, 1.0))},
        {"rank": Fixed(3)},
        {"iterations": 4},
        {"decomposition": "als"},
        {"residual_dtype": "bfloat16"},
        {"trusted_layers": ("a",)},
        {"offloaded_layers": ("a",)},
        {"offloaded_layers": ("a" * 60, "b" * 60)},
        {"offloaded_layers": ("a" * 60, "c" * 60)},
        {"integrity": "off"},
    ]
    found = [training_terms(scheme="asymmetric", model="m", protection=replace(base, **each)) for each in changes]
    found += [training_terms(scheme="asymmetric", model="m", protection=base)]
    found += [training_terms(scheme="asymmetric", model="n", protection=base)]
    found += [training_terms(scheme="asymmetric", model="m", width=0.5, protection=base)]
    found += [training_terms(scheme="trusted", model="m")]
    assert len({str(each) for each in found}) == len(found)
    assert parse(found[2].placement, max_bytes=512, what="placement")["iterations"] == 4
    long = training_terms(scheme="asymmetric", model="resnet152", protection=replace(base, trusted_layers=("a" * 900,)))
    assert len(long.placement) < 400


def test_an_accelerator_is_its_address_and_its_pin() -> None:
    pin = f"sha256:{'ab' * 32}"
    signed = training_terms(
        scheme="asymmetric",
        model="m",
        protection=Asymmetric(noise=None),
        accelerators=(f"tcp:gpu{{rank}}:7000#{pin}", "unix:/run/a"),
    )

    def check(**given: Any) -> RunConfiguration | None:
        settings = TrainSettings(
            model="m",
            data="sealed:x",
            noise=None,
            data_key=RecipientPrivateKey.new(),
            data_signer=SignerPrivateKey.new().public,
            **given,
        )
        return check_settings(settings, Header(signed), 1)  # type: ignore[arg-type]

    assert check(accelerator="tcp:gpu{rank}:7000", accelerator_pin=pin) is not None
    assert check(accelerator="unix:/run/a") is not None
    for other in ({"accelerator": "tcp:gpu{rank}:7000"}, {"accelerator": "unix:/run/b"}, {}):
        with pytest.raises(SettingError) as found:
            check(**other)
        assert found.value.where == "accelerator"
