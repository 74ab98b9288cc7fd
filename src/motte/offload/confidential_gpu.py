"""When ``cuda`` counts as inside: a GPU that was attested together with the confidential VM that drives it.

Outside is where nobody proved anything, so a GPU is outside. It becomes part of the trusted side only through a
:class:`ProvedGpu`, which exists only where composite evidence (:mod:`motte.attest.platforms.nvidia`: the GPU's report,
bound to its guest's) was verified, for this very process, under a policy. The checks are U-1 to U-6 of
docs/spec/evidence/snp_nvidia.md; each of them fails closed. Layers that are placed on it run whole: nothing is split,
no noise is added, and their weights need not be public.

What it does not show: that the GPU computes for this guest unless the measured guest is honest, and that the GPU keeps
NVIDIA's promises. A verdict is about a moment: whoever runs for days proves anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from motte.attest.platforms.nvidia import GPU_NOT_MEASURED
from motte.attest.platforms.nvidia_reference import GpuReference
from motte.attest.report_data import Binding
from motte.attest.verify import Verdict
from motte.errors import AttestationError, SettingError, UnsupportedError
from motte.plan.linear_nodes import linear_weight
from motte.plan.offload import PlannedGpuReference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from motte.capture.graph import Node
    from motte.engines.interface import NodeRunner

PLATFORM: Final = "nvidia"
MAX_AGE_S: Final = 3600.0
"""Oldest verdict that a process starts with."""
_CPU_PLATFORMS: Final = ("snp", "tdx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedGpu:
    """A GPU that counts as inside, because it was proved to.

    Args:
        verdict: of composite evidence that this process made.
        binding: what this process had that evidence made for; it holds the private half of its public key.
        now: aware, UTC, of this process's own clock.
        max_age_s: oldest verdict that is taken.
        insecure_allow_simulated: also take a verdict about SIMULATED evidence, which protects nothing.

    Raises:
        AttestationError: no verdict, one of another platform (U-1), for another process (U-2), about a GPU that can be
            debugged or was not measured (U-3), too old (U-4), or SIMULATED (U-5).
        UnsupportedError: this process sees no GPU, or several (U-6).
    """

    verdict: Verdict
    binding: Binding
    now: datetime
    max_age_s: float = MAX_AGE_S
    insecure_allow_simulated: bool = False

    def __post_init__(self) -> None:
        verdict: object = self.verdict
        if not isinstance(verdict, Verdict):
            raise _refused("U-1", "no verdict about a GPU", "a Verdict", type(verdict).__name__)
        claims = verdict.claims
        cpu = claims.details.get("cpu_platform", "")
        if claims.platform != PLATFORM or cpu not in _CPU_PLATFORMS or "gpu" not in claims.measurements:
            got = f"{claims.platform}, guest {cpu or 'none'}"
            raise _refused("U-1", "not evidence of a GPU with its guest", f"{PLATFORM} with snp or tdx", got)
        if claims.binding is None or claims.binding != self.binding:
            got = "no binding" if claims.binding is None else "another binding"
            raise _refused("U-2", "the evidence speaks for another process", "what this process made it for", got)
        if claims.debug or claims.tcb_status in (None, GPU_NOT_MEASURED):
            got = f"debug {claims.debug}, status {claims.tcb_status}"
            raise _refused("U-3", "a GPU or guest that can be debugged, or was not measured", "neither", got)
        age_s = (self.now - verdict.at).total_seconds()
        if not 0 <= age_s <= self.max_age_s <= MAX_AGE_S:
            expected = f"0 to {min(self.max_age_s, MAX_AGE_S):g} s"
            raise _refused("U-4", "the verdict is too old", expected, f"{age_s:g} s")
        if claims.simulated and self.insecure_allow_simulated is not True:
            raise _refused("U-5", "SIMULATED evidence: no hardware stands behind it", "hardware", "simulated")
        _require_one_gpu()

    @property
    def simulated(self) -> bool:
        """Whether no hardware stands behind it: every result says so."""
        return self.verdict.claims.simulated

    @property
    def device(self) -> str:
        """In torch's words; there is only one."""
        return "cuda:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidentialGpu:
    """The scheme in which linear layers run whole on a proved GPU. Nothing leaves the trusted side.

    Args:
        layers: names of the layers that run there; None: every convolution and linear layer.
    """

    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if layers is not None:
            if isinstance(layers, str) or not all(isinstance(each, str) for each in layers):
                raise SettingError("layers must be a sequence of names", got=repr(layers)[:200])
            object.__setattr__(self, "layers", tuple(layers))


def require_proved(names: tuple[str, ...], gpu: ProvedGpu | None, *, where: str) -> None:
    """Return only if no layer is placed on a confidential GPU, or there is one that was proved.

    Raises:
        AttestationError: there is none (U-1).
    """
    if names and not isinstance(gpu, ProvedGpu):
        raise AttestationError(
            "layers are placed on a confidential GPU, and no verdict proves that there is one",
            check="U-1",
            where=where,
            expected="ProvedGpu, from verified evidence of the GPU with its guest",
            got=", ".join(names)[:200],
            hint="place them inside, or split; a GPU that nobody attested is an accelerator like any other",
        )


def on_gpu(model: nn.Module, scheme: ConfidentialGpu, gpu: ProvedGpu | None) -> tuple[str, ...]:
    """Let linear layers of ``model`` run on ``gpu``, in place; the names of those that do.

    Weights stay in the guest's memory and are copied for each call.

    Raises:
        AttestationError: no proved GPU. SettingError: no such layer, or one that is no convolution or linear layer.
    """
    from motte.offload.modules import can_split, make_split, operation_of

    modules = {name: module for name, module in model.named_modules() if can_split(module)}
    wanted = tuple(modules) if scheme.layers is None else scheme.layers
    require_proved(wanted or ("every layer",), gpu, where=type(model).__name__)
    for name in wanted:
        if name not in modules:
            expected = ", ".join(modules)[:400]
            raise SettingError("no convolution or linear layer of the model", got=name, expected=expected)
    for name in wanted:
        make_split(modules[name], operation_of(modules[name]), _GpuRule(_target(gpu)))
    return wanted


def gpu_runners(nodes: Sequence[Node], gpu: ProvedGpu) -> Mapping[str, NodeRunner]:
    """What runs ``nodes`` of a captured graph on ``gpu``, by their names: the operations of the graph as they stand, on
    copies of their arguments. Results come back into the guest's memory.

    A weight is copied once, in the first run that needs it, and stays on the GPU: it comes from an authenticated part,
    which is the same every time. float32 is computed in full, not in TF32; that is a setting of the whole process.

    Raises:
        AttestationError: ``gpu`` is not a proved one (U-1).
    """
    import torch

    require_proved(tuple(node.name for node in nodes), gpu, where="gpu_runners")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device, held = _target(gpu), dict[str, Any]()
    return {node.name: _runner(node, device, held) for node in nodes}


def _runner(node: Node, device: Any, held: dict[str, Any]) -> NodeRunner:
    from motte.capture.tensors import overload

    operation, name = overload(node.op), linear_weight(node) or node.name

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
        if name not in held:
            # A copy also where the device is the one that it lies on: a streamed worker overwrites it.
            held[name] = weight.to(device, copy=True)
        added = None if bias is None else bias.to(device)
        found: Tensor = operation(x.to(device), held[name], added, *rest, **named)
        return found.to(x.device)

    return run


def planned_reference(data: bytes) -> PlannedGpuReference:
    """Good measurements as the owner states them (:class:`GpuReference`), in the form in which a plan carries them.

    Raises:
        FormatError: not a reference. InputError: an empty one.
    """
    stated = GpuReference.decode(data)
    return PlannedGpuReference(
        stated.driver,
        stated.vbios,
        tuple((number, tuple(sorted(good))) for number, good in sorted(stated.measurements.items())),
    )


def stated_reference(planned: PlannedGpuReference) -> bytes:
    """The way back: what a verifier takes as ``Anchors.nvidia_rim``."""
    values = {number: frozenset(good) for number, good in planned.measurements}
    return GpuReference(planned.driver, planned.vbios, values).encode()


class _GpuRule:
    """A rule of :mod:`motte.offload.rules`: the plain product, on another device of the trusted side."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def product(self, x: Tensor, weight: Tensor, inside: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """See :class:`motte.offload.rules.Rule`; gradients come back by the same way."""
        return inside(x.to(self._device), weight.to(self._device)).to(x.device)


def _target(gpu: ProvedGpu | None) -> Any:
    import torch

    if gpu is None:
        raise AttestationError("no proved GPU", check="U-1")
    return torch.device(gpu.device)


def _require_one_gpu() -> None:
    """Check U-6: evidence names no device number, so it is about the only one or about none."""
    import torch

    count = torch.cuda.device_count()
    if count != 1:
        problem = UnsupportedError(
            "evidence of one GPU is not tied to one of several, or there is none",
            expected="exactly one CUDA device",
            got=f"{count}",
            hint="pass exactly one GPU to the guest",
        )
        problem.check = "U-6"
        raise problem


def _refused(check: str, message: str, expected: str, got: str) -> AttestationError:
    return AttestationError(message, check=check, where="confidential-gpu", expected=expected, got=got)
