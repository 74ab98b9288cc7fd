"""What each way of running the shipped model costs on this machine, as one page. ``make demo`` ends with it.

The page is written to ``demo/report.html``; it answers how much slower, how much memory, and what left.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

MODEL = "resnet20"
MODES = "native,resident,streamed,asymmetric"
CONSOLE = Console(width=min(Console().width, 100))


def motte(*words: str) -> None:
    """Run one command of motte; ends the demo when it fails."""
    CONSOLE.print(f"\n[bold]$ motte {shlex.join(words)}[/bold]", highlight=False, soft_wrap=True)
    if subprocess.run([sys.executable, "-m", "motte", *words], check=False).returncode != 0:
        sys.exit("demo: that command failed")


def main() -> None:
    """Measure, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results and the page")
    options = parser.parse_args()
    out = str(options.out)
    CONSOLE.rule("Every way of running the shipped model, side by side")
    words = ["--model", MODEL, "--modes", MODES, "--parts", "1,12", "--repeats", "5", "--threads", "1"]
    motte("bench", "infer", *words, "--out", out, "--overwrite")
    motte("report", out, "--overwrite")
    CONSOLE.print(f"\n[bold]Open {options.out / 'report.html'} in a browser.[/bold]")


if __name__ == "__main__":
    main()
