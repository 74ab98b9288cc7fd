"""``audit.json``: what is written is read back, what was altered is refused; claims follow stated rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motte.audit.claims import CLAIMS, Evidence, decide
from motte.audit.document import (
    AuditDocument,
    ClaimVerdict,
    CurveData,
    Failure,
    PictureFile,
    SchemeReport,
    decode_audit,
    encode,
    to_json,
)
from motte.audit.epsilon import EmpiricalEpsilon
from motte.audit.finding import Bracket, Budget, Finding, Knowledge, Position
from motte.audit.interface import Check
from motte.audit.measures.exposure import Exposure
from motte.audit.measures.figure import Figure
from motte.audit.observe import Row
from motte.audit.page import claims_lines, finding_rows, markdown
from motte.errors import RecordError

REPOSITORY = Path(__file__).resolve().parents[2]


def row(layer: str, kind: Any = "activation", aligned: float | None = 0.2) -> Row:
    exposed = None if aligned is None else Exposure(layer, aligned, aligned)
    return Row(layer, "sent", kind, 1, ("float32",), ((2, 3),), 24, 1.5, exposed)


def scheme(**more: Any) -> SchemeReport:
    given: dict[str, Any] = {
        "audited": "asymmetric, noise none",
        "kind": "asymmetric",
        "noised": False,
        "chosen": False,
        "declared": ("b", "c"),
        "first": "a",
        "last": "d",
        "inference": (row("b"), row("b", "weight", None), row("c", aligned=0.4)),
        "training": (row("b", aligned=None), row("b", "gradient", None)),
    }
    return SchemeReport(**{**given, **more})


def finding(value: float = 0.5, **more: Any) -> Finding:
    given: dict[str, Any] = {
        "attack": "reconstruction for a test",
        "audited": "asymmetric, noise none",
        "metric": "psnr",
        "unit": "dB",
        "higher_is_worse": True,
        "layer": "b",
        "scheme": Bracket(value, value, value),
        "floor": Bracket(0.0, 0.0, 0.1),
        "ceiling": Bracket(1.0, 0.9, 1.0),
        "knowledge": (Knowledge.RECORDING, Knowledge.PIPELINE),
        "budget": Budget(),
        "seed": 3,
        "notes": ("a note | with a bar",),
    }
    return Finding(**{**given, **more})


def epsilon(lower: float, upper: float) -> EmpiricalEpsilon:
    return EmpiricalEpsilon(
        lower=lower,
        upper=upper,
        upper_because="stated",
        delta=1e-5,
        adjacency="replace",
        confidence=0.95,
        method="gaussian",
        trials=100,
        counted="9 of 10 against 1 of 10",
    )


def document() -> AuditDocument:
    return AuditDocument(
        made="2026-01-31T12:00:00Z",
        versions={"motte": "0.1.0"},
        model="net",
        weights_origin="random",
        data="bars",
        provenance="made for a test",
        suite="quick",
        seed=3,
        budget=Budget(),
        seconds=1.25,
        schemes=(scheme(), scheme(audited="trusted", kind="trusted", inference=(), training=(), declared=())),
        findings=(finding(), finding(0.05, layer=None), finding(ceiling=Bracket(0.05, 0.0, 0.1))),
        checks=(Check("a flipped bit", "A2", True, "refused"),),
        epsilons=(("trusted", epsilon(0.5, 2.0)), ("trusted", epsilon(0.5, float("inf")))),
        figures=(
            Figure(name="entropy", audited=None, layer="b", value=2.5, unit="bit"),
            Figure(name="bound", audited="trusted", layer=None, value=None, unit="dB", missing="no noise"),
        ),
        claims=(ClaimVerdict("A2", "held", "Held: because."),),
        pictures=(
            PictureFile(title="t", file="audit/a.png", audited="trusted", position=Position.FLOOR, rows=("a", "b")),
        ),
        curves=(
            CurveData(
                title="roc",
                audited="trusted",
                position=None,
                x_label="x",
                y_label="y",
                log_axes=True,
                points=((0.0, 1.0), (1.0, 1.0)),
            ),
        ),
        failures=(Failure("trusted", "job", "why"),),
    )


def test_what_is_written_is_read_back() -> None:
    found = decode_audit(encode(document()), where="a test")
    assert found == document()
    assert encode(found) == encode(document())


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "another format": lambda d: d.update(format="motte-audit/2"),
    "an unknown field": lambda d: d.update(more=1),
    "a missing field": lambda d: d.pop("claims"),
    "a finding without its floor": lambda d: d["findings"][0].pop("floor"),
    "a finding with a floor of null": lambda d: d["findings"][0].update(floor=None),
    "an interval beside its value": lambda d: d["findings"][0].update(floor=[5.0, 0.0, 1.0]),
    "a bracket of two numbers": lambda d: d["findings"][0].update(floor=[0.0, 1.0]),
    "a position that is not that of the brackets": lambda d: d["findings"][0].update(position_percent=1.0),
    "a position where there is none": lambda d: d["findings"][2].update(position_percent=1.0),
    "an unknown knowledge": lambda d: d["findings"][0].update(knowledge=["magic"]),
    "no knowledge": lambda d: d["findings"][0].update(knowledge=[]),
    "a budget of nothing": lambda d: d["budget"].update(steps=0),
    "an unknown verdict": lambda d: d["claims"][0].update(verdict="surely"),
    "a picture elsewhere": lambda d: d["pictures"][0].update(file="../a.png"),
    "a figure with both": lambda d: d["figures"][0].update(missing="why"),
    "a contradiction that is denied": lambda d: d["epsilons"][0].update(lower=5.0),
    "an upper bound of words": lambda d: d["epsilons"][0].update(upper="large"),
    "a point of three": lambda d: d["curves"][0].update(points=[[1, 2, 3]]),
    "a shape of fractions": lambda d: d["schemes"][0]["inference"][0].update(shapes=[[1.5]]),
    "true for a number": lambda d: d.update(seconds=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_altered_is_refused(name: str) -> None:
    changed = json.loads(encode(document()))
    CHANGES[name](changed)
    with pytest.raises(RecordError):
        decode_audit(json.dumps(changed).encode(), where="a test")


def test_a_contradiction_is_named() -> None:
    assert document().contradictions == ()
    broken = replace(document(), epsilons=(("trusted", epsilon(3.0, 2.0)),))
    assert broken.contradictions == ("trusted",)
    assert decode_audit(encode(broken), where="x").contradictions == ("trusted",)


# --- claims ---------------------------------------------------------------------------------------------------------
def test_the_claims_are_those_of_the_threat_model() -> None:
    text = (REPOSITORY / "THREAT_MODEL.md").read_text(encoding="utf-8")
    numbered = re.findall(r"^\* \*\*([A-Z][0-9]+)\.\*\*", text, re.MULTILINE)
    assert sorted(each for each in CLAIMS if "," not in each) == sorted(numbered)
    assert "**Broken, and printed: training without noise.**" in text
    assert "that a residual without noise hides anything" in text


def verdicts(**given: Any) -> dict[str, ClaimVerdict]:
    return {each.claim: each for each in decide(Evidence(**given))}


def test_of_nothing_nothing_is_said() -> None:
    assert {each.verdict for each in verdicts().values()} == {"not tested"}
    quiet = scheme(kind="trusted", inference=(), training=())
    assert {each.verdict for each in verdicts(schemes=[quiet]).values()} == {"not tested"}


def test_what_crossed_decides_f1_f3_and_f4() -> None:
    found = verdicts(schemes=[scheme()])
    assert [found[each].verdict for each in ("F1", "F3", "F4")] == ["held"] * 3
    assert "5 tensors" in found["F1"].sentence
    assert "40.0%, of c" in found["F3"].sentence
    stranger = scheme(inference=(row("x"),))
    assert verdicts(schemes=[scheme(), stranger])["F1"].verdict == "not held"
    early = scheme(inference=(row("b", "gradient", None),))
    assert verdicts(schemes=[early])["F1"].verdict == "not held"
    whole = scheme(inference=(row("b", aligned=1.0),))
    assert verdicts(schemes=[whole])["F3"].verdict == "not held"
    first = scheme(declared=("a", "b"), inference=(row("a"),))
    assert verdicts(schemes=[first])["F4"].verdict == "not held"
    assert verdicts(schemes=[replace(first, chosen=True)])["F4"].verdict == "not tested"


def test_checks_decide_the_claims_that_they_name() -> None:
    good, bad = Check("one", "F9", True, "refused"), Check("two", "F9", False, "accepted")
    assert verdicts(checks=[good])["F9"].sentence.endswith("One check tried it and met what it promises.")
    assert verdicts(checks=[good, bad])["F9"].verdict == "not held"
    assert "two (accepted)" in verdicts(checks=[good, bad])["F9"].sentence


def test_a_contradicted_epsilon_is_not_held() -> None:
    assert verdicts(epsilons=[("a", epsilon(0.5, 2.0))])["F8"].verdict == "held"
    assert verdicts(epsilons=[("a", epsilon(0.5, float("inf")))])["F8"].verdict == "not tested"
    found = verdicts(epsilons=[("a", epsilon(0.5, 2.0)), ("a", epsilon(2.5, 2.0))])
    assert found["F8"].verdict == "not held"


def test_what_is_not_claimed_is_judged_by_the_attacks() -> None:
    plain, broken = "F, not claimed: residuals without noise", "F, broken: training without noise"
    schemes = [scheme()]
    assert verdicts(schemes=schemes, findings=[finding()])[plain].verdict == "not held"
    assert verdicts(schemes=schemes, findings=[finding(0.05)])[plain].verdict == "held"
    weak = finding(ceiling=Bracket(0.05, 0.0, 0.1))
    assert verdicts(schemes=schemes, findings=[weak])[plain].verdict == "not tested"
    noised = [scheme(noised=True)]
    assert verdicts(schemes=noised, findings=[finding()])[plain].verdict == "not tested"
    delta = finding(0.95, attack="weight-delta")
    assert verdicts(schemes=schemes, findings=[delta])[broken].verdict == "held"
    assert verdicts(schemes=schemes, findings=[finding(0.2, attack="weight-delta")])[broken].verdict == "not held"
    labels = "F, broken: labels"
    told, untold = finding(0.9, attack="label recovery"), finding(0.05, attack="label recovery")
    assert verdicts(schemes=schemes, findings=[told])[labels].verdict == "held"
    assert verdicts(schemes=schemes, findings=[untold])[labels].verdict == "not tested"
    assert verdicts(schemes=noised, findings=[told])[labels].verdict == "not tested"


# --- words ----------------------------------------------------------------------------------------------------------
def test_the_page_says_all_of_it() -> None:
    page = markdown(document())
    assert "| reconstruction for a test | psnr, dB | b | 0 | 0.5 (0.5 to 0.5): 50 % |  | 1 |" in page
    assert "Schemes: [1] asymmetric, noise none; [2] trusted." in page
    assert "epsilon at least 0.5" in page
    assert "job, trusted: why" in page
    assert len(finding_rows(document(), brief=True)) == 1, "of each attack and metric the worst layer"
    varied = replace(document(), findings=(finding(), finding(audited="asymmetric, noise none, integrity off")))
    assert [each[0] for each in finding_rows(varied, brief=True)] == [
        "reconstruction for a test",
        "reconstruction for a test, integrity off",
    ]
    lines = claims_lines(replace(document(), claims=decide(Evidence(schemes=[scheme()]))))
    assert lines[-1].startswith("Not tested by this audit: A1; A2")
    assert any(line.startswith("F1: Held:") for line in lines)
    assert to_json(document())["findings"][2]["position_percent"] is None
