"""Train the shipped ResNet-20 on Fashion-MNIST; write its weights, ten test images and the measured accuracy.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_resnet20.py --epochs 10 --seed 0

Data: Debian's ``dataset-fashion-mnist`` (``--data-dir`` for another place with the four published IDX files). The
held-out set is looked at once, after the last epoch: no epoch is chosen by it. The ten images are the first test image
of each class, whether the model gets it right or not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from motte.zoo.idx import read_idx
from motte.zoo.resnet20 import ResNet20

CLASSES = ["t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
MEAN, STD = 0.2860, 0.3530
SHIPPED = Path(__file__).parent.parent / "src" / "motte" / "zoo" / "shipped"


def load(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 normalised, labels (N,) int64."""
    images = torch.from_numpy(read_idx(data_dir / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz").astype(np.int64))
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1), labels


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to two pixels and a random flip per image; (N, 1, 28, 28) -> the same shape."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, n), generator=generator)
    columns = torch.arange(width).expand(n, width)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns) + dx[:, None]
    rows = torch.arange(height).expand(n, height) + dy[:, None]
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.inference_mode()
def accuracy(model: ResNet20, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` whose largest logit is the label."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(labels)


def train(model: ResNet20, images: Tensor, labels: Tensor, epochs: int, batch: int, seed: int) -> None:
    """SGD with Nesterov momentum under a one-cycle schedule; prints one line per epoch."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=epochs * steps, pct_start=0.25)
    for epoch in range(epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(labels), generator=generator)[: steps * batch]
        for index in order.split(batch):
            loss = functional.cross_entropy(model(augment(images[index], generator)), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f} {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Train, measure once on the 10,000 test images, write what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = ResNet20()
    train(model, *load(args.data_dir, "train"), args.epochs, args.batch_size, args.seed)
    images, labels = load(args.data_dir, "t10k")
    measured = accuracy(model, images, labels)
    print(f"test accuracy {measured:.4f} on {len(labels)} images")

    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, args.out / "resnet20_fashion_mnist.safetensors")
    raw = read_idx(args.data_dir / "t10k-images-idx3-ubyte.gz")
    for label, name in enumerate(CLASSES):
        index = int((labels == label).nonzero()[0])
        Image.fromarray(raw[index]).save(args.out / f"{label}_{name.replace('/', '-').replace(' ', '-')}.png")
    facts = {
        "accuracy": measured, "test_images": len(labels), "epochs": args.epochs, "seed": args.seed,
        "batch_size": args.batch_size, "torch": torch.__version__, "mean": MEAN, "std": STD, "classes": CLASSES,
    }  # fmt: skip
    (args.out / "resnet20_fashion_mnist.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
