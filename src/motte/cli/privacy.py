"""``motte privacy``: what a training or inference configuration promises to one record, in figures and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motte.cli.output import Column, Line, Output, table
from motte.cli.verb import verb
from motte.errors import SettingError

if TYPE_CHECKING:
    from rich.table import Table

    from motte.offload.accounting import InferenceRun, TrainingRun
    from motte.offload.settings import Gaussian, Mechanism
    from motte.offload.statement import KindStatement, PrivacyStatement

_RUN = "What runs"
_NOISE = "Clip and noise"
_NO_NOISE_YET = 1.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How often a record is used, and by how many layers."""

    records: Annotated[
        int | None, typer.Option("--records", min=1, help="Training: records of the data set.", rich_help_panel=_RUN)
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Training: samples of a step, over all processes.", rich_help_panel=_RUN
        ),
    ] = None
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Training: uses of every record.", rich_help_panel=_RUN)
    ] = None
    queries: Annotated[
        int | None,
        typer.Option("--queries", min=1, help="Inference instead: queries about one record.", rich_help_panel=_RUN),
    ] = None
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers that run split.", rich_help_panel=_RUN)
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Instead of --layers: count those of this model of `motte train` by default.",
            rich_help_panel=_RUN,
        ),
    ] = None
    image_shape: Annotated[
        str,
        typer.Option("--image-shape", metavar="C,H,W", help="One input of --model.", rich_help_panel=_RUN),
    ] = "3,224,224"
    coupled: Annotated[
        bool,
        typer.Option(
            "--batch-norm/--no-batch-norm",
            help="Training: samples of a batch meet, by BatchNorm or a rank found per batch.",
            rich_help_panel=_RUN,
        ),
    ] = True
    trusted_parameters: Annotated[
        Literal["trained", "frozen"],
        typer.Option(
            "--inside",
            help="Training: whether anything but the split layers' weights learns.",
            rich_help_panel=_RUN,
        ),
    ] = "trained"


@dataclass(frozen=True, slots=True)
class NoiseOptions:
    """Clips, and either a noise multiplier or the epsilon to find one for."""

    residual_clip: Annotated[
        float | None,
        typer.Option(
            "--residual-clip",
            help="L2 norm of one sample's residual. Not given: it leaves as it is.",
            rich_help_panel=_NOISE,
        ),
    ] = None
    gradient_clip: Annotated[
        float | None, typer.Option("--gradient-clip", help="Of its output gradient.", rich_help_panel=_NOISE)
    ] = None
    update_clip: Annotated[
        float | None, typer.Option("--update-clip", help="Of its part of a weight update.", rich_help_panel=_NOISE)
    ] = None
    noise_multiplier: Annotated[
        float | None,
        typer.Option("--noise-multiplier", help="Standard deviation over clip.", rich_help_panel=_NOISE),
    ] = None
    epsilon: Annotated[
        float | None,
        typer.Option("--epsilon", help="Find the noise multiplier for this in all.", rich_help_panel=_NOISE),
    ] = None
    delta: Annotated[float, typer.Option("--delta", help="Below one over the records.", rich_help_panel=_NOISE)] = 1e-5
    adjacency: Annotated[
        Literal["replace", "add-remove"],
        typer.Option("--adjacency", help="One record replaced, or its place left empty.", rich_help_panel=_NOISE),
    ] = "replace"


@verb
def privacy(out: Output, run: RunOptions, noise: NoiseOptions) -> None:
    """Say what a configuration promises to one record: every release counted, one epsilon, plain words."""
    made = _made(out, run, noise)
    with out.progress("composing"):
        if noise.epsilon is not None:
            made = made.calibrated(noise.epsilon)
        statement = made.statement()
    document = statement.to_json() | {"layers": made.offloaded_layers}
    out.result(document, *show_statement(statement, made.offloaded_layers))


def _made(out: Output, run: RunOptions, noise: NoiseOptions) -> TrainingRun | InferenceRun:
    """The configuration that was typed.

    Raises:
        SettingError: contradictory, or not enough to count with.
    """
    from motte.offload.accounting import InferenceRun, TrainingRun

    training = (run.records, run.batch_size, run.epochs)
    if (run.queries is None) == all(each is None for each in training):
        expected = "--records, --batch-size and --epochs for training, or --queries for inference"
        raise SettingError("training or inference?", expected=expected)
    mechanisms = _gaussian(noise, inference=run.queries is not None)
    if run.queries is not None:
        layers = _layers(out, run)
        return InferenceRun(queries=run.queries, offloaded_layers=layers, noise=mechanisms, delta=noise.delta)
    if run.records is None or run.batch_size is None or run.epochs is None:
        raise SettingError("training needs all three", expected="--records, --batch-size and --epochs")
    return TrainingRun(
        records=run.records,
        batch_size=run.batch_size,
        epochs=run.epochs,
        offloaded_layers=_layers(out, run),
        noise=mechanisms,
        coupled_samples=run.batch_size if run.coupled else 1,
        trusted_parameters=run.trusted_parameters,
        delta=noise.delta,
    )


def _gaussian(options: NoiseOptions, *, inference: bool) -> Gaussian | None:
    from motte.offload.settings import Gaussian, Mechanism

    if options.noise_multiplier is not None and options.epsilon is not None:
        raise SettingError("the noise is given twice", got="--noise-multiplier and --epsilon")
    if inference and (options.gradient_clip is not None or options.update_clip is not None):
        raise SettingError("inference has neither gradients nor updates", got="--gradient-clip or --update-clip")
    multiplier = options.noise_multiplier
    if options.residual_clip is None:
        others = (options.gradient_clip, options.update_clip, multiplier, options.epsilon)
        if any(each is not None for each in others):
            raise SettingError("residuals leave too, and have no clip", expected="--residual-clip")
        return None
    if multiplier is None:
        if options.epsilon is None:
            raise SettingError("how much noise?", expected="--noise-multiplier, or --epsilon to find it")
        multiplier = _NO_NOISE_YET

    def mechanism(clip: float | None) -> Mechanism | None:
        return None if clip is None else Mechanism(clip, multiplier)

    return Gaussian(
        residual=Mechanism(options.residual_clip, multiplier),
        gradient=mechanism(options.gradient_clip),
        update=mechanism(options.update_clip),
        adjacency=options.adjacency,
    )


def _layers(out: Output, run: RunOptions) -> int:
    if (run.layers is None) == (run.model is None):
        raise SettingError("how many layers run split?", expected="one of --layers and --model")
    if run.layers is not None:
        return run.layers
    from motte.offload.layers import trace
    from motte.offload.placement import place_all
    from motte.offload.settings import Asymmetric
    from motte.train.models import build_model

    sizes = run.image_shape.split(",")
    if len(sizes) != 3 or not all(size.isascii() and size.isdigit() for size in sizes):
        raise SettingError("not the shape of an image", where="--image-shape", expected="C,H,W", got=run.image_shape)
    channels, height, width = (int(size) for size in sizes)
    with out.progress(f"counting the layers of {run.model}"):
        model = build_model(str(run.model), classes=1000, image_shape=(channels, height, width), seed=0)
        layers = trace(model, (2, channels, height, width)).layers
        split = set(place_all(layers, Asymmetric(noise=None)).split)
    count = sum(len(layer.shapes) for layer in layers if layer.name in split)
    if count == 0:
        raise SettingError("no layer of this model runs split by default, so nothing leaves", where=str(run.model))
    return count


def show_statement(statement: PrivacyStatement, layers: int) -> list[Table | Line]:
    """A statement for people: a row a kind of release, the figures, the sentences."""
    columns = (
        Column("release", keep=True),
        Column("clip", number=True),
        Column("multiplier", number=True),
        Column("sigma", number=True),
        Column("releases", number=True),
        Column("per record", number=True),
        Column("rows moved", number=True),
        Column("sensitivity", number=True),
    )
    neighbours = "one record replaced" if statement.adjacency == "replace" else "one record's place left empty"
    title = f"{statement.task}, {layers} split layer{'s' * (layers > 1)}, neighbours: {neighbours}"
    shown: list[Table | Line] = [table(columns, [_row(each) for each in statement.kinds], title=title)]
    shown.append(Line(f"epsilon per record: {epsilon_text(statement.epsilon)}   delta: {statement.delta:g}"))
    if statement.task == "training":
        text = epsilon_text(statement.forward_only_epsilon)
        shown.append(Line(f"forward only, no guarantee for training: {text}"))
    shown.append(Line(f"composed by {statement.accountant}"))
    shown += [Line(f"* {sentence}") for sentence in statement.sentences]
    return shown


def epsilon_text(epsilon: float) -> str:
    """Four significant digits, or ``infinite``."""
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite"


def _row(each: KindStatement) -> tuple[str, ...]:
    mechanism = each.mechanism
    numbers = (f"{each.releases:,}", f"{each.per_record:,}", f"{each.samples:,}")
    if mechanism is None:
        return each.kind, "none", "none", "none", *numbers, "unbounded"
    figures = (f"{mechanism.clip:.4g}", f"{mechanism.noise_multiplier:.4g}", f"{mechanism.sigma:.4g}")
    return each.kind, *figures, *numbers, f"{each.sensitivity:.4g} clips"
