"""From a captured, planned model to a sealed bundle: lays weights out part by part and writes them encrypted.

Owner's side only: this file sees plaintext weights as torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from motte.capture.graph import Weight
from motte.errors import InputError
from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
from motte.seal.manifest import LaidOutPart, Manifest, dumps, lay_out_parts
from motte.seal.run_terms import RunTerms
from motte.seal.writer import SealReport, write_bundle

if TYPE_CHECKING:
    from torch import Tensor


class PartPlaintext:
    """One part's bytes, produced on demand: one weight a thread is materialised at a time beside the model's own."""

    def __init__(self, part: LaidOutPart, weights: Mapping[str, Tensor]) -> None:
        self.bytes = part.layout.bytes
        self._starts = sorted((offset, name) for name, offset in part.layout.offsets.items())
        self._table = part.part.graph.weights
        self._weights = weights
        self._latest: tuple[str, memoryview] | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the part's bytes from ``offset`` on."""
        buffer[:] = bytes(len(buffer))
        end = offset + len(buffer)
        for start, name in self._starts:
            stop = start + self._table[name].bytes
            low, high = max(start, offset), min(stop, end)
            if low < high:
                buffer[low - offset : high - offset] = self._data(name)[low - start : high - start]

    def _data(self, name: str) -> memoryview:
        # Read once: another thread may put its own weight there meanwhile.
        latest = self._latest
        if latest is None or latest[0] != name:
            latest = (name, memory_order_bytes(self._table[name], self._weights))
            self._latest = latest
        return latest[1]


def memory_order_bytes(weight: Weight, weights: Mapping[str, Tensor]) -> memoryview:
    """The bytes of ``weight`` in its own memory order, read from the captured tensors (a tile from its source).

    Raises:
        InputError: a tensor that is missing or of another shape than the graph says.
    """
    import torch

    source = weight.slice.source if weight.slice is not None else weight.name
    if source not in weights:
        raise InputError("a weight of the graph is missing", where=source)
    tensor = weights[source].detach()
    if weight.slice is not None:
        tensor = tensor.narrow(weight.slice.axis, weight.slice.start, weight.slice.stop - weight.slice.start)
    if tuple(tensor.shape) != weight.shape:
        raise InputError(
            "a weight has another shape", where=weight.name, expected=str(weight.shape), got=str(tuple(tensor.shape))
        )
    flat = tensor.permute(weight.order).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def seal_model(
    path: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    *,
    release: int,
    recipients: Sequence[RecipientPublicKey],
    signer: SignerPrivateKey,
    public_weights: Sequence[str] = (),
    run: RunTerms | None = None,
    threads: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SealReport:
    """Write the bundle ``path``.

    Args:
        weights: the captured tensors by name, as the graph's ``weights`` list them (untiled).
        public_weights: names that the signed header marks as allowed to leave the trusted side; none by default.
        run: the terms of its runs, as :func:`motte.seal.run_terms.terms_of` makes them from the plan.

    Raises:
        InputError: a weight that is missing, or a public name that the model does not have.
    """
    unknown = sorted(set(public_weights) - set(manifest.graph.weights))
    if unknown:
        raise InputError("no such weight to mark as public", got=", ".join(unknown[:5]), where="public_weights")
    parts = [PartPlaintext(part, weights) for part in lay_out_parts(manifest)]
    return write_bundle(
        path,
        release=release,
        manifest=dumps(manifest),
        parts=parts,
        recipients=recipients,
        signer=signer,
        public_weights=public_weights,
        run=run,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
    )
