"""One audit from beginning to end: views, attacks, measures, claims, and the folder of results.

A job that ends in an error is listed as a failure, and the others go on: what it would have found is then not known. A
measured epsilon above the stated one is listed too; whoever runs the audit must treat it as a failure of motte.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from motte.audit.attacks.registry import ABOUT_WHAT_WAS_LEARNT, ATTACKS, load
from motte.audit.claims import Evidence, decide
from motte.audit.document import (
    AuditDocument,
    CurveData,
    Failure,
    PictureFile,
    SchemeReport,
    encode,
)
from motte.audit.interface import BUDGETS, Context, Outcome, Position, Suite, silent
from motte.audit.measures.exposure import exposure_figures
from motte.audit.measures.figure import Figure
from motte.audit.measures.fisher import fisher_figure
from motte.audit.measures.information import information_figures
from motte.audit.measures.patch_entropy import patch_entropy, profile_figures, write_csv, write_violin
from motte.audit.measures.spectrum import spectrum_figures
from motte.audit.observe import observed
from motte.audit.pictures import file_name, write_grid
from motte.audit.scene import Audited, SchemeScene, Stage, activations, make_stage, scenes_of
from motte.audit.views import SplitPipeline, in_process
from motte.errors import InputError, MotteError, ResourceError, SettingError
from motte.measure.provenance import package_versions
from motte.offload.cautions import unspoken
from motte.offload.modules import SplitModule
from motte.offload.protect import protect
from motte.seal.atomic import atomic_file

if TYPE_CHECKING:
    from motte.audit.decode import Decoded
    from motte.audit.interface import Job, Picture, Progress
    from motte.audit.measures.patch_entropy import Profile
    from motte.audit.views import Link
    from motte.train.data import DataSet
    from motte.zoo.models import BuiltModel

SUITE_SECONDS: Final[Mapping[Suite, float | None]] = {"quick": 360.0, "full": None}
"""What the attacks of a suite may take together, at a budget of 1; what is left is shared by the jobs still to come."""
_LEAST_SECONDS: Final = 3.0
_FISHER_IMAGES: Final[Mapping[Suite, int]] = {"quick": 4, "full": 32}
_PATCH_IMAGES: Final[Mapping[Suite, int]] = {"quick": 64, "full": 1024}
_FOLDER: Final = "audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRequest:
    """What is to be audited.

    Args:
        built: the user's model, in evaluation mode.
        data: opened; images with labels.
        audited: the schemes, in the order of the table.
        suite: ``quick`` has no shadow models, no LiRA and no GAN.
        budget: a factor on what an attacker may spend.
        attacks: by name; None: all.
        link: starts an accelerator for each view.
        lpips: weights of the learnt image metric; None: n/a.
        seconds: that all attacks may take together, shared among the jobs still to come; None: what the suite says.
        measures: whether what needs no attacker is measured too; a piece that is added to an audit has that already.

    Raises:
        SettingError: no scheme, one twice, an unknown attack, or not a number of seconds.
    """

    built: BuiltModel
    data: DataSet
    audited: tuple[Audited, ...]
    suite: Suite = "quick"
    seed: int = 0
    budget: float = 1.0
    attacks: tuple[str, ...] | None = None
    link: Link = field(default=in_process, repr=False)
    lpips: Path | None = None
    seconds: float | None = None
    measures: bool = True

    def __post_init__(self) -> None:
        words = [str(each) for each in self.audited]
        if not words or len(set(words)) != len(words):
            raise SettingError("name each scheme once, and one at least", got=", ".join(words) or "none")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise SettingError("not a number of seconds", where="seconds", got=str(self.seconds))
        for name in self.attacks or ():
            if name not in ATTACKS:
                raise SettingError("no attack of that name", expected=", ".join(ATTACKS), got=repr(name)[:80])


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found, and what is not text in it."""

    document: AuditDocument
    pictures: tuple[Picture, ...]
    """In the order of ``document.pictures``, less those in ``kept``."""
    profile: Profile | None
    """Of the data; None: nothing was measured, and what lies in the folder stays."""
    ran: tuple[tuple[str, str], ...] = ()
    """Scheme and name of every job that was tried."""
    kept: tuple[str, ...] = ()
    """Files of ``document.pictures`` that lie in the folder already (:mod:`motte.audit.merge`)."""

    @property
    def shown(self) -> tuple[tuple[PictureFile, Picture], ...]:
        """The pictures of this run with their descriptions."""
        described = (each for each in self.document.pictures if each.file not in self.kept)
        return tuple(zip(described, self.pictures, strict=True))


def run_audit(request: AuditRequest, *, progress: Progress = silent) -> Audit:
    """Run everything.

    Raises:
        MotteError: the model, the data or a scheme do not fit; a failing attack raises nothing.
    """
    with unspoken():  # what a scheme gives away is what is asked here
        return _run(request, progress)


def _run(request: AuditRequest, progress: Progress) -> Audit:
    began = time.monotonic()
    budget = BUDGETS[request.suite].scaled(request.budget)
    stage = make_stage(
        request.built, request.data, suite=request.suite, budget=budget, seed=request.seed, link=request.link
    )
    scenes = scenes_of(stage, request.audited)
    outcomes, failures, ran = _attacked(scenes, request, progress)
    progress(0, 1, "measures")
    profile = _profile(stage, request.suite) if request.measures else None
    reports = tuple(_report(scene) for scene in scenes)
    findings = tuple(finding for _, outcome in outcomes for finding in outcome.findings)
    checks = tuple(dict.fromkeys(check for _, outcome in outcomes for check in outcome.checks))
    epsilons = tuple((audited, each) for audited, outcome in outcomes for each in outcome.epsilons)
    shown = _shown_once(scenes, outcomes)
    figures = (
        *(_figures(scenes) if request.measures else ()),
        *_extra_figures(outcomes),
        *(() if profile is None else profile_figures(profile)),
    )
    document = AuditDocument(
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=package_versions(),
        model=stage.name,
        weights_origin=request.built.signature.weights_origin,
        data=request.data.name,
        provenance=request.data.provenance,
        suite=request.suite,
        seed=request.seed,
        budget=budget,
        seconds=time.monotonic() - began,
        schemes=reports,
        findings=findings,
        checks=checks,
        epsilons=epsilons,
        figures=figures,
        claims=decide(Evidence(schemes=reports, findings=findings, checks=checks, epsilons=epsilons)),
        pictures=tuple(_picture(number, audited, each) for number, (audited, each) in enumerate(shown)),
        curves=tuple(
            CurveData(
                title=each.title,
                audited=audited,
                position=each.position,
                x_label=each.x_label,
                y_label=each.y_label,
                log_axes=each.log_axes,
                points=each.points,
            )
            for audited, outcome in outcomes
            for each in outcome.curves
        ),
        failures=failures,
    )
    return Audit(document, tuple(each for _, each in shown), profile, ran)


# --- attacks --------------------------------------------------------------------------------------------------------
def _attacked(
    scenes: Sequence[SchemeScene], request: AuditRequest, progress: Progress
) -> tuple[list[tuple[str, Outcome]], tuple[Failure, ...], tuple[tuple[str, str], ...]]:
    outcomes: list[tuple[str, Outcome]] = []
    failures: list[Failure] = []
    jobs: list[tuple[SchemeScene, Job]] = []
    random = request.built.signature.weights_origin == "random"
    for name in ATTACKS if request.attacks is None else request.attacks:
        without = ABOUT_WHAT_WAS_LEARNT.get(name) if random else None
        if without is not None:
            failures += [Failure(scene.audited, name, f"n/a: {without}") for scene in scenes]
            continue
        for scene in scenes:
            try:
                jobs += [(scene, job) for job in load(name, lpips=request.lpips).plan(scene)]
            except MotteError as problem:
                failures.append(Failure(scene.audited, name, str(problem)[:2000]))
    limit = SUITE_SECONDS[request.suite]
    seconds = request.seconds or (None if limit is None else limit * request.budget)
    ends = None if seconds is None else time.monotonic() + seconds
    for number, (scene, job) in enumerate(jobs):
        progress(number, len(jobs), f"{job.name}, {scene.audited}")
        budget = scene.stage.budget
        if ends is not None:
            # A job has up to three positions.
            share = (ends - time.monotonic()) / (len(jobs) - number)
            budget = replace(budget, seconds=min(budget.seconds, max(_LEAST_SECONDS, share)))
        try:
            outcomes.append((scene.audited, job.run(Context(request.seed, budget, progress))))
        except MotteError as problem:
            failures.append(Failure(scene.audited, job.name, f"{type(problem).__name__}: {problem}"[:2000]))
    return outcomes, tuple(failures), tuple((scene.audited, job.name) for scene, job in jobs)


# --- what is not an attack ------------------------------------------------------------------------------------------
def _report(scene: SchemeScene) -> SchemeReport:
    images, _ = scene.stage.private("inference")
    order = list(activations(scene.model, images[:1]))
    scheme = scene.scheme
    declared = scene.outside if scene.everything_leaves else ()
    if scene.everything_leaves:
        declared = tuple(order)
    if scheme is not None:
        with in_process(_Nobody()) as link:
            split = protect(scene.model, scheme, accelerator=link, example_input=images[:1])
        declared = tuple(name for name, module in split.named_modules() if isinstance(module, SplitModule))
    rows = {
        phase: observed(_decoded(scene, phase), scene.truth(phase).activations or None).rows
        for phase in ("inference", "training")
    }
    return SchemeReport(
        audited=scene.audited,
        kind=scene.what.kind,
        noised=scheme is not None and scheme.noise is not None,
        chosen=scheme is not None and (scheme.trusted_layers is not None or scheme.offloaded_layers is not None),
        declared=declared,
        first=order[0],
        last=order[-1],
        inference=rows["inference"],
        training=rows["training"],
    )


class _Nobody:
    """Sees frames and keeps none."""

    def record(self, frame: object) -> None:
        """See :class:`motte.link.recording.Recorder`."""


def _decoded(scene: SchemeScene, phase: str) -> Decoded:
    from motte.audit.decode import Decoded

    view = scene.subject(Position.SCHEME, "training" if phase == "training" else "inference").view
    return Decoded(view.sightings, view.operations, 0)


def _figures(scenes: Sequence[SchemeScene]) -> tuple[Figure, ...]:
    stage = scenes[0].stage
    truth = stage.truth("inference")
    figures: list[Figure] = [*spectrum_figures(truth.activations, scenes[0].outside)]
    for scene in scenes:
        figures += exposure_figures(scene.subject(Position.SCHEME, "inference").view, truth.activations)
        figures += information_figures(scene)
        if scene.scheme is not None:
            few = truth.pixels()[: _FISHER_IMAGES[stage.suite]]
            figures.append(
                fisher_figure(
                    stage.model,
                    scene.scheme,
                    scene.outside,
                    few,
                    audited=scene.audited,
                    mean=stage.mean,
                    std=stage.std,
                    generator=Context(stage.seed, stage.budget).generator("fisher"),
                )
            )
    return tuple(figures)


def _extra_figures(outcomes: Sequence[tuple[str, Outcome]]) -> tuple[Figure, ...]:
    return tuple(
        Figure(name=name, audited=audited, layer=None, value=float(value), unit="1")
        for audited, outcome in outcomes
        for name, value in outcome.extra.items()
    )


def _profile(stage: Stage, suite: Suite) -> Profile:
    records = stage.data.test
    count = min(len(records), _PATCH_IMAGES[suite])
    return patch_entropy(records.read(np.arange(count, dtype=np.int64), None))


def _shown_once(scenes: Sequence[SchemeScene], outcomes: Sequence[tuple[str, Outcome]]) -> list[tuple[str, Picture]]:
    """Floor and ceiling look alike under every scheme, and are what all inside and all outside see."""
    whole = {scene.audited for scene in scenes if scene.scheme is None}
    alone = len(whole) == len(scenes)
    shown: list[tuple[str, Picture]] = []
    known: set[tuple[str, Position | None]] = set()
    for audited, outcome in outcomes:
        for picture in outcome.pictures:
            ends = picture.position in (Position.FLOOR, Position.CEILING)
            if (ends and (picture.title, picture.position) in known) or (not ends and audited in whole and not alone):
                continue
            known.add((picture.title, picture.position))
            shown.append((audited, picture))
    return shown


def _picture(number: int, audited: str, picture: Picture) -> PictureFile:
    words = (picture.title, audited, str(picture.position or ""))
    return PictureFile(
        title=picture.title,
        file=f"{_FOLDER}/{file_name(number, *words)}",
        audited=audited,
        position=picture.position,
        rows=tuple(title for title, _ in picture.rows),
    )


# --- the folder -----------------------------------------------------------------------------------------------------
def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder in which an audit lies already.

    Raises:
        InputError: one does, and ``overwrite`` is false.
    """
    if not overwrite and (os.path.lexists(folder / "audit.json") or os.path.lexists(folder / _FOLDER)):
        raise InputError("an audit lies there already", where=str(folder), hint="another --out, or --overwrite")


def write_audit(audit: Audit, folder: Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Write ``audit.json`` and the folder ``audit``; returns what was left out, and why.

    Raises:
        InputError: an audit lies there already. ResourceError: it cannot be written.
    """
    refuse_occupied(folder, overwrite=overwrite)
    left_out: list[str] = []
    partial = folder / f".{_FOLDER}.{os.urandom(6).hex()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name in (Path(each).name for each in audit.kept):
            shutil.copyfile(folder / _FOLDER / name, partial / name)
        for described, picture in audit.shown:
            write_grid(picture, partial / Path(described.file).name)
        left_out += _write_profile(audit, partial, old=folder / _FOLDER)
        if overwrite:
            shutil.rmtree(folder / _FOLDER, ignore_errors=True)
        partial.rename(folder / _FOLDER)
    except OSError as problem:
        raise ResourceError("cannot write an audit", where=str(folder), got=problem.strerror) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with atomic_file(folder / "audit.json", overwrite=overwrite) as fd, open(fd, "wb", closefd=False) as file:
        file.write(encode(audit.document))
    return tuple(left_out)


def _write_profile(audit: Audit, into: Path, *, old: Path) -> list[str]:
    if audit.profile is None:
        for each in old.glob("patch-entropy.*"):
            shutil.copyfile(each, into / each.name)
        return []
    write_csv(audit.profile, into / "patch-entropy.csv")
    try:
        write_violin(audit.profile, into / "patch-entropy.png", title=f"patch entropy of {audit.document.data}")
    except ResourceError as problem:
        return [f"patch-entropy.png: {problem.message}"]
    return []


def record_inference(request: AuditRequest, path: Path) -> None:
    """Run the records that are attacked at inference once, under the first asymmetric scheme, into a recording file.

    Raises:
        SettingError: no asymmetric scheme is audited, and nothing crosses under the others.
        InputError: the file exists. ResourceError: no room.
    """
    from motte.link.recording import RecordingFile

    first = next((each for each in request.audited if each.scheme is not None), None)
    if first is None:
        raise SettingError("only a scheme asymmetric has a link to record", where="recording")
    budget = BUDGETS[request.suite].scaled(request.budget)
    stage = make_stage(
        request.built, request.data, suite=request.suite, budget=budget, seed=request.seed, link=request.link
    )
    (scene,) = scenes_of(stage, [first])
    pipeline = scene.pipeline(Position.SCHEME)
    if isinstance(pipeline, SplitPipeline):
        with RecordingFile(path) as file:
            pipeline.record(stage.private("inference")[0], file)
