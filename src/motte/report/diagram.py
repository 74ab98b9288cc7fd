"""Drawings as inline SVG: a plan as its parts on two sides, and the way from split to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from motte.bench.results import PlanDrawing, PlanPart
from motte.report import words
from motte.report.html import Markup, joined, tag

_WIDTH, _LEFT, _RIGHT = 430, 262, 128
_ROW, _GAP, _TOP = 50, 10, 30
_SHOWN_PARTS: Final = 64
_ARROW = "M0,0 L8,4 L0,8 z"


def plan(drawing: PlanDrawing, identifier: str) -> Markup:
    """The parts from top to bottom, the trusted side to the left, what runs outside to the right."""
    parts = drawing.parts[:_SHOWN_PARTS]
    largest = max(1, *(part.weight_bytes for part in drawing.parts))
    both = any(part.outside or part.side != "trusted" for part in drawing.parts)
    left = _LEFT if both else _WIDTH - 8
    heads = [_text(left / 2, 18, "trusted side", "lane", middle=True)]
    if both:
        heads.append(_text(_LEFT + 40 + _RIGHT / 2, 18, "outside", "lane", middle=True))
    rows = [_part(part, number, largest, identifier, left) for number, part in enumerate(parts, start=1)]
    height = _TOP + len(parts) * (_ROW + _GAP) + 4
    left_out = len(drawing.parts) - len(parts)
    if left_out:
        rows.append(_text(8, height + 12, f"... and {words.counted(left_out, 'more part')}", "small"))
        height += 24
    return _svg(identifier, _WIDTH, height, describe(drawing), *heads, *rows, class_="plan")


def describe(drawing: PlanDrawing) -> str:
    """The plan in words."""
    inside = sum(part.side == "trusted" for part in drawing.parts)
    weights = sum(part.weight_bytes for part in drawing.parts)
    largest = max(part.weight_bytes for part in drawing.parts)
    split = len({name for part in drawing.parts for name in part.outside})
    said = [
        f"{words.counted(len(drawing.parts), 'part')} in the order in which they run, "
        f"{inside} on the trusted side and {len(drawing.parts) - inside} outside",
        f"{words.bytes_(weights)} of weights, {words.bytes_(largest)} in the largest part",
    ]
    said.append(f"{words.counted(split, 'linear layer')} split with the outside" if split else "no layer runs split")
    return "; ".join(said) + "."


def _part(part: PlanPart, number: int, largest: int, identifier: str, lane: int) -> Markup:
    top = _TOP + (number - 1) * (_ROW + _GAP)
    inside = part.side == "trusted"
    left, width = (4, lane) if inside else (_LEFT + 40, _RIGHT)
    name = part.first if part.first == part.last else f"{part.first} to {part.last}"
    sizes = f"{words.counted(part.nodes, 'node')}, {words.bytes_(part.weight_bytes)}"
    room = (width - 44) // 7
    shapes = [
        _box(left, top, width, _ROW, "trusted" if inside else "outside"),
        _text(left + 10, top + 20, str(number), "number"),
        _text(left + 34, top + 20, _short(name, room), "name"),
        _text(left + 34, top + 37, sizes, "small"),
        tag(
            "rect", x=left, y=top + _ROW - 4, width=round(width * part.weight_bytes / largest), height=4, class_="fill"
        ),
    ]
    if number > 1 and inside:
        shapes.append(tag("line", x1=left + 17, y1=top - _GAP, x2=left + 17, y2=top, class_="flow"))
    if part.outside and inside:
        right = _LEFT + 40
        middle = top + _ROW / 2
        shapes += [
            tag("line", x1=_LEFT + 6, y1=middle, x2=right - 2, y2=middle, class_="flow both",
                marker_end=f"url(#{identifier}-to)", marker_start=f"url(#{identifier}-from)"),
            _box(right, top, _RIGHT, _ROW, "outside"),
            _text(right + 8, top + 20, f"{words.counted(len(part.outside), 'layer')} split", "name"),
            _text(right + 8, top + 37, _short(part.outside[0], 17), "small"),
        ]  # fmt: skip
    title = f"{number}: {name}, {sizes}" + (f"; split: {', '.join(part.outside)}" if part.outside else "")
    return tag("g", tag("title", title), *shapes)


_STAGES: Final = (
    ("split", "owner's machine", "the model is cut into parts", "owner"),
    ("seal", "owner's machine", "each part is encrypted, all are signed", "owner"),
    ("attest", "host and verifier", "the worker shows what it is", "host"),
    ("run", "trusted worker", "keys come in; parts are opened and run", "trusted"),
)


def flow(identifier: str, *, simulated: bool, upright: bool) -> Markup:
    """split -> seal -> attest -> run, from left to right, or ``upright`` for narrow screens."""
    stages = [
        (name, place, "SIMULATED: the evidence proves nothing" if simulated and name == "attest" else said, side)
        for name, place, said, side in _STAGES
    ]
    width, height, gap = (340, 84, 26) if upright else (214, 112, 34)
    shapes: list[Markup] = []
    for index, (name, place, said, side) in enumerate(stages):
        left, top = (4, 4 + index * (height + gap)) if upright else (4 + index * (width + gap), 4)
        shapes.append(_box(left, top, width, height, "trusted" if side == "trusted" else "plain"))
        shapes.append(_text(left + 14, top + 28, f"{index + 1}. {name}", "stage"))
        shapes.append(_text(left + 14, top + 48, place, "small"))
        for line, piece in enumerate(_lines(said, 44 if upright else 28)):
            shapes.append(_text(left + 14, top + 70 + 18 * line, piece, "name"))
        if index:
            start = (left + width / 2, top - gap) if upright else (left - gap, top + height / 2)
            end = (left + width / 2, top - 3) if upright else (left - 3, top + height / 2)
            marker = f"url(#{identifier}-to)"
            shapes.append(tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_="flow", marker_end=marker))
    count = len(stages)
    size = (width + 8, count * height + (count - 1) * gap + 8) if upright else (
        count * width + (count - 1) * gap + 8, height + 8
    )  # fmt: skip
    said = "; then ".join(f"{name} ({place}): {what}" for name, place, what, _ in stages) + "."
    return _svg(identifier, *size, said, *shapes, class_="upright" if upright else "across")


def _svg(identifier: str, width: float, height: float, said: str, *shapes: Markup, class_: str) -> Markup:
    markers = [
        tag("marker", tag("path", d=_ARROW, class_="head"), id=f"{identifier}-{name}", markerWidth=8, markerHeight=8,
            refX=7, refY=4, orient=orient, markerUnits="userSpaceOnUse")
        for name, orient in (("to", "auto"), ("from", "auto-start-reverse"))
    ]  # fmt: skip
    return tag(
        "svg", tag("defs", *markers), joined(*shapes), viewBox=f"0 0 {width:g} {height:g}", role="img",
        aria_label=said, class_=f"drawing {class_}", xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def _box(left: float, top: float, width: float, height: float, kind: str) -> Markup:
    return tag("rect", x=left, y=top, width=width, height=height, rx=6, class_=f"box {kind}")


def _text(x: float, y: float, text: str, kind: str, *, middle: bool = False) -> Markup:
    return tag("text", text, x=x, y=y, class_=kind, text_anchor="middle" if middle else None)


def _short(text: str, room: int) -> str:
    shown = words.visible(text)
    return shown if len(shown) <= room else shown[: room - 3] + "..."


def _lines(text: str, room: int) -> Sequence[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
