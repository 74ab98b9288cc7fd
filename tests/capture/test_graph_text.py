"""The text of a graph: exact round trips, one text for one graph, and nothing but GraphError for any other input."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.capture.graph import Graph, Node, Ref, TensorType, Value
from motte.capture.text import digest, dumps, loads
from motte.errors import GraphError
from motte.limits import MAX_GRAPH_TEXT_BYTES


def one_float(value: float) -> Graph:
    type_ = TensorType("f32", (2,))
    node = Node("y", "aten.mul.Tensor", (Ref("x"), value), {}, (Value("y", type_),))
    return Graph("g", (), (Value("x", type_),), {}, (node,), ("y",), ("output",))


def test_round_trip_is_exact(graph: Graph) -> None:
    text = dumps(graph)
    again = loads(text)
    # nan is not equal to itself; what it stands beside is compared through the text.
    assert dumps(again) == text
    assert replace(again, nodes=()) == replace(graph, nodes=())
    assert again.nodes[:-1] == graph.nodes[:-1]
    assert math.isnan(again.nodes[-1].args[3])  # type: ignore[arg-type]
    assert loads(text.encode()).name == "net"


def test_one_node_a_line(graph: Graph) -> None:
    lines = dumps(graph).splitlines()
    assert sum(line.startswith('{"name": ') and '"op"' in line for line in lines) == len(graph.nodes)
    assert lines[0] == '{"motte_graph": 1,'


@given(st.floats())
def test_floats_are_exact(value: float) -> None:
    found = loads(dumps(one_float(value))).nodes[0].args[1]
    assert isinstance(found, float)
    assert math.copysign(1, found) == math.copysign(1, value) or math.isnan(value)
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_integers_and_floats_stay_apart() -> None:
    assert type(loads(dumps(one_float(1.0))).nodes[0].args[1]) is float
    assert type(loads(dumps(one_float(1))).nodes[0].args[1]) is int
    assert loads(dumps(one_float(True))).nodes[0].args[1] is True


def test_digest_follows_every_change(graph: Graph) -> None:
    assert digest(graph) == digest(loads(dumps(graph)))
    assert len(digest(graph)) == 64
    assert digest(replace(graph, name="other")) != digest(graph)
    assert digest(replace(graph, output_names=("a", "b", "c"))) != digest(graph)


def test_names_beyond_ascii_round_trip(graph: Graph) -> None:
    renamed = replace(graph, name="größe")
    assert dumps(renamed).isascii()
    assert loads(dumps(renamed)).name == "größe"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"motte_graph": 1', '"motte_graph": 2'),
        ('"motte_graph": 1', '"motte_graph": true'),
        ('"motte_graph": 1,', ""),
        ('"name": "net",', '"name": "net", "name": "net",'),
        ('"name": "net",', '"name": "net", "more": 1,'),
        ('"name": "net"', '"name": 3'),
        ('"name": "net"', '"name": "\\ud800"'),
        ('["batch", 1, 16]', '["batch", 1]'),
        ('["batch", 1, 16]', '["batch", 1.0, 16]'),
        ('["batch", 1, 16]', '["batch", 1, true]'),
        ('{"value": "cat"}', '{"value": 3}'),
        ('{"value": "cat"}', '{"valeu": "cat"}'),
        ('{"value": "cat"}', '{"value": "cat", "weight": "a"}'),
        ('{"value": "cat"}', "{}"),
        ('{"value": "cat"}', "[[1]]"),
        ('{"value": "cat"}', "1e999"),
        ('{"value": "cat"}', "NaN"),
        ('{"value": "cat"}', "9" * 30),
        ('{"value": "cat"}', '{"float": "infinity"}'),
        ('"dtype": "i64"', '"dtype": "i64", "stride": [1]'),
        ('"shape": [4]', '"shape": [-4]'),
        ('"shape": [4]', '"shape": ["batch"]'),
        ('"order": [0]', '"order": [1]'),
        ('"slice": ["whole", 0, 4, 8]', '"slice": ["whole", 0, 4]'),
        ('"slice": ["whole", 0, 4, 8]', '"slice": null'),
        ('"aliases": ["tied.weight"]', '"aliases": [1]'),
        ('"kwargs": {', '"kwargs": [], "x": {'),
        ('"op": "aten.cat.default"', '"op": "os.system"'),
        ('["pad", "logits"]', '["pad"]'),
    ],
)
def test_each_flaw_is_refused(graph: Graph, old: str, new: str) -> None:
    text = dumps(graph)
    assert old in text
    with pytest.raises(GraphError):
        loads(text.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", "\x00", "[" * 100000, '{"motte_graph": 1}'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(GraphError):
        loads(text)


def test_bytes_that_are_no_text_are_refused(graph: Graph) -> None:
    with pytest.raises(GraphError):
        loads(b"\xff" + dumps(graph).encode())


def test_trailing_data_is_refused(graph: Graph) -> None:
    with pytest.raises(GraphError):
        loads(dumps(graph) + "{}")


def test_a_text_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(GraphError, match="too large"):
        loads(b" " * (MAX_GRAPH_TEXT_BYTES + 1))


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.sampled_from(["batch", "x", "conv", "a", "f32", "aten.relu.default", "max(batch, 1)"]),
    st.just([]),
    st.just({}),
    st.sampled_from([{"value": "x"}, {"weight": "a"}, {"size": "batch // 0"}, {"dtype": "c64"}, [["x", "f32", [1]]]]),
)


BODY = json.loads(
    """
{"motte_graph": 1, "name": "net", "dims": [["batch", 1, 16]],
"inputs": [["x", "f32", ["batch", 4, 8, 8]]],
"weights": [{"name": "w", "dtype": "f32", "shape": [4, 4, 3, 3], "order": [0, 2, 3, 1], "aliases": ["t"],
  "slice": ["whole", 0, 4, 8]}, {"name": "a", "dtype": "i64", "shape": [4], "order": [0]}],
"nodes": [
{"name": "conv", "op": "aten.conv2d.default", "args": [{"value": "x"}, {"weight": "w"}, null, [1, 1], [1, 1]],
  "outputs": [["conv", "f32", ["batch", 4, 8, 8]]], "module": "m", "source": "net.py:3"},
{"name": "full", "op": "aten.full.default", "args": [[{"size": "batch"}, 4], {"float": "-inf"}],
  "kwargs": {"dtype": {"dtype": "f32"}}, "outputs": [["full", "f32", ["batch", "2 + 2"]]]},
{"name": "split", "op": "aten.split.Tensor", "args": [{"value": "conv"}, 2, 1],
  "outputs": [["split", "f32", ["batch", 2, 8, 8]], null]},
{"name": "index", "op": "aten.index.Tensor", "args": [{"value": "split"}, [null, {"weight": "a"}]],
  "outputs": [["index", "f32", ["batch", 4, 8, 8]]]}],
"outputs": [["index", "logits"], ["full", "full"]]}
"""
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        found += places(inner)
    return found


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_structures_give_a_graph_or_a_graph_error(data: st.DataObject) -> None:
    body = copy.deepcopy(BODY)
    for _ in range(data.draw(st.integers(1, 3))):
        options = places(body)
        container, key = options[data.draw(st.integers(0, len(options) - 1))]
        action = data.draw(st.sampled_from(["replace", "delete", "swap"]))
        if action == "delete":
            del container[key]
        elif action == "swap":
            other, other_key = options[data.draw(st.integers(0, len(options) - 1))]
            container[key] = copy.deepcopy(other[other_key]) if other_key in range_or_keys(other) else None
        else:
            # A copy: what is drawn is the strategy's own, and a later turn may change what stands in it.
            container[key] = copy.deepcopy(data.draw(VALUES))
    try:
        graph = loads(json.dumps(body))
    except GraphError:
        return
    assert loads(dumps(graph)).name == graph.name


def range_or_keys(container: Any) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_bytes_give_a_graph_or_a_graph_error(data: st.DataObject) -> None:
    text = bytearray(dumps(one_float(0.5)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b'{}[]",:0159eE.-+ ntf'))))
    if data.draw(st.booleans()):
        del text[data.draw(st.integers(0, len(text) - 1)) :]
    try:
        loads(bytes(text))
    except GraphError:
        pass
