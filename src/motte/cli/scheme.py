"""The scheme of a bundle or a plan as it is typed: ``--scheme asymmetric --noise none --rank schedule ...``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from motte.cli.output import Column, Line, table
from motte.errors import SettingError

if TYPE_CHECKING:
    from rich.table import Table

    from motte.offload.settings import Asymmetric
    from motte.plan.offload import OffloadPlan, Side

T = TypeVar("T", int, float)

_SCHEME = "Scheme: what an accelerator may compute"
_RANKS = "fixed:R, schedule[:START,FACTOR,CAP], energy:SHARE[,CAP] or entropy[:CAP]"
_NOISES = "none, or gaussian:CLIP,MULTIPLIER such as gaussian:1.0,0.5"


@dataclass(frozen=True, slots=True)
class SchemeOptions:
    """The settings of a scheme. None: not given."""

    scheme: Annotated[
        Literal["asymmetric"] | None,
        typer.Option(
            "--scheme",
            rich_help_panel=_SCHEME,
            help="Let the layers of --public-weights run split: principal part inside, residual on an accelerator.",
        ),
    ] = None
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            metavar="NOISE",
            rich_help_panel=_SCHEME,
            help=f"{_NOISES}: the clip of each sample's residual, and the noise over that clip. Needed by --scheme.",
        ),
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="RULE",
            rich_help_panel=_SCHEME,
            help=f"Principal channels that stay inside: {_RANKS}. (default: schedule:2,2,32)",
        ),
    ] = None
    integrity: Annotated[
        Literal["freivalds", "off"] | None,
        typer.Option(
            "--integrity",
            rich_help_panel=_SCHEME,
            help="Check every answer; off only for an accelerator that is curious but honest. (default: freivalds)",
        ),
    ] = None
    integrity_vectors: Annotated[
        int | None,
        typer.Option(
            "--integrity-vectors",
            metavar="N",
            min=1,
            max=8,
            rich_help_panel=_SCHEME,
            help="Random vectors of each check. (default: 2)",
        ),
    ] = None
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            metavar="N",
            min=1,
            max=16,
            rich_help_panel=_SCHEME,
            help="Iterations of the decomposition. (default: 3)",
        ),
    ] = None
    decomposition: Annotated[
        Literal["als", "range-finder"] | None,
        typer.Option("--decomposition", rich_help_panel=_SCHEME, help="How it is computed. (default: range-finder)"),
    ] = None
    residual_dtype: Annotated[
        Literal["same", "float32", "bfloat16"] | None,
        typer.Option("--residual-dtype", rich_help_panel=_SCHEME, help="Element type of what leaves. (default: same)"),
    ] = None

    def make(self) -> Asymmetric | None:
        """The validated settings; None without ``--scheme``.

        Raises:
            SettingError: a setting without its scheme, no word on noise, or a value that none has.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if self.scheme is None:
            if given:
                raise SettingError(
                    "a setting of a scheme without a scheme",
                    got=", ".join("--" + name.replace("_", "-") for name in given),
                    hint="add --scheme asymmetric",
                )
            return None
        if self.noise is None:
            raise SettingError(
                "say whether what leaves is noised",
                where="--noise",
                expected=_NOISES,
                hint="with none nothing of the residual is hidden from the accelerator",
            )
        from motte.offload.settings import Asymmetric
        from motte.offload.words import parse_noise, parse_rank

        del given["scheme"]
        given["noise"] = parse_noise(self.noise)
        if self.rank is not None:
            given["rank"] = parse_rank(self.rank)
        return Asymmetric(**given)


def offload_json(section: OffloadPlan) -> dict[str, Any]:
    """The offload section of a plan as plain values."""
    noise = section.noise
    return {
        "scheme": section.scheme,
        "rank": [section.rank.rule, *section.rank.numbers],
        "iterations": section.iterations,
        "decomposition": section.decomposition,
        "residual_dtype": section.residual_dtype,
        "noise": None
        if noise is None
        else {
            "adjacency": noise.adjacency,
            "mechanisms": {each.name: [each.clip, each.noise_multiplier] for each in noise.mechanisms},
        },
        "integrity": section.integrity,
        "integrity_vectors": section.integrity_vectors,
        "gpu_references": [{"driver": each.driver, "vbios": each.vbios} for each in section.gpu_references],
        "layers": [
            {"name": each.name, "side": each.side, "inside": each.side != "split", "reason": each.reason}
            for each in section.layers
        ],
    }


def _side_text(side: Side) -> str:
    """Where a layer runs, in words: a confidential GPU is inside too."""
    return "inside, GPU" if side == "confidential-gpu" else side


def offload_lines(section: OffloadPlan | None) -> list[Table | Line]:
    """The offload section for people: the settings in a line, then every layer with its side and the reason."""
    if section is None:
        return []
    columns = (Column("layer", keep=True), Column("runs", keep=True), Column("because"))
    rows = [(each.name, _side_text(each.side), each.reason) for each in section.layers]
    on_gpu, of = len(section.confidential_gpu), f"of {len(section.layers)} layers"
    title = f"{len(section.split)} {of} may run split on an accelerator; their weights are public"
    if section.scheme == "trusted":
        title = f"{on_gpu} {of} run on a confidential GPU"
    return [table(columns, rows, title=title), *setting_lines(section)]


def setting_lines(section: OffloadPlan) -> list[Table | Line]:
    """The settings of a section in a line, and in another which GPU its layers may run on."""
    rank = " ".join([section.rank.rule, *(f"{each:g}" for each in section.rank.numbers)])
    said = [
        f"scheme: {section.scheme}, rank {rank}, {section.decomposition}",
        f"integrity {section.integrity}" + ("" if section.integrity == "off" else f" {section.integrity_vectors}"),
        "NO NOISE on what leaves" if section.noise is None else "what leaves is clipped and noised",
    ]
    said = ["nothing leaves"] if section.scheme == "trusted" else said
    found: list[Table | Line] = [Line("; ".join(said))]
    if section.confidential_gpu:
        names = ", ".join(section.confidential_gpu)
        known = "; ".join(f"driver {each.driver}, firmware {each.vbios}" for each in section.gpu_references)
        found.append(Line(f"inside, on a GPU that the worker's confidential VM proves: {names} (good: {known})"))
    return found
