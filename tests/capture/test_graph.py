"""The data classes of a graph."""

from __future__ import annotations

from motte.capture.graph import Graph, Ref, Weight, WeightRef, read_values, read_weights, references


def test_values_are_in_order_of_definition(graph: Graph) -> None:
    values = graph.values()
    assert list(values) == [
        "x", "conv", "bn", "lowest", "clone", "split", "split:1", "cat", "scaled", "index", "pad",
    ]  # fmt: skip
    assert values["split:1"].name == "split:1"


def test_references_are_in_argument_order_with_repeats(graph: Graph) -> None:
    by_name = {node.name: node for node in graph.nodes}
    assert list(references(by_name["conv"])) == [Ref("x"), WeightRef("conv.weight")]
    assert list(references(by_name["cat"])) == [Ref("split"), Ref("split:1")]
    assert list(references(by_name["bn"])).count(WeightRef("a")) == 4
    assert read_weights(by_name["bn"]) == ("a",)
    assert read_values(by_name["index"]) == ("scaled",)
    assert read_weights(by_name["index"]) == ("i",)


def test_weight_sizes() -> None:
    assert Weight("w", "bf16", (2, 3, 4), (0, 1, 2)).bytes == 48
    assert Weight("w", "f64", (), ()).bytes == 8
    assert Weight("w", "f32", (0, 4), (0, 1)).elements == 0
