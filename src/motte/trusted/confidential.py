"""The layers of a loaded bundle that run whole on the GPU of this confidential VM, once it is proved. Imported for such
bundles alone; torch is loaded when there is a proof.

The worker asks its own GPU and its own guest, for a nonce that it drew itself, and verifies the answer as anybody else
would. Nobody hands it a verdict, a root or a reference: good measurements stand in the plan that the owner signed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import Evidence
from motte.attest.platforms import nvidia, nvml
from motte.attest.policy import AllOf, InsecureAllowSimulated, NotDebug, Platform
from motte.attest.report_data import NONCE_BYTES, Binding
from motte.attest.verify import verify
from motte.capture.graph import Graph
from motte.errors import AttestationError, ResourceError, UnsupportedError
from motte.offload.confidential_gpu import ProvedGpu, gpu_runners, stated_reference
from motte.offload.graph_layers import gpu_nodes
from motte.plan.offload import OffloadPlan
from motte.seal.header import BundleHeader

if TYPE_CHECKING:
    from motte.engines.interface import NodeRunner

_HINT = "use a SEV-SNP guest with one H100 or H200 in confidential-computing mode (docs/tee/nvidia.md)"


@dataclass(frozen=True, slots=True)
class OnGpu:
    """The layers of one bundle on one proved GPU. ``runners`` run their nodes in place of the engine."""

    gpu: ProvedGpu
    layers: tuple[str, ...]
    runners: Mapping[str, NodeRunner]

    def told(self) -> dict[str, Any]:
        """What a client may want to show: the layers, and what was proved of the GPU, when. Plain values."""
        details = self.gpu.verdict.claims.details
        return {
            "layers": list(self.layers),
            "device": self.gpu.device,
            "simulated": self.gpu.simulated,
            "proved_at": self.gpu.verdict.at.isoformat(timespec="seconds"),
            "guest": details["cpu_platform"],
            **{name: details[name] for name in ("gpu", "gpu_driver", "gpu_vbios")},
        }


def open_gpu(
    section: OffloadPlan, graph: Graph, header: BundleHeader, public_key: bytes, *, issue: Callable[[bytes], Evidence]
) -> OnGpu:
    """The layers of ``graph`` that ``section`` places on the GPU of this VM, which is proved here; arguments and errors
    as of :func:`prove`.

    Raises:
        BundleError: check M-4.
    """
    gpu = prove(section, header, public_key, issue=issue)
    return OnGpu(gpu, section.confidential_gpu, gpu_runners(gpu_nodes(graph, section, gpu), gpu))


def prove(
    section: OffloadPlan,
    header: BundleHeader,
    public_key: bytes,
    *,
    issue: Callable[[bytes], Evidence],
    ask: Callable[[bytes], nvml.GpuAnswer] | None = None,
    anchors: Anchors | None = None,
    insecure_allow_simulated: bool = False,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> ProvedGpu:
    """Prove the one GPU of this VM, to ourselves.

    Args:
        section: of the **authenticated** plan; its references decide which measurements are good.
        header: **verified**; the evidence is bound to the run that its owner signed.
        public_key: X25519 (32 bytes), of this worker.
        issue: makes evidence of the guest over 64 bytes.
        ask: asks the GPU; None: the driver's library.
        anchors: roots; None: the vendors' own. Its references are those of ``section``.
        insecure_allow_simulated: take evidence under other roots. No worker says so.
        clock: aware, UTC.

    Raises:
        AttestationError: this VM has no GPU that can prove itself (U-1); or the evidence is refused, under the number
            of its check. UnsupportedError: several GPUs (U-6). InputError: the owner signed no terms of runs.
    """
    configuration = RunConfiguration.of(header)
    binding = Binding(secrets.token_bytes(NONCE_BYTES), public_key, b"", configuration.digest())
    try:
        evidence = nvidia.issue(binding.report_data(), cpu=issue, gpu=ask or _ask_the_only_one)
    except ResourceError as problem:
        raise AttestationError(
            "layers are placed on a confidential GPU, and this machine cannot prove one",
            check="U-1",
            where=problem.where,
            expected="a confidential VM with its GPU",
            got=problem.message if problem.got is None else f"{problem.message}: {problem.got}",
            hint=_HINT,
        ) from problem
    conditions = (Platform(frozenset({"nvidia"})), NotDebug())
    permitted = (InsecureAllowSimulated(),) if insecure_allow_simulated else ()
    references = tuple(map(stated_reference, section.gpu_references))
    verdict = verify(
        evidence,
        AllOf(*permitted, *conditions),
        clock(),
        anchors=replace(anchors or Anchors(), nvidia_rim=references),
        binding=binding,
    )
    return ProvedGpu(
        verdict=verdict,
        binding=binding,
        now=clock(),
        insecure_allow_simulated=insecure_allow_simulated,
    )


def _ask_the_only_one(nonce: bytes) -> nvml.GpuAnswer:
    """A report does not say which device it is of, and CUDA may be told to count others than the driver: only where
    the driver itself has one GPU it is the one that will compute."""
    count = nvml.count_gpus()
    if count != 1:
        problem = UnsupportedError(
            "evidence of one GPU is not tied to one of several",
            expected="exactly one GPU in the guest",
            got=f"{count}",
            hint="pass exactly one GPU to the guest",
        )
        problem.check = "U-6"
        raise problem
    return nvml.read_gpu(nonce)
