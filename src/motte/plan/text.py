"""The text of a plan: one fact a line, in a fixed order. Reading what was written gives the same plan, and the other
way round: there is exactly one text for a plan. Format: docs/spec/plan.md.

    motte-plan 1
    graph 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    objective memory
    dim batch 4
    tile linear 8
    cut 1 after relu_3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from motte.errors import FormatError, PlanError
from motte.limits import MAX_DIM_SIZE, MAX_GRAPH_DIMS, MAX_NAME_BYTES, MAX_PARTS, MAX_PLAN_TEXT_BYTES, MAX_TILES
from motte.plan.plan import OBJECTIVES, Plan, Tile

PLAN_VERSION = 1
_MAX_TILED_NODES = 4 * MAX_PARTS
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
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
    reader = _Reader(text[:-1].split("\n"))
    reader.take("motte-plan", _exactly(str(PLAN_VERSION)))
    (digest,) = reader.take("graph", _matching(re.compile("[0-9a-f]{64}"), "64 hexadecimal digits"))
    (objective,) = reader.take("objective", _one_of(OBJECTIVES))
    dims = [
        (name, int(size)) for name, size in reader.take_all("dim", _name, _number(MAX_DIM_SIZE), most=MAX_GRAPH_DIMS)
    ]
    tiles = [
        Tile(name, int(count))
        for name, count in reader.take_all("tile", _name, _number(MAX_TILES), most=_MAX_TILED_NODES)
    ]
    cuts = reader.take_all("cut", _number(MAX_PARTS), _exactly("after"), _name, most=MAX_PARTS - 1)
    for expected, (index, _, _) in enumerate(cuts, 1):
        if int(index) != expected:
            line = reader.line - len(cuts) + expected - 1
            raise FormatError(
                "cuts are not numbered in order", where=f"plan line {line}", expected=str(expected), got=index
            )
    reader.done()
    return Plan(digest, objective, tuple(dims), tuple(name for _, _, name in cuts), tuple(tiles))


def marked(plan: Plan, line: int, problem: str) -> str:
    """The plan's text with ``line`` (from 1) marked and the problem below it; long plans only around it."""
    lines = plan_lines(plan)
    first, last = max(line - _AROUND, 1), min(line + _AROUND, len(lines))
    shown = [f"{'>' if number == line else ' '} {number:4} {lines[number - 1]}" for number in range(first, last + 1)]
    shown.insert(line - first + 1, f"       ^ {problem}")
    before = [f"       ... {first - 1} lines before"] if first > 1 else []
    after = [f"       ... {len(lines) - last} lines after"] if last < len(lines) else []
    return "\n".join([*before, *shown, *after])


Check = Callable[[str], str | None]
"""What is wrong with a word: the expected form, or None."""


def _matching(pattern: re.Pattern[str], expected: str) -> Check:
    return lambda word: None if pattern.fullmatch(word) else expected


def _exactly(wanted: str) -> Check:
    return lambda word: None if word == wanted else wanted


def _one_of(allowed: tuple[str, ...]) -> Check:
    return lambda word: None if word in allowed else " or ".join(allowed)


def _number(most: int) -> Check:
    return lambda word: None if _NUMBER.fullmatch(word) and int(word) <= most else f"a number from 1 to {most}"


def _name(word: str) -> str | None:
    # Printable leaves out every control character and every other line end and space of Unicode, and lone surrogates.
    good = word.isprintable() and 1 <= len(word.encode("utf-8", "replace")) <= MAX_NAME_BYTES
    return None if good else f"a printable name of 1 to {MAX_NAME_BYTES} bytes"


class _Reader:
    """Takes the lines in order; each is a keyword and words, separated by one space."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.line = 1

    def take(self, keyword: str, *checks: Check) -> tuple[str, ...]:
        """The words after ``keyword``, which must be the next line's."""
        if self.line > len(self._lines):
            raise FormatError("the plan ends early", where=f"plan line {self.line}", expected=keyword)
        words = self._lines[self.line - 1].split(" ")
        if words[0] != keyword or len(words) != len(checks) + 1:
            raise self._error(keyword if words[0] != keyword else f"{keyword} and {len(checks)} words")
        for word, check in zip(words[1:], checks, strict=True):
            expected = check(word)
            if expected is not None:
                raise self._error(expected)
        self.line += 1
        return tuple(words[1:])

    def take_all(self, keyword: str, *checks: Check, most: int) -> list[tuple[str, ...]]:
        """Every line from here on that begins with ``keyword``."""

        def lines() -> Iterator[tuple[str, ...]]:
            while self.line <= len(self._lines) and self._lines[self.line - 1].split(" ", 1)[0] == keyword:
                yield self.take(keyword, *checks)

        found = []
        for words in lines():
            found.append(words)
            if len(found) > most:
                raise FormatError(
                    "too many lines", where=f"plan line {self.line - 1}", expected=f"at most {most} {keyword}"
                )
        return found

    def done(self) -> None:
        """Refuse lines that are left over."""
        if self.line <= len(self._lines):
            raise self._error("dim, tile and cut lines in this order, and nothing else")

    def _error(self, expected: str) -> FormatError:
        got = repr(self._lines[self.line - 1])[:80]
        return FormatError("not a line of a plan", where=f"plan line {self.line}", expected=expected, got=got)
