"""A model whose layers run split answers as the whole one does: many architectures, both memory modes, any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.capture.export import Captured, capture
from motte.engines.torch_engine import TorchEngine
from motte.errors import GraphError, SettingError
from motte.offload.graph_layers import choose_layers, public_names, split_nodes
from motte.offload.placement import to_plan
from motte.offload.settings import Asymmetric, Energy, Fixed, Schedule
from motte.plan.linear_nodes import linear_weight
from motte.plan.plan import Tile
from motte.plan.planner import plan_parts
from motte.run.tensors import from_wire, to_wire
from motte.split.oracle import relative_difference

PLAIN = Asymmetric(noise=None)


def agree(captured: Captured, scheme: Asymmetric, inputs: Sequence[Tensor], wanted: Tensor, tools, **sizes) -> None:
    plan = tools.placed(captured, scheme, ["all-but-first-last"], **sizes)
    accelerator = InProcessAccelerator()
    got = tools.answer(captured, plan, scheme, accelerator, inputs)[0]
    assert got.shape == wanted.shape
    assert relative_difference(got, wanted) < 1e-4
    assert plan.offload is not None
    assert {name.partition("#")[0] for name in accelerator.stats()} == set(plan.offload.split)


def whole(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        found = model(*inputs)
    return found if isinstance(found, Tensor) else next(iter(found.values()))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    into = 3
    for out, pool in ((8, True), (12, False), (12, True), (16, False), (16, True)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        into = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, 10)).eval()


def torchvision_model(name: str) -> nn.Module:
    import motte.zoo.vision_ops  # noqa: F401 - before torchvision, as its docstring says

    models = __import__("torchvision.models", fromlist=["models"])
    torch.manual_seed(5)
    return getattr(models, name)(weights=None, num_classes=10).eval()


@pytest.mark.parametrize(("name", "side"), [("vgg", 32), ("mobilenet_v3_small", 32), ("squeezenet1_1", 33)], ids=str)
def test_convolutional_models(offload_tools, name: str, side: int) -> None:
    model = vgg() if name == "vgg" else torchvision_model(name)
    captured = capture(model, (torch.zeros(2, 3, side, side),), dims={_names(model)[0]: {0: "batch"}}, name=name)
    for batch in (1, 3):
        x = torch.randn(batch, 3, side, side)
        agree(captured, PLAIN, [x], whole(model, x), offload_tools)


def _names(model: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


@pytest.mark.parametrize(
    "scheme",
    [
        PLAIN,
        Asymmetric(noise=None, rank=Fixed(0), integrity="off"),
        Asymmetric(noise=None, rank=Energy(0.8), decomposition="range-finder", iterations=2),
        Asymmetric(noise=None, rank=Schedule(1, 2, 4), integrity_vectors=1),
    ],
    ids=["default", "all-leaves", "energy", "schedule"],
)
def test_the_shipped_model(offload_tools, shipped, scheme: Asymmetric) -> None:
    captured, model = shipped
    x = torch.rand(2, 1, 28, 28)
    agree(captured, scheme, [x], whole(model, x), offload_tools, parts=4)


def test_the_residual_in_bfloat16_is_a_rounded_answer(offload_tools, shipped) -> None:
    captured, model = shipped
    x = torch.rand(2, 1, 28, 28)
    scheme = Asymmetric(noise=None, residual_dtype="bfloat16")
    plan = offload_tools.placed(captured, scheme, ["all-but-first-last"])
    accelerator = InProcessAccelerator()
    got = offload_tools.answer(captured, plan, scheme, accelerator, [x])[0]
    assert 0 < relative_difference(got, whole(model, x)) < 3e-2


@pytest.fixture(scope="module")
def shipped() -> tuple[Captured, nn.Module]:
    from motte.zoo import build
    from motte.zoo.models import capture_built

    built = build("resnet20-fashion-mnist")
    return capture_built(built), built.model


class Block(nn.Module):
    """One layer of a BERT-like encoder, as MiniLM has six."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.first(x + self.out(seen.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(50, 24), nn.ModuleList([Block(24, 3), Block(24, 3)])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, mask.bool())
        return x


def test_token_layers_of_an_encoder(offload_tools) -> None:
    torch.manual_seed(3)
    model = Encoder().eval()
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    sizes = {"ids": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}
    captured = capture(model, (ids, mask), dims=sizes, name="encoder")
    plan = offload_tools.placed(captured, PLAIN, ["all-but-first-last"], dims={"batch": 2, "sequence": 9})
    # The embedding is the first layer: it looks up stored rows. The last is the one that nothing follows.
    assert len(plan.offload.split) == 11
    assert plan.offload.inside == ("blocks.1.down",)
    for length in (9, 4):
        given = [ids[:, :length].contiguous(), mask[:, :length].contiguous()]
        agree(captured, PLAIN, given, whole(model, *given), offload_tools, dims={"batch": 2, "sequence": 9})


def test_what_the_plan_computes_in_tiles_stays_inside(offload_tools) -> None:
    model = vgg()
    captured = capture(model, (torch.zeros(2, 3, 32, 32),), dims={"input": {0: "batch"}}, name="vgg")
    node = next(node for node in captured.graph.nodes if linear_weight(node) == "7.weight")
    tiles = (Tile(node.name, 3),)
    placement = choose_layers(captured.graph, ["all-but-first-last"], tiles=tiles)
    assert placement["7"].reason == "the plan computes it in tiles"
    assert placement.split == ("4", "11", "14")
    plan = plan_parts(captured.graph, parts=1, objective="memory", dims={"batch": 2})
    plan = replace(plan, tiles=tiles, offload=to_plan(PLAIN, placement))
    x = torch.randn(2, 3, 32, 32)
    got = offload_tools.answer(captured, plan, PLAIN, InProcessAccelerator(), [x])[0]
    assert relative_difference(got, whole(model, x)) < 1e-4
    with pytest.raises(SettingError, match=r"has to stay inside.*7.*computes it in tiles"):
        choose_layers(captured.graph, ["7"], tiles=tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_of_convolution(offload_tools, dtype: torch.dtype) -> None:
    model = offload_tools.many().to(dtype)
    captured = capture(model, (torch.zeros(2, 3, 12, 12, dtype=dtype),), dims={"x": {0: "batch"}}, name="net")
    x = torch.randn(3, 3, 12, 12, dtype=dtype)
    agree(captured, PLAIN, [x], whole(model, x), offload_tools)


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_a_worker_with_an_accelerator(sealed, accelerator, mode: str) -> None:
    other, split = accelerator(), sealed.plan.offload.split
    answered = []
    with sealed.load(accelerator=other.address, mode=mode, weight_memory_bytes=1 << 20, dims={"batch": 4}) as model:
        assert model.offload.accelerator == f"accelerator {other.address}"
        assert model.offload.layers == split
        assert (model.offload.noise, model.offload.integrity) == (False, "freivalds")
        for batch in (1, 4, 4):
            x = torch.randn(batch, 3, 12, 12)
            answered.append(model.run([to_wire(x, where="x")]))
            assert relative_difference(from_wire(answered[-1].outputs[0], like=x), sealed.whole(x)) < 1e-4
    # Weights once each, however often a streamed worker opened their part; one product a layer and run.
    names = [call.op.name for call, _ in other.seen.calls]
    count = len(split)
    assert {name: names.count(name) for name in set(names)} == {
        "HELLO": 1, "REGISTER": count, "WEIGHT": count, "FORWARD": 3 * count,
    }  # fmt: skip
    # The books say exactly what was seen outside.
    books = [each.outside for each in answered]
    weights = sum(sealed.captured.graph.weights[f"{name}.weight"].bytes for name in split)
    assert [each.layers for each in books] == [count] * 3
    assert books[1].sent_bytes == books[2].sent_bytes == 4 * (books[0].sent_bytes - weights)
    assert sum(each.sent_bytes for each in books) == sum(x.nbytes for _, tensors in other.seen.calls for x in tensors)
    assert all(each.received_bytes > 0 and min(each.seconds.values()) >= 0 for each in books)


def test_a_scheme_without_an_accelerator_runs_inside_bit_for_bit(sealed) -> None:
    x = torch.randn(2, 3, 12, 12)
    with sealed.load() as model:
        assert model.offload.accelerator is None
        assert torch.equal(model(x), sealed.whole(x))


def test_one_position_at_run_time_stays_inside(offload_tools) -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    from motte.trusted.outside import Outside

    model = Pointwise().eval()
    captured = capture(model, (torch.zeros(2, 5, 4),), dims={"x": {0: "batch", 1: "sequence"}}, name="net")
    plan = offload_tools.placed(captured, PLAIN, ["b"], parts=1, dims={"batch": 2, "sequence": 5})
    nodes = split_nodes(captured.graph, plan.offload, public_names(captured.graph, plan.offload))
    accelerator = InProcessAccelerator()
    outside = Outside(nodes, PLAIN, accelerator)
    program = TorchEngine().compile(captured.graph, runners=outside.runners)
    for sequence, products in ((1, 0), (3, 1)):
        outside.begin_run()
        x = torch.randn(2, sequence, 4)
        got = program.run([x], captured.weights, {"batch": 2, "sequence": sequence})[0]
        assert relative_difference(got, whole(model, x)) < 1e-5
        assert outside.end_run()["layers"] == products


def test_a_runner_for_a_node_that_is_not_there_is_refused(sealed) -> None:
    with pytest.raises(GraphError, match=r"no such node.*absent"):
        TorchEngine().compile(sealed.captured.graph, runners={"absent": lambda x: x})
