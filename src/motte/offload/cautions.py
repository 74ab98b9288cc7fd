"""What a protected model lets leave in spite of its scheme, said once, by name, before it leaves.

Nothing here is refused, since somebody may want it; each was found by the audit to give private data away
(docs/findings.md): residuals without noise, training without noise on output gradients (labels) and updates (what stays
inside), and a first or a last layer that was named for the outside. Said through the library's log, as its other
warnings are; the command line shows each once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from motte.linear.operation import LinearOperation
from motte.offload.settings import Asymmetric
from motte.offload.weight_delta_bound import determined_up_to

if TYPE_CHECKING:
    from motte.offload.layers import LinearLayer
    from motte.offload.placement import Placement

LOGGER: Final = "motte.offload.cautions"
_LOG = logging.getLogger(LOGGER)
_NAMED: Final = 3
"""Layers that a caution names before it counts."""


class Cautions:
    """Belongs to one protected model: learns what its layers meet, and says each thing once.

    Args:
        scheme: of the model.
    """

    def __init__(self, scheme: Asymmetric) -> None:
        self._scheme = scheme
        self._batch = 0
        self._determined: dict[str, int] = {}
        self._said: set[str] = set()

    def placed(self, split: Collection[str]) -> None:
        """The layers ``split`` will run split, in this order."""
        self._say("residuals", residual_caution(self._scheme, split))

    def forward(self, layer: str, operation: LinearOperation, shape: Sequence[int]) -> None:
        """``layer`` met an input of ``shape`` (N, ...) in a pass that may be followed by a backward one."""
        if "training" not in self._said:
            self._batch = max(self._batch, shape[0])
            self._determined[layer] = determined_up_to(operation, shape)

    def weight_gradient(self) -> None:
        """What a weight gradient is made of is about to leave; every layer of the step has met its input by now."""
        if "training" not in self._said:
            self._say("gradients", gradient_caution(self._scheme, list(self._determined)))
            self._say("training", training_caution(self._scheme, self._determined, self._batch))
            self._said.add("training")

    def met_input(self, layer: str) -> None:
        """``layer``, which somebody named for the outside, is about to run split on the model's raw input."""
        self._say("first", input_caution(self._scheme, layer))

    def ran_last(self, layer: str) -> None:
        """``layer``, which somebody named for the outside, was the last that ran in a pass in training mode."""
        self._say("last", label_caution(self._scheme, layer))

    def _say(self, what: str, text: str | None) -> None:
        if text is not None and what not in self._said:
            self._said.add(what)
            _LOG.warning("%s", text)


def placement_cautions(
    scheme: Asymmetric, placement: Placement, layers: Sequence[LinearLayer], *, batch: int | None
) -> tuple[str, ...]:
    """All that can be said of a placement before anything runs.

    Args:
        layers: of the same model, at any batch.
        batch: samples of a training step; None: it is for answers only, and nothing is said of gradients and labels.
    """
    split = [layer for layer in layers if layer.name in placement.split]
    said = [residual_caution(scheme, placement.split)]
    said += [input_caution(scheme, layer.name) for layer in split if layer.meets_raw_input][:1]
    if batch is not None:
        trained = [layer.name for layer in split if layer.weight_gradient]
        said += [label_caution(scheme, layer.name) for layer in split if layer.runs_last][:1]
        said += [gradient_caution(scheme, trained), training_caution(scheme, determined_samples(split), batch)]
    return tuple(text for text in said if text is not None)


def determined_samples(layers: Sequence[LinearLayer]) -> dict[str, int]:
    """Layer -> the most samples of a training step at which its weights before and after tell its whole input; 0: a
    single sample is too many. Layers that are not trained, or have no operator, are left out."""
    return {
        layer.name: min(determined_up_to(layer.operation, shape) for shape in layer.shapes)
        for layer in layers
        if layer.operation is not None and layer.shapes and layer.weight_gradient
    }


def residual_caution(scheme: Asymmetric, split: Collection[str]) -> str | None:
    """What leaves of the layers ``split`` at any time; None with noise, or where no layer is split."""
    if scheme.noise is not None or not split:
        return None
    plural = "s" * (len(split) != 1)
    return (
        f"noise none: what leaves of {len(split)} split layer{plural} ({_names(split)}) is a plain part of each "
        "activation, and images are reconstructed from the first of them; give noise: more trusted_layers only leave "
        "that to the layers after them"
    )


def input_caution(scheme: Asymmetric, layer: str) -> str | None:
    """What leaves of a ``layer`` that meets the model's raw input; None with noise."""
    if scheme.noise is not None:
        return None
    return f"{layer} runs split on the raw input, and a part of it leaves without noise: name it in trusted_layers"


def label_caution(scheme: Asymmetric, layer: str) -> str | None:
    """What training leaves of a ``layer`` that runs last; None with noise on gradients."""
    if scheme.noise is not None and scheme.noise.gradient is not None:
        return None
    return (
        f"{layer} runs last, and split: in training its output gradient leaves without noise and tells the label of "
        "every sample: name it in trusted_layers"
    )


def gradient_caution(scheme: Asymmetric, trained: Sequence[str]) -> str | None:
    """What the output gradients of the split layers ``trained``, in the order in which they run, tell; None with noise
    on them, or where there are none."""
    if not trained or (scheme.noise is not None and scheme.noise.gradient is not None):
        return None
    return (
        f"training without noise on gradients: output gradients leave as they are, up to {trained[-1]}, and while a "
        "model has learnt little those of its later layers tell the label of every sample: give noise for gradient"
    )


def training_caution(scheme: Asymmetric, determined: Mapping[str, int], batch: int) -> str | None:
    """What a training step leaves beside that; None where it determines no layer's input.

    Args:
        determined: layer -> the most samples of a step at which its system is determined
            (:func:`motte.offload.weight_delta_bound.determined_up_to`).
        batch: samples of a step.
    """
    noise = scheme.noise
    if noise is not None and (noise.gradient is not None or noise.update is not None):
        return None
    found = [layer for layer, most in determined.items() if batch <= most]
    if not found:
        return None
    most, plural = max(determined[layer] for layer in found), "s" * (batch != 1)
    return (
        f"training without noise on gradients and updates: a step on {batch} sample{plural} gives away what stays "
        f"inside of {len(found)} of {len(determined)} split layers ({_names(found)}), because their weights before and "
        "after it are as many equations as it has unknowns: give noise for gradient and update, or name them in "
        "trusted_layers. Noise on residuals alone or a larger rank does not help; with more than "
        f"{most} samples a step no such system is determined"
    )


@contextmanager
def unspoken() -> Iterator[None]:
    """No caution is said within the block: for whoever runs a model in order to find out what leaves."""
    log = logging.getLogger(LOGGER)
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False


def _names(layers: Collection[str]) -> str:
    shown = list(layers)[:_NAMED]
    more = len(layers) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
