"""The text of a plan round-trips both ways, and its reader refuses everything else with a line number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte import limits
from motte.errors import FormatError, PlanError
from motte.plan import text as plan_text
from motte.plan.plan import OBJECTIVES, Plan, Tile
from motte.plan.text import dumps, loads, marked

DIGEST = "0123456789abcdef" * 4
names = st.text(min_size=1, max_size=40).filter(lambda s: s.isprintable() and " " not in s)
plans = st.builds(
    Plan,
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.sampled_from(OBJECTIVES),
    st.lists(st.tuples(names, st.integers(1, limits.MAX_DIM_SIZE)), max_size=4).map(tuple),
    st.lists(names, max_size=6).map(tuple),
    st.lists(st.builds(Tile, names, st.integers(1, limits.MAX_TILES)), max_size=4).map(tuple),
)
GOOD = f"""motte-plan 1
graph {DIGEST}
objective memory
dim batch 4
dim sequence 128
tile linear 8
cut 1 after relu_3
cut 2 after linear
"""


@given(plans)
def test_round_trip(plan: Plan) -> None:
    assert loads(dumps(plan)) == plan


def test_the_text_is_the_one_in_the_specification() -> None:
    plan = Plan(DIGEST, "memory", (("batch", 4), ("sequence", 128)), ("relu_3", "linear"), (Tile("linear", 8),))
    assert dumps(plan) == GOOD
    assert loads(GOOD) == plan


@given(
    st.text(max_size=200) | st.lists(st.sampled_from([*GOOD.splitlines(keepends=True), "x\n", "\n", " "])).map("".join)
)
def test_whatever_is_read_is_written_the_same(text: str) -> None:
    """One text per plan: no second spelling of any plan is accepted."""
    try:
        plan = loads(text)
    except FormatError:
        return
    assert dumps(plan) == text


def changed(line: int, new: str | None) -> str:
    lines = GOOD.splitlines()
    lines[line - 1 : line] = [] if new is None else new.split("\n")
    return "".join(f"{one}\n" for one in lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 0),
        (GOOD[:-1], 0),
        (GOOD + "\n", 9),
        (GOOD + "note this\n", 9),
        (GOOD + "cut 4 after x\n", 9),
        (GOOD + "dim beam 3\n", 9),
        (changed(1, "motte-plan 2"), 1),
        (changed(1, "motte-plan  1"), 1),
        (changed(1, None), 1),
        (changed(2, "graph " + DIGEST.upper()), 2),
        (changed(2, "graph " + DIGEST[1:]), 2),
        (changed(3, "objective speed"), 3),
        (changed(3, "objective"), 3),
        (changed(4, "dim batch 0"), 4),
        (changed(4, "dim batch 04"), 4),
        (changed(4, "dim batch +4"), 4),
        (changed(4, "dim batch ٤"), 4),
        (changed(4, f"dim batch {limits.MAX_DIM_SIZE + 1}"), 4),
        (changed(4, "dim batch 4 "), 4),
        (changed(4, "dim batch 4\r"), 4),
        (changed(4, "dim\tbatch 4"), 4),
        (changed(6, f"tile linear {limits.MAX_TILES + 1}"), 6),
        (changed(6, "tile linear"), 6),
        (changed(6, "\n"), 6),
        (changed(7, "cut 2 after relu_3"), 7),
        (changed(8, "cut 1 after linear"), 8),
        (changed(7, "cut 1 before relu_3"), 7),
        (changed(7, "cut 1 after " + "x" * 513), 7),
        (changed(7, "cut 1 after "), 7),
        (changed(7, "cut 1 after a\u2028b"), 7),
        (changed(7, "cut 1 after a\x00b"), 7),
        (changed(7, "# cut 1 after relu_3"), 7),
        ("motte-plan 1\n", 2),
    ],
)
def test_anything_else_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(FormatError) as refused:
        loads(text)
    if line:
        assert refused.value.where == f"plan line {line}"


def test_bounds_of_size_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_text, "MAX_PLAN_TEXT_BYTES", len(GOOD))
    assert loads(GOOD).parts == 3
    with pytest.raises(FormatError, match="too large"):
        loads(GOOD.replace("relu_3", "relu_33"))
    monkeypatch.setattr(plan_text, "MAX_PARTS", 2)
    with pytest.raises(FormatError, match="plan line 8"):
        loads(GOOD)


@pytest.mark.parametrize("name", ["a b", "", "a\nb", "x" * 513, "\ud800"])
def test_a_name_that_the_text_cannot_hold_is_refused_when_written(name: str) -> None:
    with pytest.raises(PlanError, match="cannot be written"):
        dumps(Plan(DIGEST, "memory", (), (name,)))


def test_a_marked_line() -> None:
    plan = Plan(DIGEST, "memory", (("batch", 4),), tuple(f"n{i}" for i in range(30)))
    shown = marked(plan, 20, "no such node").splitlines()
    assert "> " + f"{20:4} cut 16 after n15" in shown
    assert shown[shown.index(">   20 cut 16 after n15") + 1].endswith("^ no such node")
    assert shown[0].endswith("... 13 lines before")
    assert shown[-1].endswith("... 8 lines after")
    assert marked(plan, 1, "x").splitlines()[0] == ">    1 motte-plan 1"
