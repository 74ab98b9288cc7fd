"""Demanding evidence of a worker before anything is entrusted to it (``motte run --verify``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from motte.attest.anchors import Anchors
from motte.attest.policy import Policy
from motte.errors import AttestationError, ResourceError

if TYPE_CHECKING:
    from motte.attest.ra_tls_verify import Demand
    from motte.attest.verify import Verdict
    from motte.enclave.process import WorkerProcess
    from motte.link.standard_streams import ByteStream


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a client demands of a worker.

    Attributes:
        policy: decides on its verified claims; the nonce of the connection is given to it.
        anchors: roots and reference data; None: the vendors' own roots.
    """

    policy: Policy
    anchors: Anchors | None = None

    def demand(self, configuration_digest: bytes) -> Demand:
        """The same for one run, whose configuration (32 bytes) comes from the bundle that its owner signed."""
        from motte.attest.ra_tls_verify import Demand

        return Demand(self.policy, configuration_digest, self.anchors)


def attested(worker: WorkerProcess, demand: Demand, *, timeout_s: float) -> Verdict:
    """Go on with ``worker`` inside of TLS that ends in it, once its certificate's evidence satisfies ``demand``.

    Raises:
        EvidenceError, AttestationError: it is refused; nothing was sent but the bundle, which is ciphertext.
        LinkError: it closed the link, or did not answer in time. ResourceError: its kind has no evidence.
    """
    if worker.kind == "gramine-direct":
        # It would say so itself, in clear, where TLS is awaited.
        hint = "use gramine-sgx, vm, or a process with --evidence"
        raise ResourceError("a worker of this kind has no evidence", got=worker.kind, hint=hint)
    from motte.link.attested import attested_client

    found: list[Verdict] = []

    def change(stream: ByteStream) -> ByteStream:
        channel, verdict = attested_client(stream, demand, timeout_s=timeout_s)
        found.append(verdict)
        return channel

    worker.link.change_stream(change)
    verdict = found[0]
    binding = verdict.claims.binding
    if binding is None or binding.public_key != worker.hello.public_key:
        raise AttestationError(
            "the evidence speaks for another key than the one that the worker named",
            check="X-6",
            where="HELLO.public_key",
            expected=worker.hello.public_key.hex(),
            got="none" if binding is None else binding.public_key.hex(),
        )
    return verdict
