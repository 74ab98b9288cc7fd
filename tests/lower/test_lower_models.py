"""Whole architectures, lowered in parts and compared with the torch engine on every installed engine.

Random weights, small pictures, and of each architecture as many blocks as it has kinds: what is tested is the
translation of each operation, and the cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.lower.check import TOLERANCE, check_lowered
from motte.plan.planner import plan_parts
from motte.zoo.vision_ops import import_torchvision

PARTS = 4


def models() -> Any:
    return import_torchvision().models


def alexnet() -> nn.Module:
    built: nn.Module = models().alexnet(num_classes=10)
    return built


def vgg11() -> nn.Module:
    widths: list[int | str] = [8, "M", 16, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"]
    built: nn.Module = models().vgg.VGG(models().vgg.make_layers(widths), num_classes=10)
    built.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return built


def resnet() -> nn.Module:
    built: nn.Module = models().resnet.ResNet(models().resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return built


def mobilenet_v3() -> nn.Module:
    block = models().mobilenetv3.InvertedResidualConfig
    settings = [
        block(16, 3, 16, 16, True, "RE", 2, 1, 1.0), block(16, 5, 24, 24, True, "HS", 2, 1, 1.0),
        block(24, 5, 48, 24, True, "HS", 1, 1, 1.0),
    ]  # fmt: skip
    built: nn.Module = models().mobilenetv3.MobileNetV3(settings, last_channel=64, num_classes=10)
    return built


def squeezenet() -> nn.Module:
    whole = models().squeezenet1_0(num_classes=10)
    fire = models().squeezenet.Fire
    return nn.Sequential(
        whole.features[:5], nn.MaxPool2d(3, 2, ceil_mode=True), fire(128, 16, 64, 448), whole.classifier
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", [alexnet, vgg11, resnet, mobilenet_v3, squeezenet])
def test_architectures(build: Callable[[], nn.Module], lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            assert each.running_mean is not None
            assert each.running_var is not None
            each.running_mean.normal_(0, 0.1)
            each.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    captured = capture(model, (x,), name="model", dims={"input" if build is squeezenet else "x": {0: "batch"}})
    plan = plan_parts(captured.graph, parts=PARTS, objective="weights", dims={"batch": 1})
    lowered = lowered_and_valid(captured.graph, plan)
    assert len(lowered.parts) == PARTS
    # Names and attributes, no constants to speak of: 0.2 KB an operation, 4 KB for pooling to sizes that do not divide.
    assert len(lowered.joined.core) < 4000 + 200 * len(captured.graph.nodes)
    assert lowered.joined.dims == ()
    lines: list[str] = []
    checks = check_lowered(lowered, captured.graph, plan, captured.weights, [x], engines=engines, progress=lines.append)
    assert [(check.engine, check.inputs) for check in checks] == [
        (engine, kind) for engine in engines for kind in ("example", "random")
    ]
    assert all(0 < check.difference < TOLERANCE / 10 for check in checks)
    # Another batch than the example's, the least one included.
    assert {line.rpartition(" ")[2] for line in lines} == {"1", "2", "3"}


@pytest.mark.slow
def test_a_small_encoder_with_dynamic_batch_and_sequence(lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=24,
    )  # fmt: skip
    encoder = transformers.BertModel(config, add_pooling_layer=False)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    axes = {0: "batch", 1: "sequence"}
    captured = capture(
        Hidden().eval(), (ids, mask), name="encoder", dims={"input_ids": axes, "attention_mask": axes},
        dim_ranges={"sequence": (2, 24)},
    )  # fmt: skip
    plan = plan_parts(captured.graph, parts=5, objective="weights", dims={"batch": 2, "sequence": 7})
    lowered = lowered_and_valid(captured.graph, plan)
    lines: list[str] = []
    checks = check_lowered(
        lowered, captured.graph, plan, captured.weights, [ids, mask], engines=engines, progress=lines.append
    )
    assert all(check.difference < TOLERANCE / 10 for check in checks)
    assert {line.partition(", ")[2] for line in lines} == {
        "batch 2, sequence 7", "batch 1, sequence 2", "batch 3, sequence 8",
    }  # fmt: skip
