"""Named workloads: the inputs of a measurement, the same on every machine, in memory before any clock runs.

``random`` draws from a seed; ``images`` decodes files that are given. Either way a :class:`Workload` holds finished
arrays: no file is read and nothing is decoded, scaled or drawn after it was made, so that no latency that is measured
with it can begin before its input was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from motte.digests import sha256_of
from motte.errors import InputError, ResourceError, SettingError
from motte.limits import MAX_INPUT_ARRAY_BYTES, MAX_PHOTO_FILE_BYTES

NAMES: Final = ("random", "images")
"""What a workload is called on a command line and in a record."""
MAX_REQUESTS: Final = 4096

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """One input of a model: numpy's name of its element type, and its shape with the batch in front."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests, each a read-only, contiguous array for every input of the model.

    Attributes:
        name: one of :data:`NAMES`.
        seed: what ``random`` was drawn from; None: nothing was drawn.
        requests: in the order in which they are asked; :meth:`request` goes round.
        labels: the true class of every sample of every request; None: not known, so that there is no accuracy.
    """

    name: str
    seed: int | None
    requests: tuple[Arrays, ...]
    labels: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise SettingError("unknown workload", expected=" or ".join(NAMES), got=self.name)
        if not 1 <= len(self.requests) <= MAX_REQUESTS:
            raise SettingError("out of range", where="requests", expected=f"1 to {MAX_REQUESTS}")
        if self.labels is not None and len(self.labels) != len(self.requests):
            raise SettingError("labels and requests do not match", got=f"{len(self.labels)} of {len(self.requests)}")
        for request in self.requests:
            for array in request.values():
                array.flags.writeable = False

    def request(self, index: int) -> Arrays:
        """The inputs of the ``index``-th request, counted from 0; after the last one comes the first."""
        return self.requests[index % len(self.requests)]

    @property
    def digest(self) -> str:
        """SHA-256 of names, element types, shapes and bytes of all requests, in hexadecimal: two runs that state the
        same one measured the same inputs."""
        return sha256_of(
            piece
            for request in self.requests
            for key in sorted(request)
            for piece in (f"{key}:{request[key].dtype.str}:{request[key].shape};".encode(), request[key].tobytes())
        ).hex()

    def parameters(self) -> dict[str, str | int]:
        """What a record says of it."""
        stated: dict[str, str | int] = {"workload": self.name, "workload_sha256": self.digest}
        return stated if self.seed is None else {**stated, "workload_seed": self.seed}


def random_workload(
    specs: Mapping[str, ArraySpec], *, seed: int = 0, requests: int = 1, ones: Sequence[str] = ()
) -> Workload:
    """Normal noise for floats; for integers and flags ones, which every vocabulary and mask allows.

    Args:
        specs: input name -> what it is.
        ones: inputs that are all ones whatever their type (an attention mask of floats).

    Raises:
        SettingError: no input, an element type that numpy does not know, a negative seed, more than fits into memory.
    """
    if not specs or seed < 0:
        raise SettingError("a workload needs inputs and a seed from 0 on", got=f"{len(specs)} inputs, seed {seed}")
    generator = np.random.default_rng(seed)
    return Workload(
        "random",
        seed,
        tuple(
            {name: _drawn(generator, spec, name, name in ones) for name, spec in specs.items()} for _ in range(requests)
        ),
    )


def image_workload(
    paths: Sequence[Path],
    decode: Callable[[bytes], Arrays],
    *,
    batch: int = 1,
    labels: Sequence[int] | None = None,
) -> Workload:
    """Every file read and decoded, joined in their order to requests of ``batch``; a rest that fills none is left out.

    Args:
        decode: one file's bytes -> the model's inputs for one sample, with a batch of 1 in front.
        labels: the true class of every file.

    Raises:
        InputError: fewer files than one batch. ResourceError: one cannot be read. What ``decode`` raises.
    """
    if batch < 1 or len(paths) < batch:
        raise InputError("too few images for one batch", expected=str(batch), got=str(len(paths)))
    if labels is not None and len(labels) != len(paths):
        raise SettingError("labels and images do not match", got=f"{len(labels)} of {len(paths)}")
    samples = [decode(_bytes(path)) for path in paths]
    starts = range(0, len(samples) - batch + 1, batch)
    joined = tuple(
        {name: np.concatenate([sample[name] for sample in samples[at : at + batch]]) for name in samples[0]}
        for at in starts
    )
    known = None if labels is None else tuple(tuple(labels[at : at + batch]) for at in starts)
    return Workload("images", None, joined, known)


def _drawn(generator: np.random.Generator, spec: ArraySpec, name: str, ones: bool) -> NDArray[Any]:
    try:
        kind = np.dtype(spec.dtype)
    except TypeError as problem:
        raise SettingError("no such element type", where=name, got=spec.dtype) from problem
    size = kind.itemsize * int(np.prod(spec.shape, dtype=object))
    if kind.kind not in "fiub" or not 0 <= size <= MAX_INPUT_ARRAY_BYTES:
        raise SettingError("no such input can be drawn", where=name, got=f"{spec.dtype} {spec.shape}")
    if kind.kind != "f" or ones:
        return np.ones(spec.shape, kind)
    return generator.standard_normal(spec.shape).astype(kind)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PHOTO_FILE_BYTES + 1)
    except OSError as problem:
        raise ResourceError("the image cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_PHOTO_FILE_BYTES:
        raise InputError("the image is too large", where=str(path), expected=f"at most {MAX_PHOTO_FILE_BYTES} bytes")
    return data
