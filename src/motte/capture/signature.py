"""What a caller must know to use a model: its inputs, how a photo or text becomes them, what the outputs mean.

Travels encrypted inside a bundle, beside the graph. Needs no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from motte.errors import GraphError
from motte.limits import MAX_NAME_BYTES
from motte.strict_json import Fields

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
COLOURS = ("grey", "rgb")
ORIGINS = ("published", "shipped", "file", "random")
MAX_LABELS = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """A photo -> (1, channels, crop, crop) float32, as the published weights were evaluated.

    Shorter side to ``resize`` pixels (0: no resize), centre crop of ``crop`` pixels (0: none), values / 255, then
    (value - mean) / std per channel.
    """

    colour: str
    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TextPreprocessing:
    """A text -> token ids: ``tokenizer`` is the JSON of the ``tokenizers`` library; at most ``max_tokens`` tokens.

    ``pooling`` says what the answer to one text is: ``mean`` over the attended tokens (a sentence embedding) or
    ``none`` (every token's vector). ``normalise`` divides the result by its Euclidean norm.
    """

    tokenizer: str
    max_tokens: int
    pooling: str
    normalise: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """How the model is called and read.

    ``weights_origin`` is ``published``, ``shipped``, ``file`` or ``random``; random weights are repeated in every
    output that shows an answer. ``labels`` name the classes of the first output, in order; empty when there are none.
    """

    model: str
    weights_origin: str
    preprocessing: ImagePreprocessing | TextPreprocessing | None = None
    labels: tuple[str, ...] = ()


def to_json(signature: Signature) -> dict[str, Any]:
    """The signature as JSON values; the inverse of :func:`from_json`."""
    pre = signature.preprocessing
    body: dict[str, Any] = {
        "model": signature.model,
        "weights_origin": signature.weights_origin,
        "labels": list(signature.labels),
    }
    if pre is not None:
        kind = "image" if isinstance(pre, ImagePreprocessing) else "text"
        body["preprocessing"] = {"kind": kind} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(pre).items()
        }
    return body


def from_json(value: object, *, where: str = "signature") -> Signature:
    """Read **unverified** JSON values.

    Raises:
        GraphError: a missing, unknown or ill-typed field.
    """
    fields = Fields(value, where=where, error=GraphError)
    signature = Signature(
        model=fields.text("model", max_bytes=MAX_NAME_BYTES),
        weights_origin=fields.choice("weights_origin", ORIGINS),
        labels=tuple(fields.items("labels", max_items=MAX_LABELS, read=_label)),
        preprocessing=_preprocessing(fields.fields("preprocessing")) if fields.has("preprocessing") else None,
    )
    fields.done()
    return signature


def _label(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_BYTES:
        raise GraphError("not a label", where=where, got=repr(value)[:80])
    return value


def _preprocessing(fields: Fields) -> ImagePreprocessing | TextPreprocessing:
    found: ImagePreprocessing | TextPreprocessing
    if fields.choice("kind", ("image", "text")) == "image":
        found = ImagePreprocessing(
            colour=fields.choice("colour", COLOURS),
            resize=fields.integer("resize", low=0, high=65536),
            crop=fields.integer("crop", low=0, high=65536),
            interpolation=fields.choice("interpolation", INTERPOLATIONS),
            mean=tuple(fields.items("mean", max_items=3, read=_finite)),
            std=tuple(fields.items("std", max_items=3, read=_finite)),
        )
        channels = 1 if found.colour == "grey" else 3
        if len(found.mean) != channels or len(found.std) != channels or not all(std > 0 for std in found.std):
            raise GraphError(
                "mean and std do not fit the channels", where=fields.where, expected=f"{channels} each, std above 0"
            )
    else:
        found = TextPreprocessing(
            tokenizer=fields.text("tokenizer", max_bytes=MAX_TOKENIZER_BYTES),
            max_tokens=fields.integer("max_tokens", low=1, high=1 << 20),
            pooling=fields.choice("pooling", ("none", "mean")),
            normalise=fields.boolean("normalise"),
        )
    fields.done()
    return found


def _finite(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e6:
        raise GraphError("not a number in range", where=where, got=repr(value)[:80])
    return float(value)
