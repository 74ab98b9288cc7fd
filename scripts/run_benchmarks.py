"""Run every benchmark in its standard form, and write what they print on this machine as one page.

    python scripts/run_benchmarks.py [--only NAME ...] [--page out/benchmarks.md]

For each of them the page has the command, how long it ran, and its own words. It is written anew after every benchmark,
so that one that is stopped leaves the others' figures. ``make bench`` runs this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from motte.measure.provenance import package_versions
from motte.seal.atomic import atomic_file
from motte.seal.writer import write_all

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


@dataclass(frozen=True)
class Ran:
    """One benchmark: its command, seconds, exit status, and what it printed."""

    command: str
    seconds: float
    status: int
    text: str


def run(script: Path) -> Ran:
    """Run ``script``; what it prints is shown at once too."""
    command = f"python {script.relative_to(ROOT)}"
    print(f"== {command}", flush=True)
    began, said = time.perf_counter(), []
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            said.append(line)
    return Ran(command, time.perf_counter() - began, process.returncode, "".join(said))


def page(done: list[Ran]) -> str:
    """All of them, as Markdown."""
    versions = package_versions()
    told = ", ".join(f"{name} {versions[name]}" for name in ("motte", "torch", "cryptography") if name in versions)
    lines = [
        "# Benchmarks of this machine",
        "",
        f"Made {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} by `make bench`: {len(os.sched_getaffinity(0))} cores, {told}.",
        "What each means, and against what it was measured, stands in docs/benchmarks.md under the same command.",
        "SIMULATED: the enclave kind is `process`, without hardware protection and without its cost.",
    ]
    for each in done:
        state = "" if each.status == 0 else f"; **it failed, or missed its bound: exit status {each.status}**"
        lines += ["", f"## `{each.command}`", "", f"{each.seconds:.0f} s{state}", "", "```", each.text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run them; exit status 1 where one failed."""
    scripts = sorted(FOLDER.glob("bench_*.py"))
    names = [script.stem.removeprefix("bench_") for script in scripts]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--page", type=Path, default=ROOT / "out" / "benchmarks.md")
    options = parser.parse_args()
    options.page.parent.mkdir(parents=True, exist_ok=True)
    done: list[Ran] = []
    for name, script in zip(names, scripts, strict=True):
        if options.only is not None and name not in options.only:
            continue
        done.append(run(script))
        with atomic_file(options.page, overwrite=True) as fd:
            write_all(fd, page(done).encode(), 0)
    failed = [each.command for each in done if each.status != 0]
    print(f"\nwritten: {options.page}", flush=True)
    if failed:
        sys.exit(f"error: failed, or missed a bound: {', '.join(failed)}")


if __name__ == "__main__":
    main()
