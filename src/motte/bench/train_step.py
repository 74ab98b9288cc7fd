"""One training step in a peer process: forward, loss, backward, an SGD step; plain, on a device, or split.

Seeded noise is the data, and the index of an image its class: what is measured is time and memory, not learning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from motte.accelerator.process import LocalAccelerator
from motte.bench.peer_process import build_model
from motte.bench.request import ALL_BUT_FIRST_LAST, scheme_of
from motte.errors import SettingError, UnsupportedError
from motte.offload.layers import Trace, trace
from motte.offload.placement import Placement, place_all, place_listed, place_none
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric
from motte.offload.work import work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

RATE: Final = 1e-3
MOMENTUM: Final = 0.9


class TrainWork:
    """See :class:`motte.bench.peer_process.Work`."""

    def __init__(self, spec: Mapping[str, Any], inputs: Arrays) -> None:
        self._stack = ExitStack()
        self._session: Any = None
        self._moved = (0, 0)
        self._labels: Tensor | None = None
        try:
            self._prepare(spec, inputs)
            self._optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE, momentum=MOMENTUM)
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """One step.

        Raises:
            UnsupportedError: the model does not train on such a batch.
        """
        before = self._traffic()
        try:
            self._optimizer.zero_grad()
            self._loss().backward()
            self._optimizer.step()
        except ValueError as problem:
            raise UnsupportedError("the model does not train on this batch", got=str(problem)[:200]) from problem
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sent, received = self._traffic()
        self._moved = (sent - before[0], received - before[1])

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """The outputs in training mode, without a step."""
        with torch.no_grad():
            found = self._model(**self._tensors(inputs))
        return [found.cpu().contiguous().numpy()]

    def books(self) -> dict[str, Any]:
        """Bytes of the latest step, and multiply-adds of a step on each side as FLOPs."""
        return {
            "bytes_out": self._moved[0],
            "bytes_in": self._moved[1],
            "trusted_flops": self._flops[0],
            "outside_flops": self._flops[1],
            "split_layers": self._split_layers,
        }

    def close(self) -> None:
        """End the accelerator."""
        self._stack.close()

    def _prepare(self, spec: Mapping[str, Any], inputs: Arrays) -> None:
        asked = spec["train"]
        self._device = torch.device(spec["device"])
        self._crosses = spec["outside"]
        model = build_model(spec).train()
        self._inputs = self._tensors(inputs)
        seen = trace(model, (), self._inputs)
        scheme = scheme_of(asked["noise"], asked["rank"], asked["integrity"])
        if asked["mode"] == "asymmetric":
            placement = placed(seen, scheme, asked["layers"])
            local = self._stack.enter_context(LocalAccelerator(asked["accelerator"], threads=int(spec["threads"])))
            chosen = Asymmetric(
                noise=scheme.noise, rank=scheme.rank, integrity=scheme.integrity, offloaded_layers=placement.split
            )
            self._model: nn.Module = protect(model, chosen, accelerator=local.link)
            session: Any = self._model
            self._session = session.motte_session
        else:
            placement = place_none(seen.layers)
            self._model = model.to(self._device)
        counted = work(seen, None, scheme, placement)
        inside, outside = 2 * counted.inside("training").total, sum(_outside(row) for row in counted.rows)
        unprotected = asked["mode"] in ("native", "accelerator")
        self._flops = (0, inside) if unprotected else (inside, 2 * outside)
        self._split_layers = len(placement.split)

    def _loss(self) -> Tensor:
        inputs = {name: each.to(self._device) for name, each in self._inputs.items()} if self._crosses else self._inputs
        found = self._model(**inputs)
        first: Tensor = found[0] if isinstance(found, list | tuple) else found
        if first.dim() != 2:
            return first.float().square().mean()
        if self._labels is None:
            self._labels = torch.arange(first.shape[0]) % first.shape[1]
        return nn.functional.cross_entropy(first.float(), self._labels.to(first.device))

    def _traffic(self) -> tuple[int, int]:
        if self._session is None:
            return 0, 0
        stats = self._session.accelerator.stats().values()
        return sum(each.sent_bytes for each in stats), sum(each.received_bytes for each in stats)

    @staticmethod
    def _tensors(inputs: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(each) for name, each in inputs.items()}


def placed(seen: Trace, scheme: Asymmetric, words: Sequence[str]) -> Placement:
    """The layers that ``words`` choose among those that gain by running split.

    Raises:
        SettingError: none is left.
    """
    gaining = place_all(seen.layers, scheme).split
    chosen = [name for name in gaining if any(word == ALL_BUT_FIRST_LAST or fnmatchcase(name, word) for word in words)]
    if not chosen:
        raise SettingError("no layer is left to run on the accelerator", got=", ".join(words))
    return place_listed(seen.layers, scheme, chosen)


def _outside(row: Any) -> int:
    return int(row.outside_forward + row.outside_backward)
