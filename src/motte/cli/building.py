"""From the model that a command line names to a captured graph: what ``plan`` and ``seal`` share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.output import Output
from motte.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from motte.capture.export import Captured
    from motte.zoo.models import BuiltModel

RANDOM_WEIGHTS = "the weights are random: every answer of this model means nothing"
_WEIGHTS = "Weights"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, with which weights."""

    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A name of `motte zoo list`, or path/to/file.py:factory, which is run."),
    ]
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="safetensors, or a checkpoint of tensors only.", rich_help_panel=_WEIGHTS
        ),
    ] = None
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Untrained weights; every later output says so.", rich_help_panel=_WEIGHTS
        ),
    ] = False
    published: Annotated[
        str | None,
        typer.Option(
            "--published", metavar="SET", help="One published set, such as IMAGENET1K_V1.", rich_help_panel=_WEIGHTS
        ),
    ] = None
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input-shape",
            metavar="3,224,224",
            help="Shape of one input without its batch, for a model of your own.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None

    def build(self, out: Output) -> BuiltModel:
        """The model in eval mode; warns of random weights.

        Raises:
            MotteError: as :func:`motte.zoo.build`.
        """
        from motte.zoo import WeightsChoice, build

        if self.published is not None and (self.random_weights or self.weights is not None):
            raise SettingError(
                "weights are given twice",
                got="--published and " + ("--weights" if self.weights else "--random-weights"),
            )
        choice = WeightsChoice(
            file=self.weights, random_seed=0 if self.random_weights else None, published=self.published
        )
        with out.progress(f"building {self.model}"):
            built = build(self.model, weights=choice, input_shape=self.input_shape)
        if built.signature.weights_origin == "random":
            out.warn(RANDOM_WEIGHTS)
        return built


def capture_model(out: Output, built: BuiltModel) -> Captured:
    """The graph and the weights of ``built``.

    Raises:
        CaptureError: it cannot be captured.
    """
    from motte.zoo.models import capture_built

    with out.progress(f"capturing {built.name}"):
        return capture_built(built)


def example_inputs(built: BuiltModel, captured: Captured) -> list[Tensor]:
    """The example call of ``built`` in the order of the graph's inputs."""
    parameters = inspect.signature(built.model.forward).parameters
    given = dict(zip(parameters, built.example_args, strict=False)) | dict(built.example_kwargs)
    return [given[value.name] for value in captured.graph.inputs]
