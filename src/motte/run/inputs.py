"""From what a user has (photos, a folder of them, arrays, texts) to the arrays that the model takes. No torch.

Every bad input is one :class:`~motte.errors.InputError` with the file's name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from motte.capture.graph import Size, TensorType, Value
from motte.capture.signature import ImagePreprocessing, Signature, TextPreprocessing
from motte.errors import GraphError, InputError, UnsupportedError
from motte.limits import MAX_GRAPH_DIMS, MAX_INPUT_ARRAY_BYTES, MAX_INPUT_FILES, MAX_INPUT_TEXT_BYTES
from motte.run.photos import open_image, prepare_image

Array = NDArray[Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_NUMPY = {
    "f64": "<f8", "f32": "<f4", "f16": "<f2", "bool": "|b1",
    "i64": "<i8", "i32": "<i4", "i16": "<i2", "i8": "|i1", "u8": "|u1",
}  # fmt: skip
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][fiub]\d{1,2})', 'fortran_order': (False|True), 'shape': \(((?:\d+, ?)*\d*)\), *\} *\n?"
)
_MAX_NPY_HEADER_BYTES = 4096
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class InputItem:
    """One input, ready to be sent.

    ``name`` is the file's name, or the start of the text. ``arrays`` are in the order of the graph's inputs, each
    with its batch axis (of 1 for photos and texts). ``note`` says what was left out: a text cut to the model's limit.
    """

    name: str
    arrays: tuple[Array, ...]
    note: str = ""

    @property
    def batch(self) -> int:
        """Extent of the first axis of the first array; 1 where it has none."""
        return int(self.arrays[0].shape[0]) if self.arrays and self.arrays[0].ndim else 1


def read_inputs(
    given: Sequence[str | os.PathLike[str]], signature: Signature, inputs: Sequence[Value]
) -> list[InputItem]:
    """Read every input, in the given order; a folder's files sorted by name.

    Args:
        given: paths of PNG, JPEG or ``.npy`` files, or of folders of them. For an encoder a ``str`` always is a text
            and a ``Path`` a ``.txt`` or ``.npy`` file or a folder of them.
        signature: says how photos and texts are prepared.
        inputs: the graph's inputs, with their types.

    Raises:
        InputError: a file that is missing, broken, too large or of another shape or kind than the model takes.
        UnsupportedError: a text, and the package ``tokenizers`` is not installed.
    """
    if not given:
        raise InputError("no input given", where=signature.model)
    reader = _Reader(signature, tuple(inputs))
    items: list[InputItem] = []
    for source in _sources(given, is_text=isinstance(signature.preprocessing, TextPreprocessing)):
        if len(items) >= MAX_INPUT_FILES:
            raise InputError("too many inputs", expected=f"at most {MAX_INPUT_FILES}")
        items.append(reader.read(source))
    return items


def batches(items: Sequence[InputItem], size: int) -> Iterator[tuple[tuple[InputItem, ...], tuple[Array, ...]]]:
    """Neighbours of equal shapes joined along the batch axis, at most ``size`` inputs a batch, in order.

    Yields:
        the items of one batch and their joined arrays.

    Raises:
        InputError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError("the batch must hold at least one input", got=str(size))
    group: list[InputItem] = []
    for item in items:
        if group and (_shapes(group[0]) != _shapes(item) or sum(i.batch for i in group) + item.batch > size):
            yield tuple(group), _joined(group)
            group = []
        group.append(item)
    if group:
        yield tuple(group), _joined(group)


def _shapes(item: InputItem) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape[1:] for array in item.arrays)


def _joined(group: Sequence[InputItem]) -> tuple[Array, ...]:
    if len(group) == 1:
        return group[0].arrays
    return tuple(np.concatenate(column) for column in zip(*(item.arrays for item in group), strict=True))


# --- where inputs come from ---------------------------------------------------------------------------------------
def _sources(given: Sequence[str | os.PathLike[str]], *, is_text: bool) -> Iterator[str | Path]:
    """Texts as ``str``, files as ``Path``."""
    suffixes = (".txt", ".npy") if is_text else (*IMAGE_SUFFIXES, ".npy")
    for source in given:
        if is_text and isinstance(source, str):
            yield source
            continue
        if "\0" in os.fspath(source):
            raise InputError("not a path", got=repr(os.fspath(source))[:80])
        path = Path(source)
        if path.is_dir():
            yield from _folder(path, suffixes)
        elif path.is_file():
            yield path
        else:
            raise InputError("no such file", where=str(path))


def _folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        found = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
        )
    except OSError as problem:
        raise InputError("cannot read the folder", where=str(folder), got=problem.strerror or str(problem)) from problem
    if not found:
        raise InputError("no inputs in the folder", where=str(folder), expected=" or ".join(suffixes))
    return found


class _Reader:
    """Reads one source after the other for one model; the tokenizer is built once."""

    def __init__(self, signature: Signature, inputs: tuple[Value, ...]) -> None:
        self._signature = signature
        self._inputs = inputs
        self._tokenizer: Any = None

    def read(self, source: str | Path) -> InputItem:
        if isinstance(source, str):
            return self._text(source, name=_short(source))
        if source.suffix.lower() == ".npy":
            return InputItem(source.name, (self._fitting(read_array(source), source, by_user=True),))
        pre = self._signature.preprocessing
        if isinstance(pre, TextPreprocessing):
            return self._text(_read_text(source), name=source.name)
        if isinstance(pre, ImagePreprocessing):
            array = prepare_image(open_image(source), pre, where=str(source))
            return InputItem(source.name, (self._fitting(array, source, by_user=False),))
        raise InputError(
            "the model does not say how a photo becomes its input",
            where=str(source),
            expected="a .npy file",
            hint="its owner can add `preprocessing` beside the factory, see docs/zoo.md",
        )

    def _text(self, text: str, *, name: str) -> InputItem:
        pre = self._signature.preprocessing
        if not isinstance(pre, TextPreprocessing):  # _sources yields texts for encoders only
            raise InputError("the model takes no text", where=name)
        if not text.strip():
            raise InputError("empty text", where=name)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(pre)
        try:
            encoded = self._tokenizer.encode(text)
        except Exception as problem:  # an error of the Rust library, of any type
            raise InputError("the tokenizer refused the text", where=name, got=str(problem)[:200]) from problem
        columns = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        arrays = []
        for value in self._inputs:
            if value.name not in columns:
                raise InputError(
                    "the model has an input that no tokenizer makes", where=value.name, expected=", ".join(columns)
                )
            array = np.asarray([columns[value.name]], dtype=_numpy_type(value.type))
            _check_shape(array.shape, value, where=name)
            arrays.append(array)
        note = f"only the first {pre.max_tokens} tokens were used" if encoded.overflowing else ""
        return InputItem(name, tuple(arrays), note)

    def _fitting(self, array: Array, path: Path, *, by_user: bool) -> Array:
        """``array`` as the model's only input; a user's array may come without the batch axis."""
        if len(self._inputs) != 1:
            raise InputError(
                "one file cannot be the model's inputs",
                where=str(path),
                expected=f"{len(self._inputs)} arrays ({', '.join(value.name for value in self._inputs)})",
                hint="call the model from Python: motte.load(...)(a, b)",
            )
        value = self._inputs[0]
        wanted = _numpy_type(value.type)
        if array.dtype != wanted:
            hint = f"save it as numpy.save(file, array.astype('{wanted.name}'))" if by_user else None
            raise InputError(
                "another element type", where=str(path), expected=wanted.name, got=array.dtype.name, hint=hint
            )
        if by_user and array.ndim == len(value.type.shape) - 1:
            array = array[None]
        _check_shape(array.shape, value, where=str(path))
        return array


# --- arrays -------------------------------------------------------------------------------------------------------
def read_array(path: Path) -> Array:
    """Read one ``.npy`` file of numbers or booleans (format 1 to 3); its length must be what its header says.

    numpy's own reader evaluates the header as Python text and can unpickle; this one matches it against one pattern.

    Raises:
        InputError: not that format, anything but numbers inside, too large, cut short, or bytes after the end.
    """
    try:
        with path.open("rb") as file:
            dtype, by_columns, shape = _npy_header(file, path)
            wanted = math.prod(shape) * dtype.itemsize
            if wanted > MAX_INPUT_ARRAY_BYTES:
                limit = f"at most {MAX_INPUT_ARRAY_BYTES} bytes"
                raise InputError("array too large", where=str(path), expected=limit, got=f"{wanted} bytes")
            data = file.read(wanted + 1)
    except OSError as problem:
        raise InputError("cannot read the array", where=str(path), got=problem.strerror or str(problem)) from problem
    if len(data) != wanted:
        got = "more" if len(data) > wanted else f"{len(data)} bytes"
        raise InputError("length differs from the header", where=str(path), expected=f"{wanted} bytes", got=got)
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if by_columns else "C")
    return np.array(array, dtype=dtype.newbyteorder("<"), order="C")


def _npy_header(file: BinaryIO, path: Path) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """Element type, whether columns come first in memory, and shape."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2", b"\3"):
        raise InputError("not a readable .npy file", where=str(path), got=repr(start)[:60])
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    text = file.read(min(length, _MAX_NPY_HEADER_BYTES))
    found = _NPY_HEADER.fullmatch(text)
    if len(text) != length or found is None:
        described = text.strip().decode("ascii", "backslashreplace")[:120]
        raise InputError("not an array of numbers", where=str(path), expected="a plain .npy header", got=described)
    try:
        dtype = np.dtype(found[1].decode())
        shape = tuple(int(extent) for extent in found[3].replace(b" ", b"").split(b",") if extent)
    except (TypeError, ValueError) as problem:  # f3, or a number of more digits than Python converts
        raise InputError("not an array of numbers", where=str(path), got=str(problem)[:120]) from problem
    if len(shape) > MAX_GRAPH_DIMS:
        raise InputError("too many dimensions", where=str(path), expected=f"at most {MAX_GRAPH_DIMS}")
    return dtype, found[2] == b"True", shape


def _numpy_type(type_: TensorType) -> np.dtype[Any]:
    if type_.dtype not in _NUMPY:
        raise InputError(
            "the model's input type does not exist in numpy",
            got=type_.dtype,
            hint="call the model from Python with torch tensors",
        )
    return np.dtype(_NUMPY[type_.dtype])


def _check_shape(shape: tuple[int, ...], value: Value, *, where: str) -> None:
    """Fixed extents must agree; named ones are checked, with their range, when the model is called."""
    wanted = value.type.shape
    fits = len(shape) == len(wanted) and all(
        isinstance(extent, Size) or extent == actual for extent, actual in zip(wanted, shape, strict=True)
    )
    if not fits:
        text = ", ".join(extent.text if isinstance(extent, Size) else str(extent) for extent in wanted)
        raise InputError("the input has another shape", where=where, expected=f"[{text}]", got=str(list(shape)))


# --- texts --------------------------------------------------------------------------------------------------------
def load_tokenizer(pre: TextPreprocessing) -> Any:
    """The tokenizer of the signature, cutting at ``max_tokens`` and never padding.

    Raises:
        UnsupportedError: the package ``tokenizers`` is not installed.
        GraphError: the signature holds no tokenizer that the package can read.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as problem:
        raise UnsupportedError("texts need the package tokenizers", hint="pip install 'motte[text]'") from problem
    try:
        tokenizer = Tokenizer.from_str(pre.tokenizer)
        tokenizer.no_padding()
        tokenizer.enable_truncation(pre.max_tokens)
    except Exception as problem:  # the library raises bare Exception
        raise GraphError(
            "not a readable tokenizer", where="signature.preprocessing.tokenizer", got=str(problem)[:200]
        ) from problem
    return tokenizer


def _read_text(path: Path) -> str:
    if path.suffix.lower() != ".txt":
        _wrong_kind(path, "a .txt file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_INPUT_TEXT_BYTES + 1)
        if len(data) > MAX_INPUT_TEXT_BYTES:
            raise InputError("text too long", where=str(path), expected=f"at most {MAX_INPUT_TEXT_BYTES} bytes")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError("not a readable UTF-8 text", where=str(path), got=str(problem)[:200]) from problem


def _wrong_kind(path: Path, expected: str) -> NoReturn:
    raise InputError("another kind of file than the model takes", where=str(path), expected=expected, got=path.suffix)


def _short(text: str) -> str:
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_INPUT_TEXT_BYTES:
        raise InputError("text too long", expected=f"at most {MAX_INPUT_TEXT_BYTES} bytes", got=f"{len(raw)} bytes")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise InputError("not a readable UTF-8 text", where=ascii(text)[:_SHOWN_CHARACTERS])
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."
