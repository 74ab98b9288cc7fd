"""Real architectures: parts(x) equals the captured graph and the eager model, bit for bit.

Random weights, one thread. Bits depend on shapes; so the pictures are as small as the architectures take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from motte.capture import Captured, capture
from motte.capture.graph import Graph
from motte.engines.torch_engine import TorchEngine
from motte.errors import MismatchError
from motte.plan.plan import Plan
from motte.plan.planner import plan_cuts, plan_parts, plan_streamed, plan_under
from motte.plan.streamed import PartNeed, copy_bytes, streamed_need
from motte.plan.table import plan_table
from motte.split.chain import run_parts
from motte.split.layout import lay_out
from motte.split.oracle import TILED_TOLERANCE, check_parts, relative_difference
from motte.split.split import split
from motte.zoo.published_cuts import CLASSICS, PUBLISHED_CUTS, PUBLISHED_PARTS
from motte.zoo.vision_ops import import_torchvision

PIXELS = 64
COUNTS = (1, 2, 4, 6, 8, 10, 12, 24)
SMALL = ("squeezenet1_0", "mobilenet_v3_small")
"""Captured once for all tests: the others would fill the memory."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _captured(name: str, pixels: int) -> tuple[torch.nn.Module, Captured]:
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name, weights=None).eval()
    with torch.no_grad():
        # Statistics that are not those of a fresh batch norm, or every batch norm would be nearly the identity.
        for each in model.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.running_mean.normal_(0, 0.1)
                each.running_var.uniform_(0.5, 1.5)
    x = picture(2, pixels)
    for argument in ("x", "input"):
        if argument in type(model).forward.__annotations__ or argument in type(model).forward.__code__.co_varnames[:2]:
            return model, capture(model, (x,), dims={argument: {0: "batch"}}, name=name)
    raise AssertionError(f"what does {name} call its input?")


def picture(batch: int, pixels: int = PIXELS) -> torch.Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(batch))


def agrees(model: torch.nn.Module, captured: Captured, plan: Plan, x: torch.Tensor) -> None:
    """Against the captured graph by the oracle, against the eager model here."""
    assert check_parts(captured.graph, plan, TorchEngine(), captured.weights, [x]).parts == plan.parts
    (found,) = answer(captured, split(captured.graph, plan), x)
    with torch.no_grad():
        wanted = model(x)
    assert found.shape == wanted.shape
    assert found.stride() == wanted.stride()
    assert torch.equal(found, wanted)


def answer(captured: Captured, parts: Any, x: torch.Tensor, wrap: Any = None) -> list[torch.Tensor]:
    from contextlib import nullcontext

    programs = [TorchEngine().compile(part.graph) for part in parts]
    programs = [wrap(program) for program in programs] if wrap else programs
    dims = {dim.name: x.shape[0] for dim in captured.graph.dims}
    return run_parts(parts, programs, captured.graph, [x], lambda index: nullcontext(captured.weights), dims)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSICS)
def test_the_classics_in_parts(name: str) -> None:
    model, captured = _captured(name, PIXELS)
    graph = captured.graph
    published = plan_cuts(graph, cut_after=PUBLISHED_CUTS[name], objective="published", dims={"batch": 1})
    assert published.parts == PUBLISHED_PARTS
    # AlexNet has 20 operations: it cannot be 24 parts.
    counts = [n for n in COUNTS if n <= len(graph.nodes)]
    assert counts == (list(COUNTS) if name != "alexnet" else list(COUNTS[:-1]))
    plans = [published]
    for batch in (1, 5):
        plans += [plan_parts(graph, parts=n, objective="memory", dims={"batch": batch}) for n in counts]
    assert [plan.parts for plan in plans] == [PUBLISHED_PARTS, *counts, *counts]
    for plan in plans:
        x = picture(dict(plan.dims)["batch"])
        assert check_parts(graph, plan, TorchEngine(), captured.weights, [x]).parts == plan.parts
    for batch in (1, 5):
        # The chain equals the captured graph, whatever the plan; so one plan is enough against the eager model.
        agrees(model, captured, published, picture(batch))
    if name not in SMALL:
        _captured.cache_clear()


LARGEST_SHARE = {
    "alexnet": 96.0, "vgg16": 89.4, "vgg19": 86.1, "squeezenet1_0": 41.1, "resnet50": 58.6, "resnet101": 33.6,
    "mobilenet_v3_large": 45.8, "mobilenet_v3_small": 63.5,
}  # fmt: skip
"""Per cent of the parameters in the largest part of the published cuts, as published."""


@pytest.mark.parametrize("name", SMALL)
def test_published_cuts_give_the_published_shares(name: str) -> None:
    model, captured = _captured(name, PIXELS)
    graph = captured.graph
    plan = plan_cuts(graph, cut_after=PUBLISHED_CUTS[name], objective="published", dims={"batch": 1})
    trained = {parameter for parameter, _ in model.named_parameters()}
    shares = [
        sum(weight.elements for weight in part.graph.weights.values() if weight.name in trained)
        for part in split(graph, plan)
    ]
    assert round(100 * max(shares) / sum(shares), 1) == LARGEST_SHARE[name]
    best = plan_parts(graph, parts=PUBLISHED_PARTS, objective="weights", dims={"batch": 1})
    assert plan_table(best, graph).totals.largest_weight_bytes <= plan_table(plan, graph).totals.largest_weight_bytes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("objective", ["weights", "memory", "boundary"])
def test_two_small_classics_in_parts(name: str, objective: str) -> None:
    model, captured = _captured(name, PIXELS)
    for batch in (1, 5):
        plan = plan_parts(captured.graph, parts=12, objective=objective, dims={"batch": batch})
        agrees(model, captured, plan, picture(batch))


def test_planned_by_measured_time() -> None:
    model, captured = _captured("squeezenet1_0", PIXELS)
    times = TorchEngine().profile(captured.graph, captured.weights, [picture(1)], {"batch": 1}, 1)
    plan = plan_parts(captured.graph, parts=6, objective="time", dims={"batch": 1}, times=times)
    agrees(model, captured, plan, picture(1))


class _Contiguous:
    """A program that forces what it gives into row-major order, as a careless boundary would."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def run(self, *given: Any) -> list[torch.Tensor]:
        return [tensor.contiguous() for tensor in self._program.run(*given)]


class _ContiguousEngine(TorchEngine):
    def compile(self, graph: Graph) -> Any:
        program = super().compile(graph)
        return _Contiguous(program) if ".part" in graph.name else program


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels", "parts"), [("swin_t", 224, 24), ("convnext_tiny", 64, 61)])
def test_boundaries_must_keep_their_strides(name: str, pixels: int, parts: int) -> None:
    model, captured = _captured(name, pixels)
    x = picture(1, pixels)
    plan = plan_parts(captured.graph, parts=parts, objective="memory", dims={"batch": 1})
    agrees(model, captured, plan, x)
    with pytest.raises(MismatchError, match="another strides"):
        check_parts(captured.graph, plan, _ContiguousEngine(), captured.weights, [x])
    (kept,) = answer(captured, split(captured.graph, plan), x)
    (forced,) = answer(captured, split(captured.graph, plan), x, _Contiguous)
    assert relative_difference(forced, kept) < 1e-4
    _captured.cache_clear()
    if torch.equal(forced, kept):
        pytest.skip("the kernels of this CPU give the same bits for other strides")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "memory_mib"), [("alexnet", 32), ("resnet50", 16)])
def test_tiled_models(name: str, memory_mib: int) -> None:
    _, captured = _captured(name, PIXELS)
    graph = captured.graph
    streamed = plan_streamed(graph, weight_memory_bytes=memory_mib << 20, dims={"batch": 2})
    needs = [PartNeed(lay_out(part.graph).bytes, copy_bytes(part.graph)) for part in split(graph, streamed)]
    assert streamed_need(needs) <= memory_mib << 20
    under = plan_under(graph, max_part_bytes=(memory_mib << 20) // 2, dims={"batch": 2})
    assert plan_table(under, graph).totals.largest_memory_bytes <= (memory_mib << 20) // 2
    assert streamed.tiles
    for plan in (streamed, under):
        agreement = check_parts(graph, plan, TorchEngine(), captured.weights, [picture(2)])
        assert agreement.tiled_difference <= TILED_TOLERANCE
    _captured.cache_clear()
