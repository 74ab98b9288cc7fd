"""``--gpu-layers``: which layers run whole on a confidential GPU, and which measurements of it are good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.anchoring import read_small
from motte.errors import SettingError
from motte.limits import MAX_GPU_REFERENCE_BYTES

if TYPE_CHECKING:
    from motte.capture.graph import Graph
    from motte.offload.placement import Placement
    from motte.plan.offload import PlannedGpuReference
    from motte.plan.plan import Tile

_PANEL = "Confidential GPU: what runs on it, inside"


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """Layers on the confidential GPU. None: not given."""

    gpu_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu-layers",
            metavar="LAYERS",
            rich_help_panel=_PANEL,
            help="Layers that run whole, inside, on a GPU that the worker's confidential VM proves: names and patterns"
            " such as features.10 or 'layer3.*', with commas or repeated. Nothing of them is public. Needs"
            " --nvidia-rim.",
        ),
    ] = None
    nvidia_rim: Annotated[
        list[Path] | None,
        typer.Option(
            "--nvidia-rim",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Good measurements of that GPU, sealed with the plan; repeatable.",
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether layers are named."""
        return bool(self.gpu_layers)

    def references(self) -> tuple[PlannedGpuReference, ...]:
        """The good measurements, as a plan carries them.

        Raises:
            SettingError: layers without measurements, or measurements without layers.
            InputError: a file that cannot be read. FormatError: not measurements.
        """
        if bool(self.gpu_layers) != bool(self.nvidia_rim):
            raise SettingError(
                "layers on a confidential GPU and its good measurements go together",
                expected="--gpu-layers LAYERS --nvidia-rim FILE",
                got="--nvidia-rim alone" if self.nvidia_rim else "--gpu-layers alone",
                hint="without good measurements a GPU counts as one that can be debugged (docs/tee/nvidia.md)",
            )
        if not self.nvidia_rim:
            return ()
        from motte.offload.confidential_gpu import planned_reference

        return tuple(planned_reference(read_small(each, MAX_GPU_REFERENCE_BYTES)) for each in self.nvidia_rim)

    def place(self, graph: Graph, placement: Placement | None, tiles: Sequence[Tile]) -> Placement:
        """``placement`` with the named layers on the GPU, whichever side they had; None: the others inside.

        Raises:
            SettingError: no such layers, or none that can run there.
        """
        from motte.offload.graph_layers import choose_gpu_layers

        return choose_gpu_layers(graph, self.gpu_layers or (), placement, tiles=tiles)
