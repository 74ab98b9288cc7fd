"""Augmentation against the slow obvious version and against torchvision; draws that depend on nothing hidden."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from motte.errors import SettingError
from motte.train.augment import CropFlip, Draws, Purpose, ResizedCropFlip, order


def draws(indices: list[int], seed: int = 1, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, np.array(indices, dtype=np.int64))


def slow_crop_flip(image: np.ndarray, top: int, left: int, padding: int, mirrored: bool) -> np.ndarray:
    """One image, pixel by pixel."""
    channels, height, width = image.shape
    found = np.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                from_y = y + top - padding
                from_x = (width - 1 - x if mirrored else x) + left - padding
                if 0 <= from_y < height and 0 <= from_x < width:
                    found[c, y, x] = image[c, from_y, from_x]
    return found


@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.booleans(),
    st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_crop_and_flip_are_the_slow_obvious_ones(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    images = np.random.default_rng(0).integers(1, 256, (count, channels, height, width), dtype=np.uint8)
    chosen = draws(list(range(10, 10 + count)), seed)
    found = CropFlip(padding, flip).apply(images, chosen)
    tops, lefts = chosen.below(Purpose.TOP, 2 * padding + 1), chosen.below(Purpose.LEFT, 2 * padding + 1)
    mirrored = chosen.bits(Purpose.FLIP) >> np.uint64(63) == 1
    for row in range(count):
        wanted = slow_crop_flip(images[row], int(tops[row]), int(lefts[row]), padding, flip and bool(mirrored[row]))
        assert np.array_equal(found[row], wanted)


def test_every_place_and_both_mirrors_happen_about_equally_often() -> None:
    many = draws(list(range(20_000)))
    tops, lefts = many.below(Purpose.TOP, 9), many.below(Purpose.LEFT, 9)
    counts = np.bincount(9 * tops + lefts, minlength=81)
    # 20,000 / 81 = 247 expected in each, standard deviation 16: six of them.
    assert counts.min() > 150
    assert counts.max() < 345
    assert abs((many.bits(Purpose.FLIP) >> np.uint64(63)).astype(int).mean() - 0.5) < 0.02


def test_draws_depend_on_seed_epoch_index_and_purpose_and_on_nothing_else() -> None:
    alone = [int(draws([index]).bits(Purpose.TOP)[0]) for index in range(50)]
    assert draws(list(range(50))).bits(Purpose.TOP).tolist() == alone
    assert draws(list(range(49, -1, -1))).bits(Purpose.TOP).tolist() == alone[::-1]
    others = [
        draws(list(range(50)), seed=2).bits(Purpose.TOP),
        draws(list(range(50)), epoch=1).bits(Purpose.TOP),
        draws(list(range(50))).bits(Purpose.LEFT),
    ]
    every = [*alone, *(int(value) for other in others for value in other)]
    assert len(set(every)) == len(every)


def test_what_a_seed_means_does_not_change() -> None:
    # A resumed run must see the order of the run that it resumes, whatever version wrote the checkpoint.
    assert order(0, 0, 10).tolist() == ORDER_OF_SEED_0
    assert order(7, 3, 10).tolist() == ORDER_OF_SEED_7
    assert int(draws([5], seed=11, epoch=2).bits(Purpose.FLIP)[0]) == BITS


ORDER_OF_SEED_0 = [7, 5, 0, 9, 2, 3, 1, 4, 8, 6]
ORDER_OF_SEED_7 = [0, 3, 8, 5, 4, 7, 6, 1, 9, 2]
BITS = 14376027222195342101


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_an_order_is_a_permutation_and_differs_by_epoch(count: int) -> None:
    first, second = order(5, 0, count), order(5, 1, count)
    assert sorted(first.tolist()) == list(range(count))
    assert sorted(second.tolist()) == list(range(count))
    if count == 1000:
        assert (first == second).sum() < 20
        assert (order(6, 0, count) == first).sum() < 20


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (1 << 63, 0), (0, -1), (True, 0), (0, 1.0)])
def test_what_is_no_seed_is_refused(seed: int, epoch: int) -> None:
    with pytest.raises(SettingError):
        draws([0], seed, epoch)


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (8, 200), (200, 8), (1, 1)])
def test_boxes_lie_in_the_photo_with_area_and_aspect_in_range(size: tuple[int, int]) -> None:
    height, width = size
    crop, fallbacks = ResizedCropFlip(16, flip=True), 0
    for index in range(100):
        top, left, h, w = crop.box(height, width, draws([index]))
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0
        if min(height, width) > 30:
            # rounding to whole pixels moves both a little
            assert 0.08 * 0.85 <= h * w / (height * width) <= 1.0
            assert 3 / 4 * 0.8 <= w / h <= 4 / 3 * 1.25
        fallbacks += h == w == min(height, width)
    assert fallbacks < 100 or min(size) == 1


def test_boxes_vary() -> None:
    crop = ResizedCropFlip(16, flip=False)
    assert len({crop.box(50, 70, draws([index])) for index in range(50)}) > 40


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_resized_crop_is_torchvisions(mode: str) -> None:
    from motte.zoo import vision_ops

    vision_ops.import_torchvision()
    from torchvision.transforms import InterpolationMode, functional

    rng = np.random.default_rng(3)
    values = rng.integers(0, 256, (50, 70, 3) if mode == "RGB" else (50, 70), dtype=np.uint8)
    photo, crop = Image.fromarray(values), ResizedCropFlip(24, flip=True)
    mirrored = set()
    for index in range(12):
        chosen = draws([index], seed=4)
        wanted = functional.resized_crop(photo, *crop.box(50, 70, chosen), [24, 24], InterpolationMode.BILINEAR)
        flipped = bool(int(chosen.bits(Purpose.FLIP)[0]) >> 63)
        mirrored.add(flipped)
        if flipped:
            wanted = functional.hflip(wanted)
        assert np.array_equal(np.asarray(crop.apply(photo, chosen)), np.asarray(wanted))
    assert mirrored == {True, False}
