"""What hardening costs in each answer: the same worker with all of it, with its weights in ordinary memory, without.

    python benchmarks/bench_hardening.py [NAME ...] [--engines torch onnxruntime openvino] [--mode streamed]

One bundle, interleaved calls, same threads, seeded random weights; measured at the client, from before the input is
sealed until the answer is open, and beside it the processor time of the worker, which other programs disturb less. A
worker without hardening is started by a start-up file of this benchmark that takes the measures out; there is no such
setting. What is measured is checked from outside, in /proc/PID of each worker. The time to open the bundle is printed
apart: the first write to a page of secret memory is slower, and happens then. SIMULATED: no hardware protection.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from peers import CONSOLE, arguments, digest, report, sealed

import motte
from motte.measure.compare import Comparison, compare, compare_samples

WARMUP = 5
BOUND = 1.02
"""Steady latency, hardened over not hardened."""
WEIGHT_MEMORY_BYTES = 256 << 20
_ORDINARY = """
from motte.trusted import arena
arena.Arena.__init__.__kwdefaults__["secret"] = False
"""
_WITHOUT = (
    _ORDINARY
    + """
from motte.trusted import harden
harden.before_threads = lambda **_: harden.Hardening(False, 0, True, False)
harden.after_threads = lambda found, **_: found
"""
)
WAYS = {
    "without hardening": _WITHOUT,
    "hardened, weights in ordinary memory": _ORDINARY,
    "hardened": None,
}
"""Candidate -> what runs in the worker before anything else."""


def main() -> None:
    """The models named, on every engine named."""
    parser = arguments(__doc__, repeats=31)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["mobilenet_v3_small", "resnet50"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--mode", choices=("resident", "streamed"), default="resident")
    options = parser.parse_args()
    # Every measurement is printed before the verdict, which is the exit status.
    late = [one(name, engine, options) for name in options.names for engine in options.engines]
    if any(late):
        raise SystemExit(1)


def one(name: str, engine: str, options: object) -> bool:
    """Measure one model on one engine; whether hardening certainly costs more than :data:`BOUND`."""
    settings = motte.LoadSettings(
        threads=options.threads,
        engine=engine,
        mode=options.mode,
        weight_memory_bytes=WEIGHT_MEMORY_BYTES if options.mode == "streamed" else 0,
        timeout_s=300,
    )
    with ExitStack() as stack:
        bundle = stack.enter_context(sealed(name, batch=options.batch, lower=engine != "torch"))
        models, wire = {}, bundle.wire()
        for way, text in WAYS.items():
            with started_with(text):
                model = motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings)
            models[way] = stack.enter_context(model)
            print_facts(way, model)
        check_apart({way: model.pid for way, model in models.items()})
        busy: dict[str, list[float]] = {way: [] for way in models}
        candidates = {way: partial(run, model, wire, busy[way]) for way, model in models.items()}
        found = compare(candidates, warmup=WARMUP, repeats=options.repeats)
        processor = compare_samples(
            {way: tuple(seconds[-options.repeats :]) for way, seconds in busy.items()}, baseline=next(iter(WAYS))
        )
        answers = {digest(model.run(wire).outputs[0].data) for model in models.values()}
    report(
        found, series="hardening", what="input given to answer open", threads=options.threads, records=options.records,
        model=name, batch=options.batch, engine=engine, mode=options.mode,
    )  # fmt: skip
    if len(answers) != 1:
        raise SystemExit(f"error: {name} on {engine}: the workers answer differently")
    verdict(processor, f"{name} on {engine}, {options.mode}, processor time of the worker")
    return verdict(found, f"{name} on {engine}, {options.mode}, latency")


def run(model: object, wire: list[object], busy: list[float]) -> None:
    """One call, and what processor time the worker took for it."""
    before = processor_s(model.pid)
    model.run(wire)
    busy.append(processor_s(model.pid) - before)


def processor_s(pid: int) -> float:
    """Processor time of all threads that a process has, in seconds (/proc/PID/task/*/schedstat, to the nanosecond)."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextmanager
def started_with(text: str | None) -> Iterator[None]:
    """Workers that are started in this block run ``text`` first, as Python's own ``sitecustomize``."""
    if text is None:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="motte-bench-") as folder:
        Path(folder, "sitecustomize.py").write_text(text, encoding="utf-8")
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder if before is None else f"{folder}{os.pathsep}{before}"
        try:
            yield
        finally:
            sys.path.remove(folder)
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before


def print_facts(way: str, model: object) -> None:
    """How much secret memory a worker has mapped, and how long it took to open the bundle."""
    try:
        maps = Path(f"/proc/{model.pid}/smaps").read_text(encoding="utf-8").split("VmFlags")
        sizes = [int(entry.split("Size:")[1].split()[0]) for entry in maps if "secretmem" in entry]
        held = f"{sum(sizes) / 1024:.1f} MiB of secret memory"
    except PermissionError:
        held = "only root may see how much secret memory"
    opened = model.clock.segments()["open and load"].seconds
    CONSOLE.print(f"{way}: {held}; open and load {opened:.2f} s")


def check_apart(pids: dict[str, int]) -> None:
    """Refuse to compare workers that are hardened alike."""
    for way, pid in pids.items():
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        filtered = next(line.split()[1] for line in lines if line.startswith("Seccomp:")) == "2"
        if filtered != (WAYS[way] is not _WITHOUT):
            raise SystemExit(f"error: {way}: the worker {'has a' if filtered else 'has no'} filter of system calls")


def verdict(found: Comparison, what: str) -> bool:
    """Print whether the bound is kept, as far as the interval tells; whether it certainly is not."""
    ratio = found.ratio("hardened")
    word = "kept" if ratio.high <= BOUND else "BROKEN" if ratio.low > BOUND else "not decided"
    CONSOLE.print(
        f"{what}: hardened takes {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the time without;"
        f" at most {BOUND}: {word}"
    )
    return ratio.low > BOUND


if __name__ == "__main__":
    main()
