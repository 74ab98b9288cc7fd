"""A clock that says from where to where.

A bare duration cannot be judged: "load: 3 s" may or may not count the start of the process. Every segment here carries
the two events between which it ran. Segments follow each other and never nest, so no nanosecond is counted twice; what
no segment covers is reported as such instead of vanishing.

Marks come from CLOCK_MONOTONIC, which all processes of one Linux machine share: a segment that began in one process may
end in another (:meth:`Clock.add`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from motte.errors import FormatError, MeasureError
from motte.limits import MAX_RECORD_ENTRIES, MAX_RECORD_TEXT_BYTES
from motte.strict_json import Fields

_MAX_NS = (1 << 53) - 1


@dataclass(frozen=True)
class Segment:
    """One stretch of time.

    ``since`` and ``until`` name the events at its ends ("first byte read", "last part decrypted"); ``start_ns`` and
    ``stop_ns`` are readings of the monotonic clock, meaningful only against others of the same boot.
    """

    name: str
    since: str
    until: str
    start_ns: int
    stop_ns: int

    def __post_init__(self) -> None:
        for field in ("name", "since", "until"):
            if not getattr(self, field):
                raise MeasureError("a segment says what it is and from where to where", where=field)
        if not 0 <= self.start_ns <= self.stop_ns <= _MAX_NS:
            got = f"{self.start_ns} ns to {self.stop_ns} ns"
            raise MeasureError("a segment ends before it starts", where=self.name, got=got)

    @property
    def seconds(self) -> float:
        """How long it took, in seconds."""
        return (self.stop_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Segments:
    """Finished segments in order of time; no two overlap and no two share a name."""

    items: tuple[Segment, ...]

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        if len(set(names)) != len(names):
            raise MeasureError("two segments of one name", got=next(n for n in names if names.count(n) > 1))
        for before, after in zip(self.items, self.items[1:], strict=False):
            if after.start_ns < before.stop_ns:
                raise MeasureError("segments overlap", got=f"{before.name} and {after.name}")

    def __getitem__(self, name: str) -> Segment:
        """The segment ``name``; a missing one is an error, never a zero."""
        for item in self.items:
            if item.name == name:
                return item
        known = ", ".join(item.name for item in self.items) or "none"
        raise MeasureError("no such segment was measured", expected=f"one of: {known}", got=name)

    @property
    def total_s(self) -> float:
        """From the start of the first segment to the end of the last, in seconds, what lies between included."""
        if not self.items:
            raise MeasureError("no segment was measured")
        return (self.items[-1].stop_ns - self.items[0].start_ns) / 1e9

    @property
    def unaccounted_s(self) -> float:
        """The part of :attr:`total_s` that no segment covers, in seconds."""
        return max(0.0, self.total_s - sum(item.seconds for item in self.items))

    def to_json(self) -> list[dict[str, Any]]:
        """As a list of objects, one a segment, in order."""
        return [
            {"name": s.name, "since": s.since, "until": s.until, "start_ns": s.start_ns, "stop_ns": s.stop_ns}
            for s in self.items
        ]

    @classmethod
    def from_json(cls, value: object, *, where: str = "segments", error: type[FormatError] = FormatError) -> Segments:
        """Read what :meth:`to_json` wrote, **unverified**.

        Raises:
            error: anything unknown, missing, out of order or out of bounds.
        """
        found = Fields({"segments": value}, where=where, error=error).items(
            "segments", max_items=MAX_RECORD_ENTRIES, read=lambda item, at: _read_segment(item, at, error)
        )
        try:
            return cls(tuple(found))
        except MeasureError as problem:
            raise error(problem.message, where=where, got=problem.got) from problem


def _read_segment(value: object, where: str, error: type[FormatError]) -> Segment:
    fields = Fields(value, where=where, error=error)
    name, since, until = (fields.text(key, max_bytes=MAX_RECORD_TEXT_BYTES) for key in ("name", "since", "until"))
    start_ns, stop_ns = (fields.integer(key, low=0, high=_MAX_NS) for key in ("start_ns", "stop_ns"))
    fields.done()
    try:
        return Segment(name, since, until, start_ns, stop_ns)
    except MeasureError as problem:
        raise error(problem.message, where=where, got=problem.got) from problem


@dataclass(frozen=True)
class _Open:
    name: str
    since: str
    start_ns: int


class Clock:
    """Collects segments, one at a time. Not for several threads: give each its own.

    >>> clock = Clock()
    >>> with clock.segment("open", since="file opened", until="last part decrypted"):
    ...     pass
    >>> clock.segments()["open"].seconds >= 0
    True
    """

    def __init__(self, *, now: Callable[[], int] = time.perf_counter_ns) -> None:
        """``now`` returns nanoseconds that never go back."""
        self._now = now
        self._open: _Open | None = None
        self._done: list[Segment] = []

    @contextmanager
    def segment(self, name: str, *, since: str, until: str) -> Iterator[None]:
        """Measure the block. A block that raises yields no segment: the time of a failure is not a figure.

        Raises:
            MeasureError: another segment is open, or the name was used before.
        """
        self.start(name, since=since)
        try:
            yield
        except BaseException:
            self._open = None
            raise
        self.stop(name, until=until)

    def start(self, name: str, *, since: str) -> None:
        """Open a segment whose end lies elsewhere in the code.

        Raises:
            MeasureError: another segment is open, or the name was used before.
        """
        if self._open is not None:
            raise MeasureError("segments do not nest", expected=f"{self._open.name} to stop first", got=name)
        self._refuse_repeated(name)
        if not name or not since:
            raise MeasureError(
                "a segment says what it is and from where to where", where="name" if not name else "since"
            )
        self._open = _Open(name, since, self._now())

    def stop(self, name: str, *, until: str) -> Segment:
        """Close the open segment, which must be ``name``.

        Raises:
            MeasureError: no segment, or another one, is open.
        """
        now = self._now()
        if self._open is None or self._open.name != name:
            open_name = "none" if self._open is None else self._open.name
            raise MeasureError("this segment is not the open one", expected=open_name, got=name)
        finished = Segment(name, self._open.since, until, self._open.start_ns, now)
        self._open = None
        self._done.append(finished)
        return finished

    def add(self, segment: Segment) -> None:
        """Take a segment that another process of this machine measured, or that began in one and ended in another.

        Raises:
            MeasureError: the name was used before, or it overlaps what is already measured.
        """
        self._refuse_repeated(segment.name)
        # Built whole first: an overlap leaves the clock as it was.
        done = sorted([*self._done, segment], key=lambda item: (item.start_ns, item.stop_ns))
        Segments(tuple(done))
        self._done = done

    def segments(self) -> Segments:
        """What was measured so far.

        Raises:
            MeasureError: a segment is still open.
        """
        if self._open is not None:
            raise MeasureError("a segment is still open", got=self._open.name)
        return Segments(tuple(sorted(self._done, key=lambda item: (item.start_ns, item.stop_ns))))

    def _refuse_repeated(self, name: str) -> None:
        if any(item.name == name for item in self._done):
            raise MeasureError("two segments of one name", got=name)
