"""One numbered list of lies that this installation must refuse: bundles, grants, frames, evidence, the key broker.

Every line is tried against the installed motte, with keys and files made on the spot: no test framework and no file of
this project is needed. A line holds if the lie meets the refusal of the named check, by class and by number, or if
what is honest is accepted. The specifications are docs/spec/bundle.md, evidence.md, broker.md and accelerator.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from motte.audit.interface import Check, Context, Job, Outcome, Position, Progress, Scored, silent
from motte.errors import MotteError

if TYPE_CHECKING:
    from motte.audit.interface import Scene

ACCEPTED: Final = "accepted"


@dataclass(frozen=True, slots=True)
class Trial:
    """One lie, or one honest thing, to be tried.

    Args:
        name: what it is.
        claim: number of the claim in THREAT_MODEL.md that it tests.
        expected: classes of errors, any of which refuses it; empty: it must be accepted.
        check: number of the check that must refuse it; None: any.
        act: tries it; returns if it was accepted.
    """

    name: str
    claim: str
    expected: tuple[type[MotteError], ...]
    check: str | None
    act: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Line:
    """What came of a trial.

    Attributes:
        number: of the line, from 1.
        area: ``bundle``, ``link``, ``accelerator``, ``evidence``, ``broker``.
        expected, got: ``SignatureError [B-4]``, ``accepted``, or how it crashed.
        held: whether it met what was expected.
    """

    number: int
    area: str
    name: str
    claim: str
    expected: str
    got: str
    held: bool

    def check(self) -> Check:
        """The line as the audit's tables have it."""
        return Check(f"{self.number}. {self.area}: {self.name}", self.claim, self.held, self.got)


@dataclass(frozen=True, slots=True)
class Conformance:
    """The whole list.

    Attributes:
        lines: in order.
        skipped: area -> why it could not be tried here.
    """

    lines: tuple[Line, ...]
    skipped: dict[str, str]

    @property
    def failed(self) -> tuple[Line, ...]:
        """Lines that did not hold."""
        return tuple(line for line in self.lines if not line.held)


def run_conformance(*, progress: Progress = silent) -> Conformance:
    """Try the whole list. Nothing remains of what is made for it.

    Args:
        progress: called after each line; may raise.
    """
    lines: list[Line] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="motte-conformance-") as folder:
        for area, trials in _areas(Path(folder), skipped):
            for trial in trials:
                lines.append(tried(trial, number=len(lines) + 1, area=area))
                progress(len(lines), max(len(lines), _ABOUT), "lines of the conformance list")
    return Conformance(tuple(lines), skipped)


_ABOUT: Final = 511
"""Lines, for a progress bar."""


def _areas(folder: Path, skipped: dict[str, str]) -> Iterator[tuple[str, Iterator[Trial]]]:
    from motte.audit.attacks.conformance_bundle import bundle_trials
    from motte.audit.attacks.conformance_link import accelerator_trials, link_trials

    yield "bundle", bundle_trials(folder)
    yield "link", link_trials()
    yield "accelerator", accelerator_trials()
    from motte.audit.attacks.conformance_evidence import evidence_trials

    yield "evidence", evidence_trials(_verifiable(skipped))
    from motte.errors import ResourceError
    from motte.provision.broker.extra import require_broker_packages

    try:
        require_broker_packages()
    except ResourceError as problem:
        skipped["broker"] = f"{problem.message}; {problem.hint}"
        return
    from motte.audit.attacks.conformance_broker import broker_trials

    yield "broker", broker_trials(folder)


def _verifiable(skipped: dict[str, str]) -> tuple[str, ...]:
    """Platforms whose verifiers are installed here."""
    if find_spec("dcap_qvl") is None:
        skipped["evidence of SGX and TDX"] = "dcap-qvl is not installed; pip install 'motte[attest]'"
        return ("snp", "nvidia", "tpm")
    return ("sgx", "tdx", "snp", "nvidia", "tpm")


def tried(trial: Trial, *, number: int = 1, area: str = "") -> Line:
    """Try one. Whatever it raises is its result."""
    try:
        trial.act()
        got, held = ACCEPTED, not trial.expected
    except MotteError as problem:
        got = type(problem).__name__ + ("" if problem.check is None else f" [{problem.check}]")
        known = isinstance(problem, trial.expected)
        held = known and (trial.check is None or problem.check == trial.check)
    except Exception as problem:  # noqa: BLE001 - a crash on bytes from outside is what is looked for
        got, held = f"crashed: {type(problem).__name__}: {problem}"[:200], False
    return Line(number, area, trial.name, trial.claim, _expected(trial), got, held)


def _expected(trial: Trial) -> str:
    names = " or ".join(each.__name__ for each in trial.expected) or ACCEPTED
    return names if trial.check is None else f"{names} [{trial.check}]"


class Conforming:
    """The planned list: one job, the same under every scheme, and so tried under the first of them only."""

    def plan(self, scene: Scene) -> Sequence[Job]:
        """One job."""
        return [Job("conformance", partial(run, scene))]


def run(scene: Scene, context: Context) -> Outcome:
    """The list as checks; nothing, where another scheme of the same audit had them."""
    kept, key = scene.known_scores("conformance", Position.FLOOR)
    if key in kept:
        return Outcome()
    kept[key] = Scored({})
    found = run_conformance(progress=context.progress)
    return Outcome(checks=tuple(line.check() for line in found.lines), extra={"lines": float(len(found.lines))})
