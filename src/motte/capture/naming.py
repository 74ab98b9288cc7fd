"""Readable, unique names for nodes, values and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any


class Namer:
    """Names nodes after the module that runs them.

    A module that runs one kind of operation and holds no other module gives its path (``layer1.0.conv1``); any other
    gives its path and the operation (``layer1.0.add``). Later ones of the same name get ``_1``, ``_2``.
    """

    def __init__(self, calls: Iterable[tuple[str, str]]) -> None:
        """``calls``: module path and short operation name of every node to come."""
        kinds: dict[str, set[str]] = {}
        self._holds: set[str] = {""}
        for module, op in calls:
            kinds.setdefault(module, set()).add(op)
            pieces = module.split(".")
            self._holds.update(".".join(pieces[:count]) for count in range(1, len(pieces)))
        self._simple = {module for module, ops in kinds.items() if len(ops) == 1}
        self._taken: set[str] = set()
        self._next: Counter[str] = Counter()

    def reserve(self, name: str) -> str:
        """Take exactly ``name`` if it is free, else the next numbered one."""
        candidate = name
        while candidate in self._taken:
            self._next[name] += 1
            candidate = f"{name}_{self._next[name]}"
        self._taken.add(candidate)
        return candidate

    def node(self, module: str, op: str) -> str:
        """A name for a node of ``op`` (``conv2d``) that ``module`` runs; also the name of its first output."""
        op = op.strip("_")
        if not module:
            return self.reserve(op)
        if module in self._simple and module not in self._holds:
            return self.reserve(module)
        return self.reserve(f"{module}.{op}")

    @staticmethod
    def output(node: str, index: int) -> str:
        """The name of output ``index`` of a node."""
        return node if index == 0 else f"{node}:{index}"


def output_names(spec: Any) -> tuple[str, ...]:
    """What the caller calls each leaf of the model's result, from torch's description of its structure.

    A lone tensor is ``output``, an item of a tuple ``output_0``, a field of a dict or dataclass its own name; deeper
    levels are joined by dots.
    """

    def walk(spec: Any, path: str) -> list[str]:
        if spec.is_leaf():
            return [path or "output"]
        children = spec.children()
        keys = _keys(spec, len(children))
        found = []
        for index, child in enumerate(children):
            key = keys[index] if keys else (f"output_{index}" if not path else str(index))
            found.extend(walk(child, f"{path}.{key}" if path else key))
        return found

    return tuple(walk(spec, ""))


def _keys(spec: Any, count: int) -> list[str] | None:
    context = spec.context
    if isinstance(context, type) and hasattr(context, "_fields"):
        context = list(context._fields)
    elif is_dataclass(spec.type) and not isinstance(context, list | tuple):
        context = [item.name for item in fields(spec.type)]
    while isinstance(context, list | tuple) and context and isinstance(context[0], list | tuple):
        context = context[0]
    if isinstance(context, list | tuple) and len(context) == count and all(isinstance(key, str) for key in context):
        return list(context)
    return None
