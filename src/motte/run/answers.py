"""What the output tensors mean: the likeliest labels with their per cent, or an embedding. No torch.

Computed in float64. Whoever shows an answer of untrained weights shows that too: ``weights_origin`` is part of every
answer and of its JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motte.capture.signature import Signature, TextPreprocessing
from motte.errors import InputError, SettingError, UnsupportedError

Array = NDArray[Any]
RANDOM_NOTE = "random weights: the answer means nothing"


@dataclass(frozen=True, slots=True)
class Ranked:
    """One class: its index in the output, its name, and its softmax probability in [0, 1]."""

    index: int
    label: str
    probability: float

    @property
    def percent(self) -> str:
        """The probability as people read it: ``93.1 %``."""
        return f"{100 * self.probability:.1f} %"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one input; exactly one of ``top``, ``embedding`` and ``outputs`` is filled.

    ``top`` is ordered by falling probability. ``embedding`` is (dimensions,) float64, or (tokens, dimensions) where
    the signature asks for no pooling. ``outputs`` are the raw tensors of a model of which neither is known.
    """

    input: str
    model: str
    weights_origin: str
    top: tuple[Ranked, ...] = ()
    embedding: Array | None = None
    outputs: tuple[Array, ...] = ()

    @property
    def warning(self) -> str:
        """What every display of this answer must say; empty where there is nothing."""
        return RANDOM_NOTE if self.weights_origin == "random" else ""

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON values. Numbers that JSON lacks (NaN, infinities) become null."""
        body: dict[str, Any] = {"input": self.input, "model": self.model, "weights_origin": self.weights_origin}
        if self.warning:
            body["warning"] = self.warning
        if self.embedding is not None:
            body["embedding"] = _values(self.embedding)
        elif self.top:
            body["top"] = [{"index": r.index, "label": r.label, "probability": r.probability} for r in self.top]
        else:
            body["outputs"] = [
                {"shape": list(output.shape), "dtype": output.dtype.name, "values": _values(output)}
                for output in self.outputs
            ]
        return body


def softmax(logits: Array) -> NDArray[np.float64]:
    """Softmax over the last axis in float64; the largest logit is subtracted first, so nothing overflows."""
    wide = np.asarray(logits, dtype=np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result


def top_labels(logits: Array, labels: Sequence[str], topk: int) -> tuple[Ranked, ...]:
    """The ``topk`` likeliest classes of one input; equal logits keep the order of their index.

    Args:
        logits: (classes,), any float type.
        labels: one per class.
        topk: at least 1; more than there are classes gives all of them.

    Raises:
        SettingError: ``topk`` below 1.
        InputError: another number of labels than classes.
        UnsupportedError: logits that are not finite: no ranking of them means anything.
    """
    if topk < 1:
        raise SettingError("topk must be at least 1", got=str(topk))
    if logits.ndim != 1 or logits.shape[0] != len(labels):
        raise InputError(
            "the labels do not fit the output", expected=f"{len(labels)} classes", got=str(list(logits.shape))
        )
    if not np.isfinite(np.asarray(logits, dtype=np.float64)).all():
        raise UnsupportedError("the model answered with numbers that are not finite")
    probabilities = softmax(logits)
    order = np.argsort(-np.asarray(logits, dtype=np.float64), kind="stable")[:topk]
    return tuple(Ranked(int(i), labels[int(i)], float(probabilities[i])) for i in order)


def embed(hidden: Array, mask: Array | None, pre: TextPreprocessing) -> NDArray[np.float64]:
    """Pool and normalise the vectors of one text.

    Args:
        hidden: (tokens, dimensions), any float type.
        mask: (tokens,), nonzero where a token counts; None: all count.

    Returns:
        (dimensions,) for ``mean`` pooling, (tokens, dimensions) for ``none``.

    Raises:
        InputError: another shape, or a mask without any token.
    """
    if hidden.ndim != 2 or (mask is not None and mask.shape != hidden.shape[:1]):
        raise InputError("not the vectors of one text", expected="(tokens, dimensions)", got=str(list(hidden.shape)))
    vectors = np.asarray(hidden, dtype=np.float64)
    if mask is not None:
        vectors = vectors[np.asarray(mask) != 0]
    if vectors.shape[0] == 0:
        raise InputError("a text without any token")
    if pre.pooling == "mean":
        vectors = vectors.mean(axis=0)
    if pre.normalise:
        # The same floor as torch.nn.functional.normalize, so that a zero vector stays zero.
        norms = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
        vectors = vectors / np.maximum(norms, 1e-12)
    return vectors


def read_answers(
    outputs: Sequence[Array],
    signature: Signature,
    names: Sequence[str],
    *,
    topk: int = 5,
    mask: Array | None = None,
) -> list[Answer]:
    """The answers to one batch, in order.

    Args:
        outputs: the model's outputs, each with the batch on axis 0.
        signature: says what they mean. With labels the first output is (batch, classes) logits; of an encoder it is
            (batch, tokens, dimensions).
        names: one per input of the batch.
        mask: (batch, tokens), the attention mask that an encoder was given.

    Raises:
        InputError: outputs that do not fit the signature or the batch.
        SettingError, UnsupportedError: see :func:`top_labels`.
    """
    if not outputs or not _batched(outputs[0], len(names)):
        got = str(list(outputs[0].shape)) if outputs else "no output"
        raise InputError(
            "the output does not fit the batch", where=signature.model, expected=f"[{len(names)}, ...]", got=got
        )
    return [_answer(outputs, signature, name, i, len(names), topk, mask) for i, name in enumerate(names)]


def _answer(
    outputs: Sequence[Array], signature: Signature, name: str, index: int, batch: int, topk: int, mask: Array | None
) -> Answer:
    model, origin, pre = signature.model, signature.weights_origin, signature.preprocessing
    first = outputs[0]
    if signature.labels:
        return Answer(name, model, origin, top=top_labels(first[index], signature.labels, topk))
    if isinstance(pre, TextPreprocessing):
        attended = mask[index] if mask is not None else None
        return Answer(name, model, origin, embedding=embed(first[index], attended, pre))
    raw = tuple(output[index] if _batched(output, batch) else output for output in outputs)
    return Answer(name, model, origin, outputs=raw)


def _batched(output: Array, batch: int) -> bool:
    return output.ndim > 0 and output.shape[0] == batch


def _values(array: Array) -> Any:
    if array.ndim > 0:
        return [_values(item) for item in array]
    value = array.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
