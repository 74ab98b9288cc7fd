"""Where a run writes what it found on its way: TensorBoard for public data, a sealed log for private data.

Loss, accuracy and ranks tell whoever reads them about the data, so for private data, and inside an enclave, they go
into a sealed log (:mod:`motte.train.sealed_log`) unless the user says ``insecure_plaintext_log``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from motte.errors import ResourceError, SettingError, UnsupportedError
from motte.strict_json import canonical
from motte.train.owner import OwnerKeys
from motte.train.sealed_log import SealedLogWriter

if TYPE_CHECKING:
    from motte.accelerator.interface import LayerTraffic
    from motte.offload.timeline import Span

_NUMBERED: Final = re.compile(r"train-([0-9]{4,9})\.motte-log")
_ENCLAVE_MARK: Final = Path("/dev/attestation")
"""Gramine shows this folder to what runs inside an enclave."""


class TrainLog(Protocol):
    """Takes figures by optimizer step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Named figures of one step."""
        ...

    def ranks(self, step: int, ranks: Mapping[str, Sequence[int]]) -> None:
        """The ranks that each layer used since the last call, by layer."""
        ...

    def profile(self, step: int, spans: Sequence[Span], traffic: Mapping[str, LayerTraffic]) -> None:
        """The timeline of one step and what crossed the link so far."""
        ...

    def close(self) -> None:
        """Write everything out. Safe to call again."""
        ...


class NoLog:
    """Writes nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrainLog`."""

    def ranks(self, step: int, ranks: Mapping[str, Sequence[int]]) -> None:
        """See :class:`TrainLog`."""

    def profile(self, step: int, spans: Sequence[Span], traffic: Mapping[str, LayerTraffic]) -> None:
        """See :class:`TrainLog`."""

    def close(self) -> None:
        """See :class:`TrainLog`."""


class EntryLog:
    """A sealed log of entries ``{"kind": "scalars" | "ranks" | "profile", "step": ..., ...}``."""

    def __init__(self, writer: SealedLogWriter) -> None:
        self.writer = writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrainLog`."""
        self.writer.write({"kind": "scalars", "step": step, "values": dict(values)})

    def ranks(self, step: int, ranks: Mapping[str, Sequence[int]]) -> None:
        """See :class:`TrainLog`."""
        self.writer.write({"kind": "ranks", "step": step, "ranks": {name: list(each) for name, each in ranks.items()}})

    def profile(self, step: int, spans: Sequence[Span], traffic: Mapping[str, LayerTraffic]) -> None:
        """See :class:`TrainLog`."""
        for line in profile_lines(step, spans, traffic):
            self.writer.write(line)

    def close(self) -> None:
        """See :class:`TrainLog`."""
        self.writer.close()


class TensorBoardLog:
    """An event file of TensorBoard, and ``profile.jsonl`` beside it. Both lie in the clear.

    Raises:
        UnsupportedError: the optional package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise UnsupportedError(
                "a log in the clear is written by tensorboard, which is not installed",
                where="log_dir",
                hint="pip install tensorboard, or leave the log directory out",
            ) from problem
        _make(folder)
        self._profile = folder / "profile.jsonl"
        self._writer = SummaryWriter(log_dir=str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrainLog`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def ranks(self, step: int, ranks: Mapping[str, Sequence[int]]) -> None:
        """See :class:`TrainLog`."""
        import numpy as np

        for name, values in ranks.items():
            found = np.asarray(values, dtype=np.float64)
            self._writer.add_histogram(f"rank/{name}", found, step)

    def profile(self, step: int, spans: Sequence[Span], traffic: Mapping[str, LayerTraffic]) -> None:
        """See :class:`TrainLog`."""
        lines = b"".join(canonical(line) + b"\n" for line in profile_lines(step, spans, traffic))
        try:
            with self._profile.open("ab") as file:
                file.write(lines)
        except OSError as problem:
            raise ResourceError("cannot write", where=str(self._profile), got=problem.strerror) from problem

    def close(self) -> None:
        """See :class:`TrainLog`."""
        self._writer.close()


def profile_lines(step: int, spans: Sequence[Span], traffic: Mapping[str, LayerTraffic]) -> list[dict[str, Any]]:
    """One line per layer and step: seconds by phase and work, and the link's counts so far (bytes, frames, seconds)."""
    lines: list[dict[str, Any]] = []
    for layer in dict.fromkeys([*(span.layer for span in spans), *traffic]):
        own = [span for span in spans if span.layer == layer]
        timeline = [[span.phase, span.work, span.start_s, span.end_s] for span in own]
        line: dict[str, Any] = {"kind": "profile", "step": step, "layer": layer, "spans": timeline}
        if layer in traffic:
            counts = traffic[layer]
            line["link"] = {name: getattr(counts, name) for name in type(counts).__slots__}
        lines.append(line)
    return lines


def open_log(
    folder: Path | None, *, private: bool, insecure_plaintext: bool, keys: OwnerKeys | None, main: bool = True
) -> TrainLog:
    """The log of a run.

    Args:
        private: the data is; what is written is then sealed, unless ``insecure_plaintext``.
        keys: to whom it is sealed.
        main: whether this is the process of a distributed run that writes.

    Raises:
        SettingError: it must be sealed, and there is no key. UnsupportedError: no ``tensorboard``.
        ResourceError: the folder cannot be written.
    """
    if folder is None or not main:
        return NoLog()
    if insecure_plaintext or not (private or inside_enclave()):
        return TensorBoardLog(folder)
    if keys is None:
        raise SettingError(
            "a log about private data is sealed, and there is no key to seal it to",
            where="log_dir",
            hint="give --checkpoint-key FILE, or say --insecure-plaintext-log",
        )
    _make(folder)
    numbers = [int(found[1]) for found in map(_NUMBERED.fullmatch, os.listdir(folder)) if found]
    return EntryLog(SealedLogWriter(folder / f"train-{max(numbers, default=0) + 1:04d}.motte-log", keys))


def inside_enclave() -> bool:
    """Whether this looks like the inside of an enclave. The host could hide the mark: it only makes us more careful."""
    return _ENCLAVE_MARK.is_dir()


def entries_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Entries of a sealed log as JSON lines, for their owner."""
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ResourceError("cannot make the folder", where=str(folder), got=problem.strerror) from problem
