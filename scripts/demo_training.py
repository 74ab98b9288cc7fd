"""The offload half on real input: a small ResNet trained asymmetrically beside the plain run. ``make demo`` runs it.

Both runs see the same images in the same order from the same initial weights. Without noise the split run is the plain
one to rounding, and the two curves show it; how far two plain runs in float32 drift apart by rounding alone is no less.
The first steps are the same in every printed digit; later ones differ as any two orders of summation would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from motte.enclave.process import SIMULATED
from motte.offload.settings import Fixed
from motte.train.curves import curves_table, difference
from motte.train.loop import train
from motte.train.result import TrainResult
from motte.train.settings import TrainSettings

CONSOLE = Console(width=min(Console().width, 100))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""
SIDE = 28


def main() -> int:
    """Train twice and print both curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    CONSOLE.print(f"\n[bold]A small ResNet trained asymmetrically[/bold] ({SIMULATED})", highlight=False)
    with tempfile.TemporaryDirectory(prefix="motte-demo-") as folder:
        common = TrainSettings(
            model="resnet20", data=data(Path(folder)), scheme="trusted", width=0.5, seed=0, batch_size=32, lr=0.01,
            scheduler="cos", epochs=10_000, max_steps=options.steps, subset=options.steps * 32, threads=1,
            evaluate="inside",
        )  # fmt: skip
        split = replace(common, scheme="asymmetric", noise=None, rank=Fixed(2))
        plain, asymmetric = run("plain", common), run("asymmetric", split)
    CONSOLE.print(curves_table({"plain": plain.curve, "asymmetric, noise off": asymmetric.curve}))
    CONSOLE.print(
        f"largest difference of the curves {difference(plain.curve, asymmetric.curve):.2e}; "
        f"bytes out {asymmetric.bytes_out:,}; epsilon {asymmetric.spent}.",
        highlight=False,
    )
    return 0


def run(name: str, settings: TrainSettings) -> TrainResult:
    """One run, with a line before it."""
    CONSOLE.print(f"{name}: {settings.max_steps} steps of {settings.batch_size} images ...", highlight=False)
    return train(settings)


def data(folder: Path) -> str:
    """Fashion-MNIST where the machine has it, else the 1,797 handwritten digits that come with scikit-learn."""
    if DEBIAN.is_dir():
        return "fashion-mnist"
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / "digits" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((SIDE, SIDE))
        image.save(place / f"{number}.png")
    return f"folder:{folder / 'digits'}"


if __name__ == "__main__":
    sys.exit(main())
