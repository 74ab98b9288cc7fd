"""The sampler: a small process of its own, so that taking samples costs the measured process nothing but its core.

Started and spoken to by :class:`motte.measure.traces.Sampler`. One JSON line in, one out: ``watch`` and ``forget`` a
process, ``mark`` (a reading now), ``stop`` (everything that was sampled, then the end). Between commands it samples.
It ends when its input does, so that nothing is left of it after its client.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from motte.errors import MeasureError, MotteError
from motte.limits import MAX_NAME_BYTES, MAX_TRACE_BYTES
from motte.measure.energy import Absent, find_energy_meter
from motte.measure.gpu import find_gpu_meter
from motte.measure.sampling import Reader, WatchedProcess, case_of, check_period
from motte.strict_json import Fields, canonical, parse

_MAX_COMMAND_BYTES: Final = 4096
_MAX_PID: Final = 1 << 22
_ROW_BYTES: Final = 1024
"""At least what the text of a row takes for each process."""


class Loop:
    """Samples on a fixed grid of times, and answers commands as they come."""

    def __init__(self, reader: Reader, period_s: float, send: Callable[[dict[str, Any]], None]) -> None:
        self._reader = reader
        self._period_ns = round(period_s * 1e9)
        self._send = send
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._next_ns = time.perf_counter_ns() + self._period_ns

    def wait_s(self) -> float | None:
        """How long until the next sample is due, in seconds; None: nothing is watched, and it need not wake."""
        if not self._reader.watched:
            return None
        return max(0, self._next_ns - time.perf_counter_ns()) / 1e9

    def sample_if_due(self) -> None:
        """Take the sample that is due. A slot that was slept over is left out: samples never come in bursts."""
        late_ns = time.perf_counter_ns() - self._next_ns
        if late_ns < 0:
            return
        self._next_ns += (late_ns // self._period_ns + 1) * self._period_ns
        if not self._reader.watched or self._bytes > MAX_TRACE_BYTES:
            return
        # As values until the end: writing them as text takes as long as reading them did.
        self._rows.append(self._reader.row())
        self._bytes += _ROW_BYTES * len(self._reader.watched)

    def obey(self, line: bytes) -> bool:
        """Carry out one command; whether to go on."""
        try:
            return self._obey(line)
        except MotteError as problem:
            self._send({"error": str(problem)})
            return True

    def _obey(self, line: bytes) -> bool:
        fields = Fields(parse(line, max_bytes=_MAX_COMMAND_BYTES, what="command"), where="command")
        match fields.choice("do", ("watch", "forget", "mark", "stop")):
            case "watch":
                name = fields.text("name", max_bytes=MAX_NAME_BYTES)
                self._reader.watched[name] = WatchedProcess(fields.integer("pid", low=1, high=_MAX_PID))
                self._send({"ok": self._reader.row(of=case_of(name))})
            case "forget":
                name = fields.text("name", max_bytes=MAX_NAME_BYTES)
                known = self._reader.watched.pop(name, None)
                if known is None:
                    raise MeasureError("nothing of this name is watched", got=name)
                known.close()
                self._send({"ok": None})
            case "mark":
                self._send({"ok": self._reader.row(of=fields.text("of", max_bytes=MAX_NAME_BYTES))})
            case _:
                self._send({"ok": {"rows": len(self._rows), "full": self._bytes > MAX_TRACE_BYTES}})
                for row in self._rows:
                    write_line(canonical(row))
                return False
        fields.done()
        return True


def write_line(data: bytes) -> None:
    """One line to the client."""
    sys.stdout.buffer.write(data + b"\n")


def main() -> None:
    """Sample until told to stop, or until the client is gone."""
    period_s, gpu = check_period(float(sys.argv[1])), sys.argv[2] == "gpu"

    def send(value: dict[str, Any]) -> None:
        write_line(canonical(value))
        sys.stdout.buffer.flush()

    loop = Loop(
        Reader(find_energy_meter(), find_gpu_meter() if gpu else Absent("not asked for: the case uses no GPU")),
        period_s,
        send,
    )
    send({"ok": None})
    source, held = sys.stdin.fileno(), bytearray()
    while True:
        if select.select([source], [], [], loop.wait_s())[0]:
            data = os.read(source, _MAX_COMMAND_BYTES)
            if not data:
                return
            held += data
            while b"\n" in held:
                line, _, rest = bytes(held).partition(b"\n")
                held = bytearray(rest)
                if not loop.obey(line):
                    sys.stdout.buffer.flush()
                    return
        loop.sample_if_due()


if __name__ == "__main__":
    main()
