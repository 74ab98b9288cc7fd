"""Signed documents between a broker and its clients: one JSON object, its ``signature`` over all its other fields."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from motte.errors import FormatError, HandshakeError, SignatureError
from motte.seal import primitives
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import Fields, canonical, parse

_SIGNATURE: Final = "signature"


def sign(body: Mapping[str, Any], signer: SignerPrivateKey) -> dict[str, Any]:
    """``body`` with a ``signature``; its field ``format`` is the purpose, so that no document stands in for another
    kind.
    """
    signature = primitives.sign_statement(signer.secret, _purpose(body["format"]), canonical(body))
    return {**body, _SIGNATURE: signature.hex()}


def check_signed(value: Any, *, form: str, key: SignerPublicKey, where: str) -> Fields:
    """The fields of an **unverified** document once its signature holds; ``format`` and ``signature`` are taken
    already.

    Raises:
        FormatError: not an object of this format. SignatureError: not signed by ``key``.
    """
    fields = Fields(value, where=where)
    fields.choice("format", (form,))
    signature = fields.hexadecimal(_SIGNATURE, length_bytes=primitives.SIGNATURE_BYTES)
    body = {name: each for name, each in value.items() if name != _SIGNATURE}
    try:
        encoded = canonical(body)
    except ValueError as problem:  # a number such as 1e999, which the parser reads as infinity
        raise FormatError("a number that JSON has not", where=where) from problem
    try:
        primitives.verify_statement(key.raw, signature, _purpose(form), encoded)
    except SignatureError as problem:
        raise SignatureError("not signed by the demanded key", where=where, expected=str(key)) from problem
    return fields


def read_answer(data: bytes, *, form: str, key: SignerPublicKey, max_bytes: int) -> Fields:
    """A broker's **unverified** answer, checked (H-2, H-3).

    Raises:
        HandshakeError: malformed (H-2), or not signed by this broker (H-3).
    """
    with answer_checks():
        return check_signed(parse(data, max_bytes=max_bytes, what="answer"), form=form, key=key, where="answer")


@contextlib.contextmanager
def answer_checks() -> Iterator[None]:
    """What is wrong with an answer becomes H-2 (malformed) or H-3 (not signed by this broker)."""
    try:
        yield
    except (FormatError, SignatureError) as problem:
        raise HandshakeError(
            f"the broker's answer is refused: {problem.message}",
            check="H-2" if isinstance(problem, FormatError) else "H-3",
            where=problem.where,
            expected=problem.expected,
            got=problem.got,
        ) from problem


def _purpose(form: str) -> bytes:
    return form.encode("ascii")
