"""The section of an audit, with results beside it and alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from motte.audit.document import (
    AuditDocument,
    ClaimVerdict,
    CurveData,
    Failure,
    PictureFile,
    SchemeReport,
    encode,
)
from motte.audit.epsilon import EmpiricalEpsilon
from motte.audit.finding import QUICK, Bracket, Finding, Knowledge, Position
from motte.audit.interface import Check
from motte.audit.measures.exposure import Exposure
from motte.audit.measures.figure import Figure
from motte.audit.observe import Row
from motte.errors import RecordError
from motte.report.audit_section import audit_charts, audit_section
from motte.report.chart import Chart, NotDrawn
from motte.report.images import Inlined
from motte.report.write import make_report

HOSTILE = "<script>window.broken=3</script>"
SCHEME = "asymmetric, noise none " + HOSTILE


def finding(scheme: float, ceiling: float = 30.0, **changed: object) -> Finding:
    made = Finding(
        attack="inversion", audited=SCHEME, metric="psnr", unit="dB", higher_is_worse=True, layer="layer1" + HOSTILE,
        floor=Bracket(10.0, 9.0, 11.0), scheme=Bracket(scheme, scheme - 1, scheme + 1),
        ceiling=Bracket(ceiling, ceiling - 1, ceiling + 1), knowledge=(Knowledge.RECORDING, Knowledge.WEIGHTS),
        budget=QUICK, seed=0, notes=("stopped early" + HOSTILE,),
    )  # fmt: skip
    return replace(made, **changed)


@pytest.fixture(scope="module")
def document() -> AuditDocument:
    row = Row("layer1" + HOSTILE, "sent", "activation", 2, ("float32",), ((1, 3, 8, 8),), 1536, 4.0,
              Exposure("layer1", 0.25, 0.5))  # fmt: skip
    scheme = SchemeReport(
        audited=SCHEME, kind="asymmetric", noised=False, chosen=False, declared=("layer1",), first="layer1", last="fc",
        inference=(row,), training=(),
    )  # fmt: skip
    roc = tuple(
        CurveData(title="ROC" + HOSTILE, audited=SCHEME, position=at, x_label="false positives",
                  y_label="true positives",
                  log_axes=True, points=((0.0, 0.0), (0.01, 0.02 * number), (1.0, 1.0)))
        for number, at in enumerate(Position, start=1)
    )  # fmt: skip
    epsilon = EmpiricalEpsilon(
        lower=0.4, upper=float("inf"), upper_because="no noise", delta=1e-5, adjacency="replace", confidence=0.95,
        method="hypothesis test", trials=20, counted="1 of 20",
    )  # fmt: skip
    return AuditDocument(
        made="2030-01-02T03:04:05Z", versions={"motte": "0.1.0"}, model="resnet20" + HOSTILE, weights_origin="trained",
        data="fashion-mnist", provenance="Debian", suite="quick", seed=0, budget=QUICK, seconds=12.0, schemes=(scheme,),
        findings=(finding(20.0), finding(10.5, metric="ssim"), finding(10.2, ceiling=10.8, metric="weak")),
        checks=(Check("a part of another bundle", "A2", True, "refused"), Check("rollback", "A4", False, "taken")),
        epsilons=((SCHEME, epsilon),),
        figures=(
            Figure(name="exposed energy", audited=SCHEME, layer="layer1", value=0.25, unit="share", note="a bound"),
            Figure(name="information", audited=None, layer=None, value=None, unit="nat", missing="too few samples"),
        ),
        claims=(ClaimVerdict("C3", "held", "nothing else crossed" + HOSTILE), ClaimVerdict("F1", "not held", "it did"),
                ClaimVerdict("E2", "not tested", "no TPM")),
        pictures=(
            PictureFile(title="rebuilt", file="audit/good.png", audited=SCHEME, position=Position.SCHEME, rows=("a",)),
            PictureFile(title="lost", file="audit/none.png", audited=SCHEME, position=None, rows=()),
        ),
        curves=roc, failures=(Failure(SCHEME, "gan", "no room"),),
    )  # fmt: skip


@pytest.fixture
def place(document: AuditDocument, tmp_path: Path) -> Path:
    (tmp_path / "audit").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "audit" / "good.png")
    (tmp_path / "audit.json").write_bytes(encode(document))
    return tmp_path


def test_an_audit_alone_makes_a_page(place: Path) -> None:
    made = make_report(place, figures=False)
    text = made.page.read_text(encoding="utf-8")
    assert made.answer is None
    assert HOSTILE not in text
    assert text.count("data:image/png;base64,") == 1
    assert 'alt="rebuilt (asymmetric, noise none' in text
    assert 'href="audit/none.png"' in text
    for said in ('<span class="held">held', '<span class="broken">not held', '<span class="quiet">not tested'):
        assert said in text
    for said in (
        "10.0 [9.00, 11.0]",
        "20.0 [19.0, 21.0]",
        "50.0",
        "does not tell its ceiling",
        "too few samples",
        "no noise",
    ):
        assert said in text
    assert "Attacks that ended in an error" in text


def test_an_audit_stands_beside_results(place: Path, folder: Path) -> None:
    for name in ("audit.json", "audit"):
        source = place / name
        target = folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    try:
        text = make_report(folder, figures=False).page.read_text(encoding="utf-8")
        assert '<section id="audit"' in text
        assert '<section id="tables"' in text
        assert 'href="audit.json"' in text
    finally:
        (folder / "audit.json").unlink()
        shutil.rmtree(folder / "audit")
        make_report(folder, figures=False)


def test_a_contradiction_is_an_alarm(document: AuditDocument, tmp_path: Path) -> None:
    assert 'role="alert"' not in audit_section(document, Inlined(tmp_path))
    broken = replace(document.epsilons[0][1], lower=3.0, upper=1.0)
    alarmed = audit_section(replace(document, epsilons=((SCHEME, broken),)), Inlined(tmp_path))
    assert 'role="alert"' in alarmed
    assert "more than motte" in alarmed


def test_figures_of_an_audit(document: AuditDocument) -> None:
    positions, roc = audit_charts(document)
    assert isinstance(positions, Chart)
    assert isinstance(roc, Chart)
    (series,) = positions.series
    assert series.y == (50.0, 2.5)
    assert "1 finding of attacks too weak" in positions.note
    assert [each.name for each in roc.series] == ["floor", "scheme", "ceiling"]
    assert roc.x.log
    assert roc.y.log
    assert all(each.x == (0.01, 1.0) for each in roc.series), "a point at zero has no place on a logarithmic axis"
    weak = next(audit_charts(replace(document, findings=(finding(10.2, ceiling=10.8),))))
    assert isinstance(weak, NotDrawn)


def test_a_malformed_audit_leaves_no_page(place: Path) -> None:
    (place / "audit.json").write_bytes(b'{"format":"motte-audit/1"}')
    with pytest.raises(RecordError):
        make_report(place)
    assert not (place / "report.html").exists()
