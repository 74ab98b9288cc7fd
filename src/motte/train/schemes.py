"""Where a model runs: the one place in which the schemes of a training run differ.

==============  ===================================================================================================
``asymmetric``  convolutions and linear layers split between this process and an accelerator
``trusted``     the plain model in this process
``accelerator`` the plain model on the device, with inputs, labels and weights: **nothing is protected**
``lowrank``     research: split layers see the principal part only; nothing leaves
``residual``    research: split layers see the (noised) residual only; nothing leaves
==============  ===================================================================================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from motte.enclave.process import SIMULATED
from motte.errors import UnsupportedError
from motte.offload.settings import Asymmetric
from motte.train.distributed import World, own_address
from motte.train.settings import Dtype, TrainSettings

if TYPE_CHECKING:
    from motte.accelerator.interface import Accelerator, LayerTraffic
    from motte.link.recording import Recorder
    from motte.offload.protect import LayerSide
    from motte.offload.session import Session
    from motte.train.owner import OwnerKeys

_LOG = logging.getLogger("motte")
NOT_PROTECTED: Final = "NOT PROTECTED: inputs, labels, weights and gradients lie open on the device"
_RETRIES: Final = 1
"""How often in a row a lost accelerator is asked again, with the identical bytes."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A model in its place.

    Attributes:
        plain: holds the parameters and buffers that the others share; on ``device``.
        training: what a training step calls.
        evaluation: what the test split is evaluated with.
        session: of the split layers; None where nothing leaves through a link.
        device: where batches must lie.
        layers: where each parametrised layer runs, and why; empty where nothing is split.
    """

    plain: nn.Module
    training: nn.Module
    evaluation: nn.Module
    session: Session | None
    device: torch.device
    layers: tuple[LayerSide, ...]

    def traffic(self) -> Mapping[str, LayerTraffic]:
        """What crossed the link so far, by layer."""
        return {} if self.session is None else self.session.accelerator.stats()


@contextmanager
def placed(
    settings: TrainSettings,
    model: nn.Module,
    example: Any,
    *,
    world: World,
    threads: int,
    noise_key: bytes | None,
    recorder: Recorder | None = None,
) -> Iterator[Placed]:
    """``model`` under the scheme of ``settings``; an accelerator that was started here ends with the block.

    Args:
        model: freshly built, on the CPU.
        example: one input, of which only the shape matters.
        noise_key: 32 secret bytes, None: fresh ones.
        recorder: sees every frame to and from the accelerator.

    Raises:
        SettingError: the scheme does not fit the model. UnsupportedError: no such device. LinkError: no accelerator.
    """
    scheme = settings.offload_scheme()
    if settings.scheme == "accelerator":
        device = _device(settings.device)
        if world.main:
            _LOG.warning("%s (scheme accelerator)", NOT_PROTECTED)
        model.to(device)
        yield Placed(model, world.wrap(model), model, None, device, ())
        return
    if world.main:
        _LOG.warning("%s (enclave kind: process)", SIMULATED)
    if scheme is None:
        yield Placed(model, world.wrap(model), model, None, torch.device("cpu"), ())
        return
    from motte.offload.protect import protect

    if isinstance(scheme, Asymmetric):
        with _accelerator(settings, world, threads, recorder) as link:
            split = protect(model, scheme, accelerator=link, example_input=example, noise_key=noise_key)
            yield _of_split(model, split, world, inside=settings.evaluate == "inside")
        return
    # A research mode is evaluated as it is trained: its accuracy is what is asked for.
    half = protect(model, scheme, example_input=example)
    yield _of_split(model, half, world, inside=False)


def _of_split(model: nn.Module, split: nn.Module, world: World, *, inside: bool) -> Placed:
    found: Any = split
    evaluation = model if inside else split
    return Placed(
        model, world.wrap(split), evaluation, found.motte_session, torch.device("cpu"), tuple(found.motte_layers)
    )


@contextmanager
def _accelerator(
    settings: TrainSettings, world: World, threads: int, recorder: Recorder | None
) -> Iterator[Accelerator]:
    if settings.accelerator is not None:
        from motte.accelerator.connect import connect

        address = own_address(settings.accelerator, world)
        link: Accelerator = connect(address, pin=settings.accelerator_pin, retries=_RETRIES, recorder=recorder)
        try:
            yield link
        finally:
            link.close()
        return
    from motte.accelerator.process import LocalAccelerator

    _device(settings.device)
    with LocalAccelerator(settings.device, threads=threads, retries=_RETRIES, recorder=recorder) as local:
        yield local.link


def noise_key(keys: OwnerKeys | None, run_id: bytes, rank: int) -> bytes | None:
    """The key of this process's noise: its owner's keys name it, so that a run that continues has it again."""
    return None if keys is None else keys.noise_key(run_id, rank)


def resolved_dtype(settings: TrainSettings) -> Dtype:
    """The element type of products: as chosen, else bf16 where everything is inside and the CPU has AMX for it."""
    if settings.dtype is not None:
        return settings.dtype
    return "bf16" if settings.scheme == "trusted" and has_amx() else "fp32"


def resolved_threads(settings: TrainSettings, world: World) -> int:
    """Threads of this process: as chosen, else its share of all cores."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) // world.size)


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 tiles in hardware."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "amx_bf16" in flags.split()


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if (device.index or 0) >= count:
        raise UnsupportedError("no such device", where="device", expected=f"one of {count} CUDA devices", got=name)
    return device
