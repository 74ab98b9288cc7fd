"""The encrypted manifest of a bundle: everything about the model but its weights.

One JSON object with the captured graph's text, the plan's text, the signature and, where the parts were lowered, their
programs for engines without torch. The parts, and where each weight lies in a part's bytes, follow from graph and plan
by :func:`motte.split.split` and :func:`motte.split.layout.lay_out`: what can be derived is not stored, so it cannot
disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from motte.capture.graph import Graph
from motte.capture.signature import Signature, from_json, to_json
from motte.capture.text import dumps as graph_dumps
from motte.capture.text import loads as graph_loads
from motte.errors import BundleError
from motte.limits import MAX_GRAPH_TEXT_BYTES, MAX_MANIFEST_BYTES, MAX_PLAN_TEXT_BYTES
from motte.lower.lowered import Lowered, NotLowered
from motte.lower.lowered import from_json as lowered_from_json
from motte.lower.lowered import to_json as lowered_to_json
from motte.plan.plan import Plan
from motte.plan.rules import check_plan
from motte.plan.text import dumps as plan_dumps
from motte.plan.text import loads as plan_loads
from motte.seal.kinds import MODEL, check_kind
from motte.split.layout import PartLayout, lay_out
from motte.split.split import Part, split
from motte.strict_json import Fields, canonical, parse

MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """The captured graph, the plan over it, how the model is called, and its lowered parts.

    ``lowered`` None: nobody tried. :class:`~motte.lower.lowered.NotLowered` says why it could not be done.
    """

    graph: Graph
    plan: Plan
    signature: Signature
    lowered: Lowered | NotLowered | None = None


@dataclass(frozen=True, slots=True)
class LaidOutPart:
    """A part and where its weights lie."""

    part: Part
    layout: PartLayout


def dumps(manifest: Manifest) -> bytes:
    """The manifest as bytes, to be sealed."""
    body = {
        "version": MANIFEST_VERSION,
        "graph": graph_dumps(manifest.graph),
        "plan": plan_dumps(manifest.plan),
        "signature": to_json(manifest.signature),
    }
    if manifest.lowered is not None:
        body["lowered"] = lowered_to_json(manifest.lowered)
    return canonical(body)


def loads(data: bytes) -> Manifest:
    """Read a **decrypted and authenticated** manifest; it is checked all the same, since its author may err.

    Raises:
        BundleError: malformed (checks M-1 and M-5); GraphError, PlanError: graph or plan break one of their own rules.
    """
    fields = _fields(data)
    graph = graph_loads(fields.text("graph", max_bytes=MAX_GRAPH_TEXT_BYTES))
    plan = plan_loads(fields.text("plan", max_bytes=MAX_PLAN_TEXT_BYTES))
    signature = from_json(fields.any("signature"))
    lowered = lowered_from_json(fields.any("lowered")) if fields.has("lowered") else None
    fields.done()
    check_plan(plan, graph)
    if isinstance(lowered, Lowered) and len(lowered.parts) != plan.parts:
        counts = {"expected": str(plan.parts), "got": str(len(lowered.parts))}
        raise BundleError("lowered part count differs from the plan", check="M-5", where="manifest.lowered", **counts)
    return Manifest(graph, plan, signature, lowered)


def read_lowered(data: bytes) -> Lowered | NotLowered | None:
    """Only the lowered form of a **decrypted and authenticated** manifest: what a client chooses an engine by.

    Raises:
        BundleError: malformed.
    """
    fields = _fields(data)
    return lowered_from_json(fields.any("lowered")) if fields.has("lowered") else None


def _fields(data: bytes) -> Fields:
    fields = Fields(
        parse(data, max_bytes=MAX_MANIFEST_BYTES, what="manifest", error=BundleError),
        where="manifest",
        error=BundleError,
    )
    check_kind(fields, MODEL)
    fields.integer("version", low=MANIFEST_VERSION, high=MANIFEST_VERSION)
    return fields


def lay_out_parts(manifest: Manifest, *, checked: bool = False) -> tuple[LaidOutPart, ...]:
    """The parts in order, each with its layout. ``checked``: the manifest comes from :func:`loads`."""
    parts = split(manifest.graph, manifest.plan, checked=checked)
    return tuple(LaidOutPart(part, lay_out(part.graph)) for part in parts)


def check_sizes(parts: tuple[LaidOutPart, ...], part_bytes: tuple[int, ...]) -> None:
    """Refuse a bundle whose signed part sizes are not those that its own graph and plan give.

    Raises:
        BundleError: check M-2.
    """
    if len(parts) != len(part_bytes):
        raise BundleError(
            "part count differs from the plan", check="M-2", expected=str(len(parts)), got=str(len(part_bytes))
        )
    for index, (part, size) in enumerate(zip(parts, part_bytes, strict=True), 1):
        if part.layout.bytes != size:
            raise BundleError(
                "part size differs from the plan",
                check="M-2",
                where=f"part {index}",
                expected=f"{part.layout.bytes} bytes",
                got=str(size),
            )


__all__ = ["LaidOutPart", "Manifest", "check_sizes", "dumps", "lay_out_parts", "loads", "read_lowered"]
