"""How long the report of the classic suite takes, and how large it gets, on made-up results of its shape.

    python benchmarks/bench_report.py [--points 1200] [--parts 1 12] [--no-figures] [--records FILE]

Eight models, each native and resident in 1 and 12 parts, a minute of traces at 20 Hz each. Measured in a process of its
own: from its start until ``motte report`` has ended, figures included. The bounds are 20 s and 6 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import made_up_results

from motte.bench.results import write_results
from motte.measure.record import UNPROTECTED, Setting, state
from motte.measure.record_file import append

_SETTING = Setting(threads=1, dtype="none", device="cpu", engine="none", enclave=UNPROTECTED)


def main() -> None:
    """One line: seconds, bytes, figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1200)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--no-figures", action="store_true", help="the page alone")
    parser.add_argument("--records", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="motte-bench-report-") as name:
        folder = Path(name) / "out"
        write_results(folder, made_up_results.results(parts=options.parts, trace_points=options.points))
        command = [sys.executable, "-c", _PROGRAM, str(folder), *(["--no-figures"] if options.no_figures else [])]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        size = (folder / "report.html").stat().st_size
        figures = len(list((folder / "figures").glob("*"))) if not options.no_figures else 0
    print(f"report of 8 models: {seconds:.1f} s, {size / 1e6:.2f} MB, {figures} files of figures")
    if options.records is not None:
        parameters = {"points": options.points, "parts": " ".join(map(str, options.parts)), "figures": figures}
        for what, value, unit in (
            ("process started until report ended", seconds, "s"),
            ("size of the page", size, "B"),
        ):
            append(
                options.records,
                state(
                    series="bench_report", what=what, value=value, unit=unit, setting=_SETTING, parameters=parameters
                ),
            )


_PROGRAM = """
import sys
from pathlib import Path
from motte.report.write import make_report
make_report(Path(sys.argv[1]), figures="--no-figures" not in sys.argv)
"""

if __name__ == "__main__":
    main()
