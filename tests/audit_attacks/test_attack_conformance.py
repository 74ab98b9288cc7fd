"""The conformance list holds against this installation, needs nothing but it, and notices a check that is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motte.audit.attacks import conformance
from motte.audit.attacks.conformance import ACCEPTED, Conformance, Conforming, Line, Trial, tried
from motte.audit.attacks.conformance_bundle import bundle_trials
from motte.audit.attacks.conformance_evidence import evidence_trials, load_vectors
from motte.audit.attacks.conformance_link import accelerator_trials, link_trials
from motte.audit.interface import Budget, Context
from motte.errors import BundleError, DecryptError, FormatError, InputError, SignatureError
from motte.seal.checks import CHECKS

ALONE = """
import dataclasses, json, sys
from motte.audit.attacks.conformance import run_conformance
found = run_conformance()
lines = [dataclasses.asdict(line) for line in found.lines]
print(json.dumps({"lines": lines, "skipped": found.skipped, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own says that has nothing but the installed package, in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "left": list(folder.iterdir())}


@pytest.fixture
def found(alone: dict[str, Any]) -> Conformance:
    return Conformance(tuple(Line(**line) for line in alone["lines"]), alone["skipped"])


def test_every_line_holds(found: Conformance) -> None:
    assert found.failed == ()
    assert [line.number for line in found.lines] == list(range(1, len(found.lines) + 1))
    assert len(found.lines) > 200
    names = [(line.area, line.name) for line in found.lines]
    assert len(set(names)) == len(names)


def test_it_needs_neither_a_test_framework_nor_the_folder_of_tests(alone: dict[str, Any]) -> None:
    assert not {"pytest", "hypothesis"} & set(alone["modules"])
    assert alone["left"] == []


def test_it_covers_the_checks_of_a_bundle_and_each_area_has_an_honest_line(found: Conformance) -> None:
    if found.skipped:
        pytest.skip(str(found.skipped))
    said = " ".join(line.expected for line in found.lines)
    # B-18, B-20 and B-22 need a key of another bundle, or a file that changes while it is read.
    for check in set(CHECKS) - {"B-18", "B-20", "B-22"}:
        assert f"[{check}]" in said
    for area in {line.area for line in found.lines}:
        assert any(line.expected == ACCEPTED for line in found.lines if line.area == area)


def test_claims_are_numbers_of_the_threat_model(found: Conformance) -> None:
    text = (Path(__file__).parents[2] / "THREAT_MODEL.md").read_text()
    for claim in {line.claim for line in found.lines}:
        assert f"* **{claim}.**" in text


def test_the_planned_job_gives_checks_and_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "_areas", lambda folder, skipped: iter([("link", link_trials())]))
    told: list[tuple[int, int]] = []
    kept: dict[object, object] = {}
    scene: Any = SimpleNamespace(known_scores=lambda job, position: (kept, (job, str(position))))
    (job,) = Conforming().plan(scene)
    outcome = job.run(Context(0, Budget(), progress=lambda done, total, what: told.append((done, total))))
    assert all(check.held for check in outcome.checks)
    assert outcome.checks[0].name == "1. link: an honest grant"
    assert outcome.checks[0].claim == "B1"
    assert len(told) == len(outcome.checks) == outcome.extra["lines"]
    assert all(done <= total for done, total in told)
    assert job.run(Context(0, Budget())).checks == ()  # under the next scheme of the same audit


def test_what_is_accepted_crashes_or_meets_another_refusal_does_not_hold() -> None:
    def raising(problem: Exception) -> Trial:
        def act() -> None:
            raise problem

        return Trial("a lie", "A2", (BundleError,), "B-3", act)

    assert tried(raising(BundleError("no", check="B-3"))) == Line(
        1, "", "a lie", "A2", "BundleError [B-3]", "BundleError [B-3]", held=True
    )
    for problem, got in (
        (BundleError("no", check="B-4"), "BundleError [B-4]"),
        (SignatureError("no", check="B-3"), "SignatureError [B-3]"),
        (BundleError("no"), "BundleError"),
        (InputError("no"), "InputError"),
        (ZeroDivisionError("by zero"), "crashed: ZeroDivisionError: by zero"),
    ):
        line = tried(raising(problem))
        assert (line.got, line.held) == (got, False)
    accepted = tried(Trial("a lie", "A2", (BundleError,), "B-3", lambda: None))
    assert (accepted.got, accepted.held) == (ACCEPTED, False)
    assert tried(Trial("honest", "A2", (), None, lambda: None)).held
    assert not tried(Trial("honest", "A2", (), None, raising(BundleError("no")).act)).held


def failed(trials) -> set[str]:
    return {line.name for line in map(tried, trials) if not line.held}


def test_a_signature_that_is_not_checked_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("motte.seal.primitives.verify_header", lambda *_: None)
    names = failed(bundle_trials(tmp_path))
    assert {"not signed", "zeros for a signature", "signed by another who names the demanded signer"} & names
    assert "release, raised changed after signing" in names


def test_plaintext_that_gets_out_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from motte.seal.reader import UnlockedBundle

    def leaking(self: UnlockedBundle, part: int, into: memoryview, **_: object) -> None:
        into[:] = b"\x01" * len(into)
        raise DecryptError("no", check="B-21")

    monkeypatch.setattr(UnlockedBundle, "open_part", leaking)
    names = failed(bundle_trials(tmp_path))
    assert "part 0: tag flipped" in names


def test_a_broker_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("motte.provision.broker.extra._NEEDED", ("a_package_that_there_is_none_of",))
    skipped: dict[str, str] = {}
    assert [area for area, _ in conformance._areas(tmp_path, skipped)] == ["bundle", "link", "accelerator", "evidence"]
    assert "motte[broker]" in skipped["broker"]


def test_a_link_that_takes_what_was_not_asked_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(link_trials()) == set()
    monkeypatch.setattr("motte.accelerator.calculator.Calculator.forward", lambda *_, **__: 1 / 0)
    assert "an honest answer" in failed(accelerator_trials())


ALL = ("sgx", "tdx", "snp", "nvidia", "tpm")


@pytest.mark.parametrize(
    ("gone", "accepted"),
    [
        (
            "motte.attest.report_data.Binding.require",
            {
                *(f"{each} evidence: said to speak for another {what}" for each in ALL for what in ("nonce", "key")),
                *(f"{each} evidence: of one configuration, said to be of another" for each in ALL),
            },
        ),
        ("motte.attest.policy.NotDebug._decide", {"snp evidence: of a guest that can be debugged"}),
        (
            "motte.attest.policy.TcbStatus._decide",
            {f"{each} evidence: of firmware that is out of date" for each in ("sgx", "tdx", "snp")},
        ),
        (
            "motte.attest.policy.Configuration._decide",
            {f"{each} evidence: of a configuration that no owner signed" for each in ALL},
        ),
    ],
)
def test_a_check_of_evidence_that_is_gone_is_noticed(
    gone: str, accepted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dcap_qvl")
    monkeypatch.setattr(gone, lambda *_: None)
    assert accepted <= failed(evidence_trials(ALL))


def test_each_platform_has_what_a_host_a_vendor_and_a_relay_can_do_wrong() -> None:
    binding, tables = load_vectors()
    assert tuple(table.platform for table in tables) == ALL
    for table in tables:
        names = " ".join(trial.name for trial in evidence_trials((table.platform,)))
        for lie in ("flipped", "another root", "another nonce", "a second time", "foreign chain", "no owner signed"):
            assert lie in names
    assert len(binding.report_data()) == 64


def test_damaged_vectors_are_an_error_and_not_an_empty_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    monkeypatch.setattr("motte.audit.attacks.conformance_evidence.resources.files", lambda _: tmp_path)
    text = b'{"binding":{},"format":"motte-evidence-vectors-1","platforms":[]}'
    for damaged in (b"{}", text, text.replace(b'1"', b'2"'), b"\x00"):
        (tmp_path / "vectors" / "evidence.json").write_bytes(damaged)
        with pytest.raises(FormatError):
            list(evidence_trials(ALL))


def test_evidence_of_sgx_and_tdx_is_left_out_where_its_verifier_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conformance, "find_spec", lambda _: None)
    skipped: dict[str, str] = {}
    assert conformance._verifiable(skipped) == ("snp", "nvidia", "tpm")
    assert "dcap-qvl" in " ".join(skipped.values())
