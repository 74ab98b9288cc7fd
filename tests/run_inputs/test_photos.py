"""Photos are prepared bit for bit as torchvision's preset prepares them, whatever their size and colour mode."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from motte.capture.signature import ImagePreprocessing
from motte.errors import InputError
from motte.limits import MAX_IMAGE_PIXELS
from motte.run import photos
from motte.run.photos import open_image, prepare_image

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def rgb(resize: int, crop: int, interpolation: str = "bilinear") -> ImagePreprocessing:
    return ImagePreprocessing("rgb", resize, crop, interpolation, IMAGENET["mean"], IMAGENET["std"])


def by_torchvision(image: Image.Image, pre: ImagePreprocessing) -> np.ndarray:
    from motte.zoo import vision_ops

    vision_ops.import_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(
        crop_size=pre.crop,
        resize_size=pre.resize,
        mean=pre.mean,
        std=pre.std,
        interpolation=InterpolationMode(pre.interpolation),
    )
    return preset(image.convert("L" if pre.colour == "grey" else "RGB"))[None].numpy()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if channels == 1 else values)


@settings(max_examples=60)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    resize=st.integers(1, 40),
    crop=st.integers(1, 40),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    grey=st.booleans(),
)
def test_any_size_equals_torchvision_bit_for_bit(
    width: int, height: int, resize: int, crop: int, interpolation: str, grey: bool
) -> None:
    pre = rgb(resize, crop, interpolation)
    if grey:
        pre = ImagePreprocessing("grey", resize, crop, interpolation, (0.286,), (0.353,))
    image = noise(width, height)
    ours = prepare_image(image, pre)
    theirs = by_torchvision(image, pre)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert ours.shape == theirs.shape == (1, 1 if grey else 3, crop, crop)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("pre", [rgb(256, 224), rgb(232, 224), rgb(256, 224, "bicubic"), rgb(518, 518, "bicubic")])
def test_real_photographs_equal_torchvision_bit_for_bit(name: str, pre: ImagePreprocessing) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the photographs")
    path = Path(datasets.__file__).parent / "images" / name
    with Image.open(path) as image:
        theirs = by_torchvision(image, pre)
    assert prepare_image(open_image(path), pre).tobytes() == theirs.tobytes()


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "P with transparency"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_every_colour_mode_is_converted(tmp_path: Path, mode: str, colour: str) -> None:
    options = {"transparency": bytes(range(256))} if mode == "P with transparency" else {}
    image = noise(33, 21).convert(mode.split(maxsplit=1)[0])
    path = save(image, tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), **options)
    mean, std = ((0.5,), (0.5,)) if colour == "grey" else (IMAGENET["mean"], IMAGENET["std"])
    pre = ImagePreprocessing(colour, 16, 12, "bilinear", mean, std)
    with Image.open(path) as opened:
        plain = opened.convert("RGBA") if "transparency" in opened.info else opened
        theirs = by_torchvision(plain, pre)
    assert prepare_image(open_image(path), pre).tobytes() == theirs.tobytes()


def test_transparency_is_dropped_not_blended(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    pre = ImagePreprocessing("rgb", 0, 0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = prepare_image(open_image(save(image, tmp_path / "x.png")), pre)
    assert np.array_equal(values[0, :, 0, 0], np.array([200, 100, 50], dtype=np.float32) / np.float32(255))


def test_the_orientation_mark_of_a_camera_is_ignored_as_torchvision_does(tmp_path: Path) -> None:
    image, exif = noise(40, 20), Image.Exif()
    exif[0x0112] = 6
    turned = save(image, tmp_path / "turned.jpg", exif=exif, quality=90)
    plain = save(image, tmp_path / "plain.jpg", quality=90)
    pre = rgb(16, 16)
    assert prepare_image(open_image(turned), pre).tobytes() == prepare_image(open_image(plain), pre).tobytes()


def test_no_resize_and_no_crop_leave_every_pixel() -> None:
    image = noise(9, 7)
    pre = ImagePreprocessing("rgb", 0, 0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = prepare_image(image, pre)
    assert values.shape == (1, 3, 7, 9)
    assert np.array_equal(values[0] * 255, np.asarray(image).transpose(2, 0, 1).astype(np.float32))


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (100_000, 1000), (1 << 30, 1 << 30), ((1 << 31) - 1, 1)])
def test_too_many_pixels_are_refused_before_anything_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))

    def decoded(*_: object) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(InputError, match="too large") as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert str(MAX_IMAGE_PIXELS) in str(caught.value)


def test_a_long_thin_photo_is_refused_before_it_is_resized() -> None:
    image = Image.new("RGB", (1, 600_000))
    with pytest.raises(InputError, match="long and thin"):
        prepare_image(image, rgb(256, 224), where="strip.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.png", b"this is a text"),
        ("header only.png", png(8, 8)[:33]),
        ("no pixels.png", png(8, 8)),
        ("zero.png", png(0, 0)),
        ("gif.png", b"GIF89a" + bytes(30)),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable photo") as caught:
        open_image(path)
    assert name in str(caught.value)


def test_a_cut_photo_is_refused(tmp_path: Path) -> None:
    path = save(noise(64, 64), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="not a readable photo"):
        open_image(path)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_refused_whatever_their_name_says(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    noise(8, 8).save(buffer, form)
    path = tmp_path / "x.png"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="not a readable photo"):
        open_image(path)


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    with pytest.raises(InputError, match="not 8 bits"):
        open_image(path)


@settings(max_examples=150)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=8), jpeg=st.booleans()
)
def test_flipped_bytes_give_a_photo_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], jpeg: bool
) -> None:
    buffer = io.BytesIO()
    noise(16, 16).save(buffer, "JPEG" if jpeg else "PNG")
    data = bytearray(buffer.getvalue())
    for place, mask in flips:
        data[place % len(data)] ^= mask
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    try:
        image = open_image(path)
    except InputError as problem:
        told = str(problem)
    else:
        told = "flipped" if image.mode in photos._EIGHT_BIT_MODES else ""
    assert "flipped" in told
