"""The text of a plan: one fact a line, in a fixed order. Reading what was written gives the same plan, and the other
way round: there is exactly one text for a plan. Format: docs/spec/plan.md.

    motte-plan 1
    graph 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    objective memory
    dim batch 4
    tile linear 8
    cut 1 after relu_3

An offload section may follow: the settings of the scheme and one line a layer (:mod:`motte.plan.offload_text`).
"""

from __future__ import annotations

import re

from motte.errors import FormatError, PlanError
from motte.limits import MAX_DIM_SIZE, MAX_GRAPH_DIMS, MAX_PARTS, MAX_PLAN_TEXT_BYTES, MAX_TILES
from motte.plan.lines import LineReader, exactly, matching, name_word, number, one_of
from motte.plan.offload_text import offload_lines, read_offload
from motte.plan.plan import OBJECTIVES, Plan, Tile

PLAN_VERSION = 1
_MAX_TILED_NODES = 4 * MAX_PARTS
_AROUND = 6
"""Lines shown on either side of a marked one."""


def plan_lines(plan: Plan) -> list[str]:
    """The lines of the text, without line ends. The first line is number 1 in messages."""
    return [
        f"motte-plan {PLAN_VERSION}",
        f"graph {plan.graph_digest}",
        f"objective {plan.objective}",
        *(f"dim {name} {size}" for name, size in plan.dims),
        *(f"tile {tile.node} {tile.count}" for tile in plan.tiles),
        *(f"cut {index} after {name}" for index, name in enumerate(plan.cut_after, 1)),
        *([] if plan.offload is None else offload_lines(plan.offload)),
    ]


def dumps(plan: Plan) -> str:
    """The text of ``plan``, ending in a line end.

    Raises:
        PlanError: the plan holds something that its text cannot say, such as a name with a space.
    """
    text = "".join(f"{line}\n" for line in plan_lines(plan))
    try:
        same = loads(text) == plan
    except FormatError as problem:
        raise PlanError("this plan cannot be written as text", where=problem.where, got=problem.got) from problem
    if not same:
        raise PlanError("this plan cannot be written as text", got="its text reads as another plan")
    return text


def loads(text: str) -> Plan:
    """Read **unverified** text. The result is well-formed; whether it fits a graph, :func:`check_plan` says.

    Raises:
        FormatError: too large, or a line that does not follow the format, with its number.
    """
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_PLAN_TEXT_BYTES:
        raise FormatError("plan too large", expected=f"at most {MAX_PLAN_TEXT_BYTES} bytes", got=f"{size} bytes")
    if not text.endswith("\n"):
        raise FormatError("the last line of the plan has no end")
    # Not splitlines(): it also ends lines at form feeds, U+2028 and others.
    reader = LineReader(text[:-1].split("\n"))
    reader.take("motte-plan", exactly(str(PLAN_VERSION)))
    (digest,) = reader.take("graph", matching(re.compile("[0-9a-f]{64}"), "64 hexadecimal digits"))
    (objective,) = reader.take("objective", one_of(OBJECTIVES))
    dims = [
        (name, int(size)) for name, size in reader.take_all("dim", name_word, number(MAX_DIM_SIZE), most=MAX_GRAPH_DIMS)
    ]
    tiles = [
        Tile(name, int(count))
        for name, count in reader.take_all("tile", name_word, number(MAX_TILES), most=_MAX_TILED_NODES)
    ]
    cuts = reader.take_all("cut", number(MAX_PARTS), exactly("after"), name_word, most=MAX_PARTS - 1)
    for expected, (index, _, _) in enumerate(cuts, 1):
        if int(index) != expected:
            line = reader.line - len(cuts) + expected - 1
            raise FormatError(
                "cuts are not numbered in order", where=f"plan line {line}", expected=str(expected), got=index
            )
    offload = read_offload(reader)
    reader.done()
    return Plan(digest, objective, tuple(dims), tuple(name for _, _, name in cuts), tuple(tiles), offload)


def marked(plan: Plan, line: int, problem: str) -> str:
    """The plan's text with ``line`` (from 1) marked and the problem below it; long plans only around it."""
    lines = plan_lines(plan)
    first, last = max(line - _AROUND, 1), min(line + _AROUND, len(lines))
    shown = [f"{'>' if number == line else ' '} {number:4} {lines[number - 1]}" for number in range(first, last + 1)]
    shown.insert(line - first + 1, f"       ^ {problem}")
    before = [f"       ... {first - 1} lines before"] if first > 1 else []
    after = [f"       ... {len(lines) - last} lines after"] if last < len(lines) else []
    return "\n".join([*before, *shown, *after])
