"""``motte audit MODEL`` and ``motte audit observe RUN``: attack what leaves, and list it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from motte.cli.building import ModelOptions
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.verb import FAILED, verb
from motte.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from motte.audit.document import AuditDocument
    from motte.audit.interface import Progress
    from motte.audit.observe import Observed, Row
    from motte.audit.run import Audit, AuditRequest
    from motte.audit.scene import Audited
    from motte.offload.settings import Asymmetric
    from motte.train.data import DataSet
    from motte.zoo.models import BuiltModel

_SCHEMES = "Schemes to judge"
_HOW = "How"
_DEFAULT_NOISES = ("none", "gaussian:residual=1.0/0.5,gradient=1.0/0.5,update=1.0/0.5")


class _ModelFirst(TyperGroup):
    """``motte audit MODEL`` stands for ``motte audit run MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` in front of what is no command of ours."""
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelFirst,
    help="Attack what leaves, and print what was learnt. `motte audit MODEL` stands for `motte audit run MODEL`.",
)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which records."""

    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="NAME", help="fashion-mnist, mnist, cifar10, cifar100, imagenet:PATH or folder:PATH."
        ),
    ]
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Where a public set lies; nothing is downloaded then."),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            min=1,
            help="Side of the images, for a model that takes several. (default: the model's own, else the data's)",
        ),
    ] = None

    def open(self, built: BuiltModel, *, seed: int) -> DataSet:
        """The data, in the size that ``built`` takes unless the user said another.

        Raises:
            SettingError: sealed data, which an audit would show in its pictures.
        """
        from motte.train.data import open_data

        if self.data.startswith("sealed:"):
            raise SettingError(
                "an audit shows records in its pictures: it takes no sealed data",
                where="--data",
                hint="audit on public data of the same kind",
            )
        size = _image_size(built) if self.image_size is None else self.image_size
        return open_data(self.data, data_dir=self.data_dir, seed=seed, image_size=size)


@dataclass(frozen=True, slots=True)
class JudgedOptions:
    """What is judged."""

    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            rich_help_panel=_SCHEMES,
            help="trusted, asymmetric or accelerator; repeat it. (default: all three)",
        ),
    ] = None
    noise: Annotated[
        list[str] | None,
        typer.Option(
            "--noise",
            metavar="NOISE",
            rich_help_panel=_SCHEMES,
            help="For asymmetric, as `motte train` takes it; repeat it to compare. (default: none, and "
            "gaussian with clip 1 and multiplier 0.5 on all that leaves)",
        ),
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="RULE",
            rich_help_panel=_SCHEMES,
            help="Principal channels that stay inside, as `motte train` takes it. (default: schedule:2,2,32)",
        ),
    ] = None
    integrity: Annotated[
        Literal["freivalds", "off"],
        typer.Option("--integrity", rich_help_panel=_SCHEMES, help="Whether answers are checked."),
    ] = "freivalds"
    trusted_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-layers", metavar="NAME", rich_help_panel=_SCHEMES, help="A layer that stays inside; repeat it."
        ),
    ] = None
    offload_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--offload-layers",
            metavar="NAME",
            rich_help_panel=_SCHEMES,
            help="A layer that may leave, and no other; repeat it: partial shielding.",
        ),
    ] = None

    def audited(self) -> tuple[Audited, ...]:
        """The schemes, in the order trusted, asymmetric by noise, accelerator.

        Raises:
            SettingError: an unknown scheme, or settings of asymmetric without it.
        """
        from motte.audit.scene import Audited

        known = ("trusted", "asymmetric", "accelerator")
        named = self.scheme or list(known)
        for name in named:
            if name not in known:
                raise SettingError("unknown scheme", where="--scheme", expected=", ".join(known), got=repr(name)[:80])
        mine = [self.noise, self.rank, self.trusted_layers, self.offload_layers]
        if "asymmetric" not in named and (any(each is not None for each in mine) or self.integrity == "off"):
            raise SettingError("these settings belong to the scheme asymmetric", hint="add --scheme asymmetric")
        found: list[Audited] = []
        if "trusted" in named:
            found.append(Audited("trusted"))
        if "asymmetric" in named:
            found += [Audited("asymmetric", self._asymmetric(each)) for each in self.noise or _DEFAULT_NOISES]
        if "accelerator" in named:
            found.append(Audited("accelerator"))
        return tuple(found)

    def _asymmetric(self, noise: str) -> Asymmetric:
        from motte.offload.settings import Asymmetric, Schedule
        from motte.offload.words import parse_noise, parse_rank

        return Asymmetric(
            noise=parse_noise(noise),
            rank=Schedule() if self.rank is None else parse_rank(self.rank),
            integrity=self.integrity,
            trusted_layers=None if self.trusted_layers is None else tuple(self.trusted_layers),
            offloaded_layers=None if self.offload_layers is None else tuple(self.offload_layers),
        )


@dataclass(frozen=True, slots=True)
class HowOptions:
    """How it is judged, and what is kept."""

    suite: Annotated[
        Literal["quick", "full"],
        typer.Option(
            "--suite", rich_help_panel=_HOW, help="quick has no shadow models, no LiRA and no GAN: minutes, not hours."
        ),
    ] = "quick"
    budget: Annotated[
        float,
        typer.Option(
            "--budget", metavar="FACTOR", rich_help_panel=_HOW, help="What attackers may spend, times this.", min=0.001
        ),
    ] = 1.0
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="M",
            rich_help_panel=_HOW,
            min=0.01,
            help="What all attacks may take together; each stops with the best it has. (default: quick 6 times the "
            "budget, full no limit)",
        ),
    ] = None
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack", metavar="NAME", rich_help_panel=_HOW, help="Only this attack; repeat it. none: measures only."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", rich_help_panel=_HOW, help="Of everything random.", min=0)
    ] = 0
    accelerator: Annotated[
        Literal["in-process", "local"],
        typer.Option(
            "--accelerator", rich_help_panel=_HOW, help="Where the watched accelerator runs: here, or a child process."
        ),
    ] = "in-process"
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", rich_help_panel=_HOW, help="Write audit.json and pictures there."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", rich_help_panel=_HOW, help="Replace an audit in --out.")] = (
        False
    )
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            rich_help_panel=_HOW,
            help="Add to the audit in --out, of the same model, data and schemes; what is found again replaces that.",
        ),
    ] = False
    lpips: Annotated[
        Path | None,
        typer.Option(
            "--lpips",
            metavar="FILE",
            rich_help_panel=_HOW,
            help="Weights of the LPIPS metric (safetensors, AlexNet); without them that figure is n/a.",
        ),
    ] = None
    findings: Annotated[
        Path | None,
        typer.Option(
            "--findings", metavar="FILE", rich_help_panel=_HOW, help="Write the findings as a page of Markdown."
        ),
    ] = None
    log_dir: Annotated[
        Path | None,
        typer.Option("--log-dir", metavar="DIR", rich_help_panel=_HOW, help="Event files for TensorBoard."),
    ] = None
    recording: Annotated[
        Path | None,
        typer.Option(
            "--recording",
            metavar="FILE",
            rich_help_panel=_HOW,
            help="Keep what crosses when the attacked records run under the first asymmetric scheme.",
        ),
    ] = None


@app.command()
@verb
def run(out: Output, model: ModelOptions, data: DataOptions, judged: JudgedOptions, how: HowOptions) -> None:
    """Attack a model under some schemes, each between a floor and a ceiling."""
    audited = judged.audited()
    built = model.build(out)
    from motte.audit.merge import added, read_audit, refuse_other
    from motte.audit.run import AuditRequest, refuse_occupied, run_audit, write_audit
    from motte.audit.views import in_process, local

    if how.add and (how.out is None or how.overwrite):
        raise SettingError("--add needs --out, and takes no --overwrite", where="--add")
    if how.out is not None:
        refuse_occupied(how.out, overwrite=how.overwrite or how.add)
    request = AuditRequest(
        built=built,
        data=data.open(built, seed=how.seed),
        audited=audited,
        suite=how.suite,
        seed=how.seed,
        budget=how.budget,
        attacks=None if how.attack is None else tuple(each for each in how.attack if each != "none"),
        link=in_process if how.accelerator == "in-process" else local,
        lpips=how.lpips,
        seconds=None if how.minutes is None else 60 * how.minutes,
    )
    old = read_audit(how.out) if how.add and how.out is not None else None
    if old is not None:
        refuse_other(old, request)
        request = replace(request, measures=not old.figures)
    if how.recording is not None:
        _record(request, how.recording)
    with out.progress(f"auditing {built.name}") as bar:

        def tell(done: int, total: int, what: str) -> None:
            bar.describe(what)
            bar.set(done, total)

        progress: Progress = tell
        audit = run_audit(request, progress=progress)
    if old is not None:
        audit = added(old, audit)
    if how.out is not None:
        for each in write_audit(audit, how.out, overwrite=how.overwrite or how.add):
            out.warn(f"left out: {each}")
    _extras(out, audit, how)
    from motte.audit.document import to_json

    out.result(to_json(audit.document), *_shown(audit.document))
    for failure in audit.document.failures:
        out.warn(f"{failure.job} under {failure.audited} found nothing: {failure.message}")
    if audit.document.contradictions or any("ContradictionError" in each.message for each in audit.document.failures):
        out.failure("an attack proves more than motte states: believe no epsilon of this version, and report it")
        raise typer.Exit(FAILED)


def _image_size(built: Any) -> int | None:
    from motte.capture.signature import ImagePreprocessing

    preprocessing = built.signature.preprocessing
    return preprocessing.crop or None if isinstance(preprocessing, ImagePreprocessing) else None


def _record(request: AuditRequest, path: Path) -> None:
    from motte.audit.run import record_inference

    record_inference(request, path)


def _extras(out: Output, audit: Audit, how: HowOptions) -> None:
    if how.findings is not None:
        from motte.audit.page import write_page

        write_page(audit.document, how.findings, overwrite=how.overwrite)
        out.note(f"findings in {how.findings}")
    if how.log_dir is not None:
        from motte.audit.tensorboard import write_tensorboard

        count = write_tensorboard(audit, how.log_dir)
        out.note(f"{count} scalars and images in {how.log_dir}")


# --- what is shown --------------------------------------------------------------------------------------------------
def _shown(document: AuditDocument) -> list[Any]:
    from motte.audit.page import claims_lines, exposure_rows, finding_rows, scheme_numbers

    columns = (
        Column("attack"),
        Column("metric"),
        Column("floor", number=True),
        *(Column(f"[{number}]", number=True) for number in range(1, len(document.schemes) + 1)),
        Column("ceiling", number=True),
    )
    left = (Column("scheme"), Column("layer"), Column("energy that left", number=True), Column("aligned", number=True))
    shown: list[Any] = [
        table(left, exposure_rows(document), title="what left at inference: the most exposed layer of each scheme")
    ]
    rows = finding_rows(document, brief=True)
    if rows:
        shown.append(table(columns, rows, title="what was learnt: 0 % = the attacker sees nothing, 100 % = everything"))
        shown += [Line(each) for each in scheme_numbers(document)]
    shown += [Line(f"{audited}: {each}") for audited, each in document.epsilons]
    shown += [Line(each) for each in claims_lines(document)]
    shown.append(Line(f"{document.suite} suite, {seconds_text(document.seconds)}, seed {document.seed}"))
    return shown


@app.command()
@verb
def observe(
    out: Output,
    recording: Annotated[Path, typer.Argument(metavar="RUN", help="A recording of a link to an accelerator.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The model that ran; with --data: the shares that left."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="NAME", help="The data of which the first test records ran, in order."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Where a public set lies.")] = None,
) -> None:
    """List every tensor that crossed, by layer and direction. A recording is signed by nobody."""
    from motte.audit.observe import count_inputs, observe_file

    if (model is None) != (data is None):
        raise SettingError("the share of an activation needs both --model and --data")
    activations = None
    if model is not None and data is not None:
        activations = _activations(out, ModelOptions(model), DataOptions(data, data_dir), count_inputs(recording))
    found = observe_file(recording, activations)
    out.result(_observed_json(found), *_observed(found, recording))


def _activations(out: Output, model: ModelOptions, data: DataOptions, count: int) -> Mapping[str, Any]:
    from motte.audit.finding import Budget
    from motte.audit.scene import activations, make_stage

    built = model.build(out)
    opened = data.open(built, seed=0)
    stage = make_stage(built, opened, suite="quick", budget=Budget(samples=count), seed=0)
    return activations(stage.model, stage.records("test", count)[0])


def _observed(found: Observed, path: Path) -> list[Any]:
    columns = (
        Column("layer", keep=True),
        Column("way", keep=True),
        Column("what", keep=True),
        Column("tensors"),
        Column("bytes", number=True),
        Column("share", number=True),
        Column("aligned", number=True),
    )
    shown: list[Any] = [table(columns, [_observed_row(row) for row in found.rows], title=str(path))]
    resent = f", {found.resent} tensors of them again with the same bytes" if found.resent else ""
    shown.append(Line(f"{bytes_text(found.bytes_out)} left in {found.steps} steps{resent}"))
    return shown


def _observed_row(row: Row) -> tuple[str, ...]:
    shapes = " ".join("x".join(map(str, shape)) for shape in row.shapes[:2])
    more = f" and {len(row.shapes) - 2} more" if len(row.shapes) > 2 else ""
    known = row.exposed
    return (
        row.layer,
        "out" if row.direction == "sent" else "in",
        row.kind,
        f"{row.tensors} of {shapes}{more}",
        bytes_text(row.bytes),
        "n/a" if known is None else f"{known.energy:.2%}",
        "n/a" if known is None else f"{known.aligned:.2%}",
    )


def _observed_json(found: Observed) -> dict[str, Any]:
    from motte.audit.document import row_json

    return {
        "rows": [row_json(row) for row in found.rows],
        "steps": found.steps,
        "resent": found.resent,
        "bytes_out": found.bytes_out,
    }
