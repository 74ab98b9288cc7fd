"""The strict reader: what Python's own accepts and this one refuses, and that no field is forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import BundleError, FormatError, GraphError
from motte.strict_json import Fields, canonical, parse


def read(text: str | bytes, max_bytes: int = 1000) -> Any:
    return parse(text, max_bytes=max_bytes, what="thing", error=GraphError)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 60), 1 << 60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_canonical_text_round_trips_and_is_unique(value: Any) -> None:
    text = canonical(value)
    assert parse(text, max_bytes=1 << 20, what="thing") == json.loads(text)
    assert canonical(json.loads(text)) == text
    assert text.isascii()


def test_canonical_sorts_and_has_no_spaces() -> None:
    assert (
        canonical({"b": [1, 2.5, None], "a": {"d": "é", "c": True}})
        == b'{"a":{"c":true,"d":"\\u00e9"},"b":[1,2.5,null]}'
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "duplicate"),
        ('[{"x": {"a": 1, "b": 2, "a": 3}}]', "duplicate"),
        ("NaN", "not a number"),
        ("[-Infinity]", "not a number"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[" * 33 + "]" * 33, "too deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "too deep"),
        ('["\x01"]', "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        read(text, 10_000)
    assert caught.value.where == "thing"


def test_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(GraphError, match="not valid JSON"):
        read(b'"\xff"')


def test_size_is_bounded_in_bytes() -> None:
    assert read('"éé"', 6) == "éé"
    with pytest.raises(GraphError, match="too large"):
        read('"éé"', 5)


def test_depth_counts_brackets_outside_of_strings_only() -> None:
    assert read("[" * 32 + "]" * 32) is not None
    text = json.dumps(["[{" * 40, '"[' * 40, "\\" * 40, [1]])
    assert read(text) == json.loads(text)


def test_the_error_class_is_the_caller_s() -> None:
    with pytest.raises(BundleError):
        parse("{", max_bytes=10, what="header", error=BundleError)
    with pytest.raises(FormatError):
        parse("{", max_bytes=10, what="header")


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_format_error(data: bytes) -> None:
    try:
        read(data)
    except GraphError:
        pass


TAKE: dict[str, tuple[Callable[[Fields], Any], list[Any], list[Any]]] = {
    "integer": (lambda f: f.integer("k", low=-2, high=9), [-2, 0, 9], [-3, 10, True, 1.0, "1", None]),
    "text": (lambda f: f.text("k", max_bytes=4), ["", "abcd", "éé"], ["abcde", "ééé", 1, None, "\ud800", "a\udfff"]),
    "choice": (lambda f: f.choice("k", ("a", "b")), ["a", "b"], ["c", "", 1, None, ["a"]]),
    "boolean": (lambda f: f.boolean("k"), [True, False], [0, 1, "true", None]),
    "number": (lambda f: f.number("k"), [0, 1.5, -3], [True, "1", None, 1e301, float("nan"), float("inf"), 10**400]),
    "hexadecimal": (
        lambda f: f.hexadecimal("k", length_bytes=2),
        ["00ff"],
        ["00FF", "00f", "00ffaa", "0x00", 1, "zz00"],
    ),
    "items": (
        lambda f: f.items("k", max_items=2, read=lambda x, w: x),
        [[], [1], [1, 2]],
        [[1, 2, 3], (1,), {}, "ab", None],
    ),
    "fields": (lambda f: f.fields("k"), [{}, {"a": 1}], [[], 1, None, "x"]),
}


@pytest.mark.parametrize("kind", TAKE)
def test_fields_take_what_fits_and_refuse_the_rest(kind: str) -> None:
    take, good, bad = TAKE[kind]
    for value in good:
        fields = Fields({"k": value}, where="thing", error=GraphError)
        take(fields)
        fields.done()
    for value in bad:
        with pytest.raises(GraphError) as caught:
            take(Fields({"k": value}, where="thing", error=GraphError))
        assert caught.value.where == "thing.k"
    with pytest.raises(GraphError, match="missing"):
        take(Fields({}, where="thing", error=GraphError))


def test_values_come_back_as_what_they_stand_for() -> None:
    fields = Fields({"h": "00ff", "n": 2, "l": [1, 2], "o": {"x": 1}}, where="thing")
    assert fields.hexadecimal("h", length_bytes=2) == b"\x00\xff"
    assert fields.number("n") == 2.0
    assert isinstance(2.0, float)
    assert fields.items("l", max_items=2, read=lambda x, where: (x, where)) == [(1, "thing.l[0]"), (2, "thing.l[1]")]
    inner = fields.fields("o")
    assert inner.where == "thing.o"
    assert inner.any("x") == 1
    fields.done()


def test_what_nobody_asked_for_is_refused() -> None:
    fields = Fields({"a": 1, "b": 2}, where="thing", error=GraphError)
    fields.integer("a", low=0, high=9)
    assert fields.has("b")
    assert not fields.has("a")
    with pytest.raises(GraphError):
        fields.done()


def test_a_field_is_taken_once() -> None:
    fields = Fields({"a": 1}, where="thing", error=GraphError)
    fields.any("a")
    with pytest.raises(GraphError, match="missing"):
        fields.any("a")


def test_the_object_itself_is_not_changed() -> None:
    value = {"a": 1}
    Fields(value, where="thing").any("a")
    assert value == {"a": 1}


@pytest.mark.parametrize("value", [None, [], 1, "x"])
def test_only_objects_have_fields(value: Any) -> None:
    with pytest.raises(GraphError, match="not an object"):
        Fields(value, where="thing", error=GraphError)


def depth_byte_by_byte(raw: bytes) -> int:
    """The deepest nesting outside strings, the slow and obvious way."""
    deepest = depth = 0
    in_string = escaped = False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == ord("\\"):
                escaped = True
            elif byte == ord('"'):
                in_string = False
        elif byte == ord('"'):
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


@given(st.lists(st.sampled_from(['"', "\\", "[" * 7, "{" * 5, "]", "}", "a", "\n", "é"]), max_size=40))
def test_nesting_is_counted_as_the_obvious_way_counts_it(pieces: list[str]) -> None:
    text = "[" * 20 + "".join(pieces)
    try:
        parse(text, max_bytes=1 << 16, what="text")
        nested = False
    except FormatError as problem:
        nested = "nested too deeply" in str(problem)
    assert nested == (depth_byte_by_byte(text.encode()) > 32)
