"""Files, folders, arrays and texts become the model's arrays, or one clear error with the file's name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from motte.capture.graph import Size, TensorType, Value
from motte.capture.signature import ImagePreprocessing, Signature, TextPreprocessing
from motte.errors import GraphError, InputError
from motte.run import inputs as module
from motte.run.inputs import InputItem, batches, read_array, read_inputs

BATCH, SEQUENCE = Size("batch"), Size("sequence")
PHOTO = ImagePreprocessing("rgb", 8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GREY = ImagePreprocessing("grey", 8, 8, "bilinear", (0.5,), (0.5,))
IMAGE_INPUT = [Value("x", TensorType("f32", (BATCH, 3, 8, 8)))]
TOKEN_INPUTS = [
    Value(name, TensorType("i64", (BATCH, SEQUENCE))) for name in ("input_ids", "attention_mask", "token_type_ids")
]
CLASSIFIER = Signature("tiny", "file", PHOTO)
needs_tokenizers = pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="tokenizers not installed")


def photo(path: Path, colour: tuple[int, int, int] = (255, 0, 0)) -> Path:
    Image.new("RGB", (10, 9), colour).save(path)
    return path


def test_it_needs_no_torch() -> None:
    code = "import sys, motte.run.inputs, motte.run.answers; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_photos_keep_their_order_and_folders_are_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("b.jpg", "a.PNG", "c.jpeg"):
        photo(folder / name)
    (folder / "notes.md").write_text("not an input")
    (folder / ".hidden.png").write_text("not an input")
    (folder / "folder.png").mkdir()
    single = photo(tmp_path / "z.png")
    items = read_inputs([str(single), folder, single], CLASSIFIER, IMAGE_INPUT)
    assert [item.name for item in items] == ["z.png", "a.PNG", "b.jpg", "c.jpeg", "z.png"]
    assert all(item.arrays[0].shape == (1, 3, 8, 8) and item.arrays[0].dtype == np.float32 for item in items)
    assert items[0].arrays[0][0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_a_grey_model_takes_colour_photos(tmp_path: Path) -> None:
    value = [Value("x", TensorType("f32", (BATCH, 1, 8, 8)))]
    (item,) = read_inputs([photo(tmp_path / "x.png")], Signature("grey", "file", GREY), value)
    assert item.arrays[0].shape == (1, 1, 8, 8)
    assert item.arrays[0][0, 0, 0, 0] == (np.float32(76) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def test_a_photo_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another shape") as caught:
        read_inputs([photo(tmp_path / "x.png")], CLASSIFIER, [Value("x", TensorType("f32", (BATCH, 3, 9, 9)))])
    assert "[batch, 3, 9, 9]" in str(caught.value)
    with pytest.raises(InputError, match="another element type"):
        read_inputs([photo(tmp_path / "x.png")], CLASSIFIER, [Value("x", TensorType("f64", (BATCH, 3, 8, 8)))])


def test_a_photo_without_preprocessing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="how a photo becomes") as caught:
        read_inputs([photo(tmp_path / "x.png")], Signature("bare", "file"), IMAGE_INPUT)
    assert caught.value.hint is not None
    assert "preprocessing" in caught.value.hint


def test_a_photo_cannot_be_two_inputs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one file cannot be"):
        read_inputs([photo(tmp_path / "x.png")], CLASSIFIER, IMAGE_INPUT * 2)


@pytest.mark.parametrize("given_", ["missing.png", "a\0b.png"])
def test_a_missing_file_is_refused(tmp_path: Path, given_: str) -> None:
    with pytest.raises(InputError):
        read_inputs([given_], CLASSIFIER, IMAGE_INPUT)


def test_nothing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no input given"):
        read_inputs([], CLASSIFIER, IMAGE_INPUT)
    (tmp_path / "readme.txt").write_text("no photo")
    with pytest.raises(InputError, match="no inputs in the folder") as caught:
        read_inputs([tmp_path], CLASSIFIER, IMAGE_INPUT)
    assert ".png" in str(caught.value)


def test_too_many_inputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INPUT_FILES", 2)
    path = photo(tmp_path / "x.png")
    assert len(read_inputs([path] * 2, CLASSIFIER, IMAGE_INPUT)) == 2
    with pytest.raises(InputError, match="too many inputs"):
        read_inputs([path] * 3, CLASSIFIER, IMAGE_INPUT)


# --- arrays -------------------------------------------------------------------------------------------------------
def npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (5, 3, 8, 8)])
@pytest.mark.parametrize("form", ["C", "F", "big endian"])
def test_an_array_comes_with_or_without_its_batch(tmp_path: Path, shape: tuple[int, ...], form: str) -> None:
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    stored = np.asfortranarray(values) if form == "F" else values.astype(">f4") if form == "big endian" else values
    (item,) = read_inputs([npy(tmp_path / "x.npy", stored)], Signature("bare", "file"), IMAGE_INPUT)
    assert item.arrays[0].dtype == np.dtype("<f4")
    assert item.arrays[0].flags.c_contiguous
    assert np.array_equal(item.arrays[0].reshape(shape), values)
    assert item.batch == (shape[0] if len(shape) == 4 else 1)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 8, 8)), "astype('float32')"),
        (np.zeros((3, 8, 9), dtype=np.float32), "another shape"),
        (np.zeros(3, dtype=np.float32), "another shape"),
        (np.zeros((), dtype=np.float32), "another shape"),
        (np.array(["a"]), "not an array of numbers"),
        (np.zeros(3, dtype=[("a", "f4")]), "not an array of numbers"),
        (np.zeros((1, 3, 8, 8), dtype=complex), "not an array of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_inputs([npy(tmp_path / "x.npy", array)], CLASSIFIER, IMAGE_INPUT)
    assert words in f"{caught.value} {caught.value.hint}"
    assert "x.npy" in str(caught.value)


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


def test_a_planted_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    array = np.empty(1, dtype=object)
    array[0] = Planted(marker)
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match="not an array of numbers"):
        read_array(tmp_path / "x.npy")
    assert not marker.exists()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00",
        b"PK\x03\x04",
        header("(2,)") + bytes(7),
        header("(2,)") + bytes(9),
        header("(99999999999999999999,)"),
        header("(1 << 60,)"),
        header("(-1,)"),
        header("(4294967296, 4294967296)"),
        header("(2,)", "'|O'"),
        header("(2,)", "'<f4, <f4'"),
        header("(" * 500),
        header("(" + "9" * 5000 + ",)"),
        header("(" + "1, " * 30 + ")"),
        header("(2,)", "'<f3'"),
        header("(2,)", "'=f4'"),
        header("(2,)")[:-1] + b"\n\n",
    ],
)
def test_a_hostile_array_file_is_refused_before_it_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_array(path)
    assert "x.npy" in str(caught.value)


def test_a_large_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INPUT_ARRAY_BYTES", 40)
    assert read_array(npy(tmp_path / "x.npy", np.zeros(10, dtype=np.float32))).shape == (10,)
    with pytest.raises(InputError, match="array too large"):
        read_array(npy(tmp_path / "x.npy", np.zeros(11, dtype=np.float32)))


@given(data=st.binary(max_size=200), valid_start=st.booleans())
def test_any_bytes_give_an_array_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, valid_start: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.npy"
    path.write_bytes((header("(2,)")[:40] if valid_start else b"") + data)
    try:
        read_array(path)
        told = "any.npy"
    except InputError as problem:
        told = str(problem)
    assert "any.npy" in told


# --- texts --------------------------------------------------------------------------------------------------------
def encoder(max_tokens: int = 6) -> Signature:
    """A word-level tokenizer with start and end marks, padded to 50 by its own settings."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "sealed", "model"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=50)
    return Signature("words", "file", TextPreprocessing(made.to_str(), max_tokens, "mean", True))


@needs_tokenizers
def test_texts_and_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("sealed model", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    items = read_inputs(["a sealed model", tmp_path / "b.txt", tmp_path], encoder(), TOKEN_INPUTS)
    assert [item.name for item in items] == ["a sealed model", "b.txt", "a.txt", "b.txt"]
    assert [item.arrays[0].tolist() for item in items] == [
        [[2, 4, 5, 6, 3]],
        [[2, 5, 6, 3]],
        [[2, 4, 3]],
        [[2, 5, 6, 3]],
    ]
    assert all(array.dtype == np.int64 for item in items for array in item.arrays)
    assert items[0].arrays[1].tolist() == [[1] * 5], "padded"
    assert items[0].arrays[2].tolist() == [[0] * 5]


@needs_tokenizers
def test_a_long_text_is_cut_and_says_so() -> None:
    short, long = read_inputs(["a " * 4, "a " * 5], encoder(max_tokens=6), TOKEN_INPUTS)
    assert short.arrays[0].shape == long.arrays[0].shape == (1, 6)
    assert short.note == ""
    assert "6 tokens" in long.note


@needs_tokenizers
@pytest.mark.parametrize(
    ("name", "content"),
    [("latin.txt", "é".encode("latin-1")), ("empty.txt", b" \n"), ("big.txt", b"a " * (1 << 19) + b"a")],
)
def test_bad_text_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_inputs([tmp_path / name], encoder(), TOKEN_INPUTS)
    assert name in str(caught.value)


@needs_tokenizers
@pytest.mark.parametrize("text", ["", "   ", "\udcff", "x" * ((1 << 20) + 1)])
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_inputs([text], encoder(), TOKEN_INPUTS)


@needs_tokenizers
@pytest.mark.parametrize("text", ["see notes.txt", "a/", "model.npy"])
def test_a_string_is_a_text_whatever_it_ends_in(text: str) -> None:
    (item,) = read_inputs([text], encoder(), TOKEN_INPUTS)
    assert item.name == text


@needs_tokenizers
def test_a_photo_given_to_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another kind of file"):
        read_inputs([photo(tmp_path / "x.png")], encoder(), TOKEN_INPUTS)


@needs_tokenizers
def test_an_input_that_no_tokenizer_makes_is_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer makes"):
        read_inputs(["a"], encoder(), [Value("pixels", TensorType("i64", (BATCH, SEQUENCE)))])


@needs_tokenizers
@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json"])
def test_a_broken_tokenizer_is_the_bundles_fault(text: str) -> None:
    with pytest.raises(GraphError, match="not a readable tokenizer"):
        read_inputs(["a"], Signature("words", "file", TextPreprocessing(text, 6, "mean", True)), TOKEN_INPUTS)


# --- batches ------------------------------------------------------------------------------------------------------
def item(name: str, *shapes: tuple[int, ...]) -> InputItem:
    return InputItem(name, tuple(np.full(shape, ord(name), dtype=np.float32) for shape in shapes))


def test_neighbours_of_equal_shape_are_joined() -> None:
    items = [item("a", (1, 2)), item("b", (1, 2)), item("c", (1, 2)), item("d", (1, 3)), item("e", (1, 2))]
    made = list(batches(items, 2))
    assert [[i.name for i in group] for group, _ in made] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert made[0][1][0].tolist() == [[97.0, 97.0], [98.0, 98.0]]


def test_items_with_a_batch_of_their_own_count_as_many() -> None:
    made = list(batches([item("a", (3, 2)), item("b", (1, 2)), item("c", (1, 2))], 4))
    assert [[i.name for i in group] for group, _ in made] == [["a", "b"], ["c"]]
    assert list(batches([], 4)) == []
    with pytest.raises(InputError):
        list(batches([], 0))
