"""The closed table: which operations a graph may hold, and what arguments each takes. Needs no torch.

An operation that is not here cannot be captured, read or run: unknown means refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from motte.capture.ops_table import FRESH, MAY_ALIAS

KINDS: Final = (
    "Tensor", "Scalar", "SymInt", "int", "float", "bool", "str", "ScalarType", "MemoryFormat", "Device", "Layout",
)  # fmt: skip
"""What an argument may be. ``Device``, ``Layout`` and ``pin_memory`` exist in schemas and never in a graph."""

FORCED: Final[Mapping[str, bool | float]] = MappingProxyType({"dropout_p": 0.0, "train": False})
"""Parameters that have one legal value in every operation: anything else would be random."""

ABSENT: Final = frozenset({"device", "layout", "pin_memory"})
"""Parameters that a graph never gives: everything is a dense tensor in ordinary memory."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a schema: ``SymInt[2] stride=1`` has kind ``SymInt``, ``is_list`` and ``list_size`` 2."""

    name: str
    kind: str
    optional: bool
    is_list: bool
    list_size: int | None
    item_optional: bool
    keyword_only: bool
    has_default: bool


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One allowed operation.

    ``schema`` is the text that torch prints for it. ``view``: an output may share memory with a tensor argument.
    """

    name: str
    schema: str
    view: bool

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters, in order."""
        return _parameters(self.schema)

    @property
    def returns_list(self) -> bool:
        """Whether it returns one list of tensors, whose length depends on the arguments."""
        return self.schema.endswith("[]")

    @property
    def results(self) -> int:
        """How many tensors it returns; 1 for a list, whose length the schema does not say."""
        returned = self.schema.rsplit(" -> ", 1)[1]
        return returned.count(",") + 1


def split_top_level(text: str) -> Iterator[str]:
    """The comma-separated pieces of ``text``; commas inside brackets do not separate."""
    depth, start = 0, 0
    for index, char in enumerate(text):
        if char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:index].strip()
            start = index + 1
    if text[start:].strip():
        yield text[start:].strip()


_PARAMETER = re.compile(
    r"(?P<kind>[A-Za-z]+)(?:\([^)]*\))?(?P<item>\?)?(?:\[(?P<size>\d*)\])?(?P<optional>\?)? "
    r"(?P<name>\w+)(?P<default>=.*)?"
)


@lru_cache(maxsize=1024)
def _parameters(schema: str) -> tuple[Parameter, ...]:
    found, keyword_only = [], False
    for piece in split_top_level(schema[schema.index("(") + 1 : schema.rindex(") -> ")]):
        if piece == "*":
            keyword_only = True
            continue
        match = _PARAMETER.fullmatch(piece)
        if match is None or match["kind"] not in KINDS:
            raise ValueError(f"not a parameter of the table: {piece!r} in {schema!r}")
        size = match["size"]
        found.append(
            Parameter(
                name=match["name"],
                kind=match["kind"],
                optional=match["optional"] is not None or (size is None and match["item"] is not None),
                is_list=size is not None,
                list_size=int(size) if size else None,
                item_optional=size is not None and match["item"] is not None,
                keyword_only=keyword_only,
                has_default=match["default"] is not None,
            )
        )
    return tuple(found)


def _read_table() -> dict[str, OpSpec]:
    table = {}
    for text, view in ((MAY_ALIAS, True), (FRESH, False)):
        for line in text.splitlines():
            if not line or line.startswith("#"):
                continue
            name = line[: line.index("(")].replace("::", ".")
            if name.count(".") == 1:
                name += ".default"
            if name in table:
                raise ValueError(f"twice in the table: {name}")
            table[name] = OpSpec(name, line, view)
    return table


OPS: Final[Mapping[str, OpSpec]] = MappingProxyType(_read_table())
"""Every allowed operation by name, ``aten.conv2d.default``."""
