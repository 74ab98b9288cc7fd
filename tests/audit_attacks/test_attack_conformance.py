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
from motte.audit.attacks.conformance_link import accelerator_trials, link_trials
from motte.audit.interface import Budget, Context
from motte.errors import BundleError, DecryptError, InputError, SignatureError
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
    assert [area for area, _ in conformance._areas(tmp_path, skipped)] == ["bundle", "link", "accelerator"]
    assert "motte[broker]" in skipped["broker"]


def test_a_link_that_takes_what_was_not_asked_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(link_trials()) == set()
    monkeypatch.setattr("motte.accelerator.calculator.Calculator.forward", lambda *_, **__: 1 / 0)
    assert "an honest answer" in failed(accelerator_trials())
