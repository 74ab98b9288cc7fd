"""The options that the verbs of ``motte bench`` and ``motte compare`` share, and the request that they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.options import parse_dims
from motte.errors import InputError, SettingError

if TYPE_CHECKING:
    from motte.bench.request import Request

_WHAT = "What is measured"
_HOW = "How it is measured"
_SCHEME = "Scheme of asymmetric cases"
_RESULTS = "Results"
_WEIGHTS = "Weights"


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """Which weights the models get."""

    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Untrained weights: times hardly change.", rich_help_panel=_WEIGHTS),
    ] = False
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Of a single model.", rich_help_panel=_WEIGHTS),
    ] = None
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input-shape",
            metavar="3,224,224",
            help="Of one input, for a model of your own.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim",
            metavar="NAME=N",
            help="Size of a dynamic dimension other than the batch, such as sequence=128; repeat it for several.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class HowOptions:
    """How often, in what order, with how many threads."""

    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats", metavar="N", min=1, rich_help_panel=_HOW, help="Counted rounds, at least 5. (default: 10)"
        ),
    ] = None
    warmup: Annotated[
        int | None,
        typer.Option("--warmup", metavar="N", min=0, rich_help_panel=_HOW, help="Rounds before them. (default: 2)"),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, rich_help_panel=_HOW, help="Of inputs, orders and intervals.")
    ] = 0
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, max=256, rich_help_panel=_HOW, help="Of each process. (default: all cores)"
        ),
    ] = None
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", rich_help_panel=_HOW, help="Of the accelerator: cpu, or cuda:N.")
    ] = "cpu"
    bundles: Annotated[
        Path | None,
        typer.Option(
            "--bundles",
            metavar="DIR",
            rich_help_panel=_HOW,
            help="Keep sealed bundles there, with their keys, and use those that are there.",
        ),
    ] = None
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", rich_help_panel=_HOW, help="Sample CPU, memory and power at 20 Hz.")
    ] = True


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """What asymmetric cases send out."""

    noise: Annotated[
        str,
        typer.Option("--noise", metavar="NOISE", rich_help_panel=_SCHEME, help="none, or gaussian:CLIP,MULTIPLIER."),
    ] = "none"
    rank: Annotated[
        str,
        typer.Option("--rank", metavar="RULE", rich_help_panel=_SCHEME, help="Principal channels that stay inside."),
    ] = "schedule:2,2,32"
    integrity: Annotated[
        str, typer.Option("--integrity", metavar="WORD", rich_help_panel=_SCHEME, help="freivalds, or off.")
    ] = "freivalds"
    layers: Annotated[
        str,
        typer.Option(
            "--layers", metavar="LAYERS", rich_help_panel=_SCHEME, help="Which layers run split, as --public-weights."
        ),
    ] = "all-but-first-last"


@dataclass(frozen=True, slots=True)
class OutOptions:
    """Where results go, and two earlier ones to compare."""

    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", rich_help_panel=_RESULTS, help="Write them there, for `motte report`."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_RESULTS, help="Replace the results that lie there.")
    ] = False
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD NEW",
            rich_help_panel=_RESULTS,
            help="Measure nothing: compare two folders of results, and fail beyond --bound.",
        ),
    ] = None
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound",
            metavar="RATIO",
            rich_help_panel=_RESULTS,
            help="The most that a median may grow. (default: 1.10)",
        ),
    ] = None

    def check(self) -> None:
        """Refuse a folder that holds results already, before hours are spent on new ones.

        Raises:
            InputError: it does. SettingError: a bound without two runs.
        """
        if self.bound is not None and self.compare is None:
            raise SettingError("a bound is for two runs", got="--bound", hint="add --compare OLD NEW")
        if self.out_dir is not None and not self.overwrite and os.path.lexists(self.out_dir / "run.json"):
            raise InputError(
                "results lie there already", where=str(self.out_dir), hint="choose another folder, or say --overwrite"
            )


@dataclass(frozen=True, slots=True)
class WhatOptions:
    """Which models, in which parts, in which enclaves."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            rich_help_panel=_WHAT,
            help="As of `motte zoo list`, or file.py:factory. Repeat it, or join names with commas.",
        ),
    ] = None
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="MODES",
            rich_help_panel=_WHAT,
            help="Of native, resident, streamed, asymmetric, accelerator, joined by commas. (default: native,resident)",
        ),
    ] = None
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N", rich_help_panel=_WHAT, help="Batches, joined by commas.")
    ] = "1"


@dataclass(frozen=True, slots=True)
class PartOptions:
    """Into how many parts, on which engine, in which kind of enclave."""

    parts: Annotated[
        str | None,
        typer.Option(
            "--parts", metavar="N,N", rich_help_panel=_WHAT, help="Part counts, joined by commas. (default: 1)"
        ),
    ] = None
    cuts: Annotated[
        str | None,
        typer.Option(
            "--cuts",
            metavar="WORD",
            rich_help_panel=_WHAT,
            help="weights or memory: the largest part as small as can be; or published. (default: weights)",
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option("--engine", metavar="NAMES", rich_help_panel=_WHAT, help="Of torch, onnxruntime, openvino."),
    ] = "torch"
    enclave: Annotated[
        str,
        typer.Option(
            "--enclave", metavar="KINDS", rich_help_panel=_WHAT, help="Of process, gramine-direct, gramine-sgx, vm."
        ),
    ] = "process"
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="DIR", rich_help_panel=_WHAT, help="Of `motte enclave build`, for Gramine."),
    ] = None
    vm: Annotated[
        str | None, typer.Option("--vm", metavar="ADDRESS", rich_help_panel=_WHAT, help="Of a worker in a VM.")
    ] = None
    accelerator: Annotated[
        str,
        typer.Option(
            "--accelerator", metavar="ADDRESS", rich_help_panel=_WHAT, help="Of asymmetric cases; local starts one."
        ),
    ] = "local"


def words(text: str, *, option: str) -> tuple[str, ...]:
    """``a,b`` -> (a, b).

    Raises:
        SettingError: nothing between two commas.
    """
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise SettingError("a word is empty", where=option, got=repr(text)[:120])
    return found


def counts(text: str, *, option: str) -> tuple[int, ...]:
    """``1,12`` -> (1, 12).

    Raises:
        SettingError: not whole numbers.
    """
    found = words(text, option=option)
    if not all(word.isascii() and word.isdecimal() and len(word) < 9 for word in found):
        raise SettingError("not whole numbers", where=option, expected="such as 1,2,4", got=repr(text)[:120])
    return tuple(int(word) for word in found)


def make_request(
    verb: str,
    models: Sequence[str],
    how: HowOptions,
    *,
    modes: Sequence[str],
    weights: WeightOptions | None = None,
    where: PartOptions | None = None,
    scheme: SplitOptions | None = None,
    batches: Sequence[int] = (1,),
    **others: Any,
) -> Request:
    """The request that the options state; ``others`` are further fields of it, and win.

    Raises:
        SettingError, InputError, UnsupportedError: as :class:`motte.bench.request.Request`.
    """
    from motte.bench.request import Request

    given: dict[str, Any] = {
        "seed": how.seed,
        "threads": how.threads or min(256, len(os.sched_getaffinity(0))),
        "device": how.device,
        "bundles": how.bundles,
        "trace": how.trace,
    }
    given |= {name: value for name in ("repeats", "warmup") if (value := getattr(how, name)) is not None}
    if weights is not None:
        if weights.weights is not None and weights.random_weights:
            raise SettingError("weights are given twice", got="--weights and --random-weights")
        if weights.weights is not None and len(models) != 1:
            raise SettingError("one file of weights is for one model", where="--weights")
        names = ("random_weights", "weights", "input_shape")
        given |= {name: getattr(weights, name) for name in names}
        given["dims"] = parse_dims(weights.dim, None)
    if where is not None:
        given |= {
            "parts": counts(where.parts or "1", option="--parts"),
            "cuts": where.cuts or "weights",
            "engines": words(where.engine, option="--engine"),
            "enclaves": words(where.enclave, option="--enclave"),
            "image": where.image,
            "vm": where.vm,
            "accelerator": where.accelerator,
        }
    if scheme is not None:
        given |= {name: getattr(scheme, name) for name in ("noise", "rank", "integrity")}
        given["layers"] = words(scheme.layers, option="--layers")
    return Request(verb=verb, models=tuple(models), modes=tuple(modes), batches=tuple(batches), **(given | others))
