"""Size expressions: the grammar, its bounds, and nothing beyond it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Size, TensorType
from motte.capture.sizes import bytes_of, evaluate, shape_of
from motte.errors import GraphError
from motte.limits import MAX_NAME_BYTES

DIMS = {"batch": 5, "seq": 7}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("batch", 5),
        ("2*batch + seq", 17),
        ("(seq - 1) // 2", 3),
        ("seq % 4", 3),
        ("-batch", -5),
        ("-7 // 2", -4),
        ("max(batch, seq)", 7),
        ("min(batch, max(1, seq - 9))", 1),
        ("batch*(batch + seq)", 60),
    ],
)
def test_grammar(text: str, value: int) -> None:
    assert evaluate(Size(text), DIMS) == value


def test_plain_integers_are_themselves() -> None:
    assert evaluate(4, {}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "width", "batch +", "(batch", "batch / 2", "batch ** 2", "2.5", "1e3", "True", "None", "'a'",
        "batch.real",
        "batch[0]", "max(batch)", "max(batch, seq, 1)", "max(a=1, b=2)", "max(*batch, 1)", "abs(batch)", "len(batch)",
        "__import__(1, 2)", "~batch", "not batch", "batch if seq else 1", "1if batch else 2", "lambda: 1", "batch := 1",
        "batch, seq", "()", "0x10", "0b1", "1j", "1_000", "batch == 1", "batch and 1", "batch\n", "batch # comment",
        "max", "batch // 0", "batch % (seq - 7)", "9" * 40, "*".join(["99999999"] * 3),
        "(" * 250 + "1" + ")" * 250, "-" * 500 + "1", "~" * 500 + "1", "+".join(["1"] * 200), "1 " * 400,
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(GraphError):
        evaluate(Size(text), DIMS)


@given(st.text(alphabet="batchseq0123456789 +-*/%(),~._[]'\n", max_size=MAX_NAME_BYTES + 10))
def test_any_text_gives_an_integer_or_a_graph_error(text: str) -> None:
    try:
        assert isinstance(evaluate(Size(text), DIMS), int)
    except GraphError:
        pass


TERMS = st.recursive(
    st.sampled_from(["batch", "seq", "1", "2", "13"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(["max", "min"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        inner.map(lambda t: f"(-{t})"),
    ),
    max_leaves=8,
)


@given(TERMS)
def test_agrees_with_python_s_own_arithmetic(text: str) -> None:
    try:
        expected = eval(text, {"__builtins__": {}}, {**DIMS, "max": max, "min": min})
    except ZeroDivisionError:
        with pytest.raises(GraphError, match="division by zero"):
            evaluate(Size(text), DIMS)
    else:
        assert evaluate(Size(text), DIMS) == expected


def test_shapes_and_bytes() -> None:
    type_ = TensorType("bf16", (Size("batch"), 3, Size("seq - 7")))
    assert shape_of(type_, DIMS) == (5, 3, 0)
    assert bytes_of(type_, {"batch": 2, "seq": 11}) == 2 * 3 * 4 * 2
    with pytest.raises(GraphError, match="negative"):
        shape_of(type_, {"batch": 2, "seq": 6})
    with pytest.raises(GraphError, match="too large"):
        bytes_of(TensorType("f64", (1 << 40, 1 << 20)), {})
