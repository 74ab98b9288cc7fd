"""The deploy half on real input: cut, seal, tamper, run without torch, compare. ``make demo`` runs it.

Every step is a command of ``motte`` that you can type yourself; the script prints each before it runs it. The last step
runs the unsplit model in a process of its own and compares the numbers bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from motte.zoo import shipped_models
from motte.zoo.shipped_models import ShippedImage

MODEL = "resnet20-fashion-mnist"
PARTS = 12
THREADS = 1
CONSOLE = Console(width=min(Console().width, 100))
WHOLE = """
import json, sys
import numpy as np, torch
torch.set_num_threads({threads})
from motte.zoo.registry import build
model = build({model!r}).model
with torch.inference_mode():
    logits = model(torch.from_numpy(np.load(sys.argv[1], allow_pickle=False)))
np.save(sys.argv[2], logits.numpy())
"""


def motte(folder: Path, *words: str, refused: bool = False, shown: bool = True) -> str:
    """Run one command of motte in ``folder``; what it printed. Ends the demo when it does not end as expected.

    Where it is not ``shown``, only its standard output is given back.
    """
    CONSOLE.print(f"\n[bold]$ motte {shlex.join(words)}[/bold]", highlight=False, soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "motte", *words],
        check=False,
        cwd=folder,
        env={**os.environ, "COLUMNS": str(CONSOLE.width)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if shown else subprocess.PIPE,
        text=True,
    )
    if shown:
        print(done.stdout, end="", flush=True)
    if (done.returncode != 0) is not refused:
        sys.exit(f"demo: expected {'a refusal' if refused else 'success'}, got exit status {done.returncode}")
    return done.stdout


def tamper(bundle: Path, copy: Path) -> None:
    """Copy the bundle with one bit flipped in its last part."""
    data = bytearray(bundle.read_bytes())
    data[-1000] ^= 1
    copy.write_bytes(data)


def whole_logits(folder: Path, inputs: Path) -> Any:
    """Logits of the unsplit model, computed in another process from the same preprocessed arrays."""
    import numpy as np

    out = folder / "whole.npy"
    code = WHOLE.format(threads=THREADS, model=MODEL)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
    subprocess.run([sys.executable, "-c", code, str(inputs), str(out)], check=True, env=environment)
    return np.load(out, allow_pickle=False)


def compare(folder: Path, images: Sequence[ShippedImage]) -> bool:
    """Answers of the sealed parts beside the true labels; whether they equal the whole model's to the bit."""
    import numpy as np

    import motte as library
    from motte.capture.signature import ImagePreprocessing
    from motte.run.inputs import read_inputs

    # The torch engine runs the very operations of the unsplit model; the smaller ones round otherwise.
    keys, settings = folder / "keys", library.LoadSettings(threads=THREADS, engine="torch")
    with library.load(
        folder / "model.motte", keys=keys / "client.key", signer=keys / "owner.pub", settings=settings
    ) as model:
        if not isinstance(model.signature.preprocessing, ImagePreprocessing):
            sys.exit("demo: the shipped model takes images")
        items = read_inputs([image.path for image in images], model.signature, model.inputs)
        batch = np.concatenate([item.arrays[0] for item in items])
        parts = model(batch)
        labels = model.signature.labels
    np.save(folder / "inputs.npy", batch)
    whole = whole_logits(folder, folder / "inputs.npy")
    table = Table("image", "true label", "12 sealed parts", "whole model", "same bits")
    for image, ours, theirs in zip(images, parts, whole, strict=True):
        names = [labels[int(row.argmax())] for row in (ours, theirs)]
        table.add_row(image.path.name, image.label_name, *names, "yes" if np.array_equal(ours, theirs) else "NO")
    CONSOLE.print(table)
    return bool(np.array_equal(parts, whole))


def same_labels(folder: Path, opens: Sequence[str]) -> bool:
    """Whether every installed engine gives each image the same label."""
    found: dict[str, list[str]] = {}
    for engine in (name for name in ("torch", "onnxruntime", "openvino") if find_spec(name)):
        words = ["run", "model.motte", "--engine", engine, "--input", "images", *opens, "--topk", "1", "--json"]
        answers = json.loads(motte(folder, *words, shown=False))["answers"]
        found[engine] = [answer["top"][0]["label"] for answer in answers]
    labels = list(found.values())
    same = all(each == labels[0] for each in labels)
    CONSOLE.print(f"labels of {', '.join(found)}: {'the same' if same else 'DIFFERENT'}")
    return same


def main() -> None:
    """Run the demo; exit status 0 only if every step did what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="motte-demo-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(folder)


def run(folder: Path) -> None:
    """The steps, in ``folder``."""
    images = shipped_models.images()
    (folder / "images").mkdir(exist_ok=True)
    for image in images:
        shutil.copy(image.path, folder / "images")
    opens = ["--key", "keys/client.key", "--signer", "keys/owner.pub", "--threads", str(THREADS)]
    CONSOLE.rule("1. Keys: one pair signs, one pair opens")
    motte(folder, "keys", "new", "owner", "--kind", "signer", "--folder", "keys")
    motte(folder, "keys", "new", "client", "--kind", "recipient", "--folder", "keys")
    CONSOLE.rule(f"2. The plan: {PARTS} parts, the largest as small as it can be")
    motte(folder, "plan", MODEL, "--parts", str(PARTS), "--objective", "memory", "-o", "plan.txt")
    CONSOLE.rule("3. Check the parts against the whole, and seal them")
    words = ["--plan", "plan.txt", "--recipient", "keys/client.pub", "--signer-key", "keys/owner.key"]
    motte(folder, "seal", MODEL, *words, "-o", "model.motte")
    CONSOLE.rule("4. One flipped bit, and the bundle is refused")
    tamper(folder / "model.motte", folder / "tampered.motte")
    text = motte(folder, "run", "tampered.motte", "--input", "images", *opens, refused=True)
    if "does not authenticate" not in text:
        sys.exit("demo: the tampered bundle was refused for another reason")
    CONSOLE.rule("5. Ten real images, classified inside a trusted worker without torch")
    motte(folder, "run", "model.motte", "--input", "images", *opens, "--topk", "1", "--repeat", "20")
    CONSOLE.rule("6. All that this worker has loaded, and so has to be trusted, beside a worker with torch")
    motte(folder, "doctor", "--tcb")
    CONSOLE.rule("7. The same answers as the unsplit model: to the bit with torch, the same labels with every engine")
    equal = compare(folder, images)
    equal &= same_labels(folder, opens)
    facts = shipped_models.facts()
    CONSOLE.print(
        f"The model is right on {facts.accuracy:.2%} of Fashion-MNIST's {facts.test_images:,} test images "
        "(docs/model_card.md)."
    )
    if not equal:
        sys.exit("demo: the parts do not answer as the whole")
    CONSOLE.print("[bold]Equal: the 12 sealed parts answer exactly as the whole model.[/bold]")


if __name__ == "__main__":
    main()
