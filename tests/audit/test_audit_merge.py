"""An audit in pieces: one document of several runs, whose newest word counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motte.audit import run as suites
from motte.audit.document import decode_audit
from motte.audit.interface import Check, Context, Job, Outcome, Scene, Scored, standard_job
from motte.audit.merge import added, read_audit, refuse_other
from motte.audit.run import Audit, AuditRequest, run_audit, write_audit
from motte.audit.scene import Audited
from motte.errors import InputError, RecordError, ResourceError, UnsupportedError
from motte.offload.settings import Asymmetric, Fixed

SCHEMES = (Audited("trusted"), Audited("asymmetric", Asymmetric(noise=None, rank=Fixed(2))))


class Peeks:
    """Looks at one layer, and names it in what it shows."""

    def __init__(self, peek: Any, layer: str) -> None:
        class Named(peek):
            def score(self, *given: Any) -> Scored:
                found = super().score(*given)
                pictures, curves = (
                    tuple(replace(each, title=f"{each.title}, {layer}") for each in some)
                    for some in (found.pictures, found.curves)
                )
                return replace(found, pictures=pictures, curves=curves)

        self.peek, self.layer = Named, layer

    def plan(self, scene: Scene) -> Sequence[Job]:
        return [standard_job(f"peek, {self.layer}", lambda: self.peek(self.layer), scene, "inference")]


class Tries:
    """One check, which may hold, or cannot be tried."""

    def __init__(self) -> None:
        self.held: bool | None = None

    def plan(self, scene: Scene) -> Sequence[Job]:
        def run(context: Context) -> Outcome:
            if self.held is None:
                raise UnsupportedError("not now")
            return Outcome(checks=(Check("a lie", "A2", self.held, "tried"),))

        return [Job("tries", run)] if scene.scheme is None else []


class Pieces:
    """The attacks of these tests, one run of each, and the folder."""

    def __init__(self, bars: Any, folder: Path) -> None:
        self.bars, self.folder, self.tries = bars, folder, Tries()
        self.planned = {"third": Peeks(bars.Peek, "3"), "fifth": Peeks(bars.Peek, "5"), "tries": self.tries}

    def request(self, *attacks: str, schemes: tuple[Audited, ...] = SCHEMES, **more: Any) -> AuditRequest:
        return AuditRequest(
            built=self.bars.built(), data=self.bars.data_set(), audited=schemes, attacks=attacks, **more
        )

    def run(self, *attacks: str) -> Audit:
        """One piece, added to what is there, and written."""
        old, request = read_audit(self.folder), self.request(*attacks)
        if old is not None:
            refuse_other(old, request)
            request = replace(request, measures=False)
        audit = run_audit(request)
        if old is not None:
            audit = added(old, audit)
        write_audit(audit, self.folder, overwrite=old is not None)
        found = decode_audit((self.folder / "audit.json").read_bytes(), where="x")
        assert found == audit.document
        assert all((self.folder / each.file).is_file() for each in found.pictures)
        assert len(list((self.folder / "audit").iterdir())) == len(found.pictures) + 2
        return audit


@pytest.fixture
def pieces(bars: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pieces:
    made = Pieces(bars, tmp_path / "out")
    monkeypatch.setattr(suites, "ATTACKS", dict.fromkeys(made.planned, ("", "")))
    monkeypatch.setattr(suites, "load", lambda name, **_options: made.planned[name])
    return made


def test_pieces_come_to_what_one_run_finds(pieces: Pieces) -> None:
    pieces.tries.held = True
    assert read_audit(pieces.folder) is None
    first = pieces.run("third").document
    names = [each.file for each in first.pictures]
    bytes_of = {name: (pieces.folder / name).read_bytes() for name in names}
    pieces.run("fifth")
    whole = pieces.run("tries")
    assert [each.file for each in whole.document.pictures][: len(names)] == names, "pictures keep their files"
    assert {name: (pieces.folder / name).read_bytes() for name in names} == bytes_of
    once = run_audit(pieces.request("third", "fifth", "tries")).document
    assert whole.document.findings == once.findings
    assert whole.document.claims == once.claims
    assert whole.document.checks == once.checks
    assert set(map(str, whole.document.figures)) == set(map(str, once.figures))
    assert [each.title for each in whole.document.pictures] == [each.title for each in once.pictures]
    assert len({each.file for each in whole.document.pictures}) == len(once.pictures)
    assert whole.document.seconds > first.seconds


def test_what_is_found_again_replaces_what_was_there(pieces: Pieces) -> None:
    failed = pieces.run("tries", "third").document
    assert [each.job for each in failed.failures] == ["tries"]
    pieces.tries.held = False
    again = pieces.run("tries", "third").document
    assert again.failures == ()
    assert [each.held for each in again.checks] == [False]
    assert again.findings == failed.findings
    assert len(again.pictures) == len(failed.pictures)
    assert {each.claim: each.verdict for each in again.claims}["A2"] == "not held"
    pieces.tries.held = True
    assert {each.claim: each.verdict for each in pieces.run("tries").document.claims}["A2"] == "held"


def test_another_audit_is_not_added_to(pieces: Pieces) -> None:
    pieces.tries.held = True
    audit = pieces.run("tries")
    old = audit.document
    for what, request in (
        ("seed", pieces.request(seed=1)),
        ("suite", pieces.request(suite="full")),
        ("schemes", pieces.request(schemes=SCHEMES[:1])),
        ("model", replace(pieces.request(), built=replace(pieces.bars.built(), name="other"))),
        ("data", replace(pieces.request(), data=replace(pieces.bars.data_set(), name="other"))),
    ):
        with pytest.raises(InputError, match=f"another {what}"):
            refuse_other(old, request)
    refuse_other(old, pieces.request("third", budget=0.5))
    with pytest.raises(InputError, match="another weights"):
        added(replace(old, weights_origin="elsewhere"), audit)
    (pieces.folder / "audit.json").write_bytes(b"{}")
    with pytest.raises(RecordError):
        read_audit(pieces.folder)


def test_a_picture_that_is_gone_is_an_error_that_changes_nothing(pieces: Pieces) -> None:
    old = pieces.run("third").document
    before = (pieces.folder / "audit.json").read_bytes()
    (pieces.folder / old.pictures[0].file).unlink()
    audit = added(old, run_audit(pieces.request("fifth")))
    with pytest.raises(ResourceError):
        write_audit(audit, pieces.folder, overwrite=True)
    assert (pieces.folder / "audit.json").read_bytes() == before
    assert [each.name for each in pieces.folder.iterdir() if each.name.startswith(".")] == []
