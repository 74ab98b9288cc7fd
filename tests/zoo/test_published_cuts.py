"""The published cuts, held against torchvision's real architectures and against the published table of sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from motte.zoo.published_cuts import CLASSICS, PUBLISHED_CUTS, PUBLISHED_PARTS

PUBLISHED_SIZES = {
    # model: parameters, parts without any parameter, share of the largest part in per cent, index of that part
    "alexnet": (61_100_840, 6, 96.0, 11),
    "vgg16": (138_357_544, 2, 89.4, 11),
    "vgg19": (143_667_240, 1, 86.1, 11),
    "squeezenet1_0": (1_248_424, 3, 41.1, 11),
    "resnet50": (25_557_032, 0, 58.6, 10),
    "resnet101": (44_549_160, 0, 33.6, 10),
    "mobilenet_v3_large": (5_483_032, 0, 45.8, 11),
    "mobilenet_v3_small": (2_542_856, 0, 63.5, 11),
}


def leaves_in_order(name: str) -> list[tuple[str, int]]:
    """(module path, own parameters) of every leaf, in registration order, which for these models is running order."""
    import torch

    from motte.zoo import vision_ops

    models = vision_ops.import_torchvision().models
    with torch.device("meta"):
        model = models.get_model(name)
    return [
        (path, sum(p.numel() for p in module.parameters()))
        for path, module in model.named_modules()
        if not list(module.children())
    ]


def part_sizes(leaves: list[tuple[str, int]], cuts: tuple[str, ...]) -> list[int]:
    """Parameters per part: a leaf belongs to the first part whose cut module holds it or runs after it."""
    sizes, position = [], 0
    for cut in cuts:
        inside = [index for index, (path, _) in enumerate(leaves) if path == cut or path.startswith(cut + ".")]
        assert inside, f"no module {cut}"
        assert inside[-1] >= position, f"{cut} runs before the cut in front of it"
        sizes.append(sum(size for _, size in leaves[position : inside[-1] + 1]))
        position = inside[-1] + 1
    assert position < len(leaves), "nothing left for the last part"
    return [*sizes, sum(size for _, size in leaves[position:])]


def test_the_eight_classics_are_all_there() -> None:
    assert set(CLASSICS) == set(PUBLISHED_SIZES)


@pytest.mark.parametrize("name", CLASSICS)
def test_sizes_equal_the_published_table(name: str) -> None:
    parameters, empty, share, largest = PUBLISHED_SIZES[name]
    cuts = PUBLISHED_CUTS[name]
    assert len(cuts) == PUBLISHED_PARTS - 1 == len(set(cuts))
    sizes = part_sizes(leaves_in_order(name), cuts)
    assert sum(sizes) == parameters
    assert sizes.count(0) == empty
    assert round(100 * max(sizes) / parameters, 1) == share
    assert sizes.index(max(sizes)) == largest


def test_the_published_cuts_need_no_torch() -> None:
    code = "import sys, motte.zoo, motte.zoo.published_cuts; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
