"""Values as they are typed on a command line: sizes, dimensions, keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from motte.errors import FormatError, InputError, SettingError
from motte.limits import GIB, KIB, MAX_TENSOR_BYTES, MIB

if TYPE_CHECKING:
    from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey, SignerPublicKey

    P = TypeVar("P", RecipientPrivateKey, SignerPrivateKey)
    Q = TypeVar("Q", RecipientPublicKey, SignerPublicKey)

_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))? ?(B|KiB|MiB|GiB)?")
_SCALES = {None: 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}
_DIM = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})=([1-9][0-9]{0,8})")
_WORDS = ("motte-recipient-", "motte-signer-")


def parse_size(text: str) -> int:
    """``64MiB``, ``1.5GiB``, ``65536`` -> bytes.

    Raises:
        typer.BadParameter: not a size, nothing at all, or beyond every bound.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size; write it as 64MiB (or KiB, GiB, or bytes alone)")
    whole, part, unit = found.groups()
    scale = _SCALES[unit]
    size = int(whole) * scale + (int(part) * scale // 10 ** len(part) if part else 0)
    if not 0 < size <= MAX_TENSOR_BYTES:
        raise typer.BadParameter(f"{text!r} is out of range: 1 byte to {MAX_TENSOR_BYTES // GIB}GiB")
    return size


def parse_dims(texts: list[str] | None, batch: int | None) -> dict[str, int]:
    """``--dim sequence=128 ...`` and ``--batch N`` as one table.

    Raises:
        SettingError: not NAME=NUMBER, or one dimension twice.
    """
    dims: dict[str, int] = {} if batch is None else {"batch": batch}
    for text in texts or ():
        found = _DIM.fullmatch(text)
        if found is None:
            raise SettingError(
                "not a dimension", where="--dim", expected="NAME=NUMBER, such as sequence=128", got=repr(text)
            )
        if found[1] in dims:
            raise SettingError("a dimension is given twice", where="--dim", got=found[1])
        dims[found[1]] = int(found[2])
    return dims


def private_key(path: Path, kind: type[P], *, option: str) -> P:
    """The private key in the file ``path``.

    Raises:
        InputError: no such file, another kind of key, or not a key at all.
    """
    from motte.seal.keys import load

    try:
        return load(path, kind)
    except FormatError as problem:
        raise _wrong_key(problem, option) from problem


def public_key(text: str, kind: type[Q], *, option: str) -> Q:
    """The public key that ``text`` is (``motte-recipient-1-...``), or that stands in the file ``text``.

    Raises:
        InputError: no such file, another kind of key, or mistyped.
    """
    from motte.seal.keys import load_public

    try:
        return load_public(text if text.startswith(_WORDS) else Path(text), kind)
    except FormatError as problem:
        raise _wrong_key(problem, option) from problem


def _wrong_key(problem: FormatError, option: str) -> InputError:
    where = f"{option} {problem.where}" if problem.where else option
    return InputError(problem.message, where=where, expected=problem.expected, got=problem.got, hint=problem.hint)
