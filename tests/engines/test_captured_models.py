"""Captured models against eager, bit for bit and stride for stride, at several batch sizes from one dynamic capture.

Two things make eager itself round differently, and are switched off here as docs/spec/graph.md says: a fused path
through attention in inference, and weights that require gradients in recurrent layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.capture.text import dumps, loads
from motte.engines.torch_engine import TorchEngine
from motte.zoo import vision_ops

BATCHES = (1, 5)


@pytest.fixture(autouse=True)
def without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def randomised(model: nn.Module) -> nn.Module:
    """Statistics of batch norm away from 0 and 1, so that using the wrong ones shows."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval().requires_grad_(not any(isinstance(module, nn.RNNBase) for module in model.modules()))


def check(model: nn.Module, shape: tuple[int, ...], interpret: Callable[..., Any] | None = None) -> None:
    model = randomised(model)
    first = next(iter(inspect.signature(model.forward).parameters))
    captured = capture(model, (torch.randn(1, *shape),), name="model", dims={first: {0: "batch"}})
    graph = loads(dumps(captured.graph))
    assert graph == captured.graph
    program = TorchEngine().compile(graph)
    for batch in BATCHES:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = model(x)
        (found,) = program.run([x], captured.weights, {"batch": batch})
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        if interpret is not None:
            (slow,) = interpret(graph, [x], captured.weights, {"batch": batch})
            assert torch.equal(slow, expected)


def small_models() -> dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]:
    image, tiny = (3, 32, 32), (3, 64, 64)

    def models() -> Any:
        return vision_ops.import_torchvision().models

    return {
        "resnet": lambda: (models().ResNet(models().resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), image),
        "basic resnet": lambda: (models().ResNet(models().resnet.BasicBlock, [1, 2, 1, 1], num_classes=10), image),
        "squeezenet": lambda: (models().squeezenet1_0(num_classes=10), tiny),
        "vit": lambda: (
            models().VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
            ),
            image,
        ),
        "swin": lambda: (
            models().SwinTransformer(
                patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4], num_classes=10
            ),
            tiny,
        ),
        "swin v2": lambda: (
            models().SwinTransformer(
                patch_size=[4, 4],
                embed_dim=16,
                depths=[2],
                num_heads=[2],
                window_size=[4, 4],
                num_classes=10,
                block=models().swin_transformer.SwinTransformerBlockV2,
                downsample_layer=models().swin_transformer.PatchMergingV2,
            ),
            image,
        ),
        "densenet": lambda: (
            models().DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10),
            image,
        ),
        "convnext": lambda: (
            models().ConvNeXt(
                [models().convnext.CNBlockConfig(8, 16, 1), models().convnext.CNBlockConfig(16, None, 1)],
                num_classes=10,
            ),
            image,
        ),
        "maxvit": lambda: (
            models().MaxVit(
                input_size=(64, 64),
                stem_channels=8,
                partition_size=4,
                block_channels=[8, 16],
                block_layers=[1, 1],
                head_dim=8,
                stochastic_depth_prob=0.0,
                num_classes=10,
            ),
            tiny,
        ),
    }


SMALL = small_models()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("maxvit", "swin v2"))) for name in SMALL]
)
def test_small_architectures(name: str, interpret: Callable[..., Any]) -> None:
    model, shape = SMALL[name]()
    check(model, shape, interpret)


ALL = {
    **dict.fromkeys(("alexnet", "vgg16", "vgg19"), 64),
    **dict.fromkeys(("resnet50", "resnet101", "mobilenet_v3_large", "mobilenet_v3_small"), 64),
    **dict.fromkeys(("vit_b_16", "swin_t"), 224),
    **dict.fromkeys(("efficientnet_b0", "densenet121", "convnext_tiny", "regnet_y_400mf", "mnasnet0_5"), 64),
    **dict.fromkeys(("shufflenet_v2_x0_5", "googlenet", "resnext50_32x4d"), 64),
    "inception_v3": 96,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_published_architectures(name: str) -> None:
    models = vision_ops.import_torchvision().models
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    check(models.get_model(name, weights=None, **options), (3, ALL[name], ALL[name]))


# --- layers beyond images -------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)[0]
        return result


LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"), nn.BatchNorm1d(6), nn.PReLU()), (4, 9)),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.AvgPool3d(2)), (2, 6, 6, 6)),
    "transposed": lambda: (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.Mish(inplace=True)), (3, 7, 7)),
    "padding modes": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        ),
        (3, 7, 7),
    ),
    "norms": lambda: (
        nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LocalResponseNorm(2), nn.LayerNorm(5)),
        (4, 5, 5),
    ),
    "tracked instance norm": lambda: (nn.InstanceNorm2d(4, track_running_stats=True), (4, 5, 5)),
    "upsampling": lambda: (
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(size=(7, 7), mode="bicubic")),
        (2, 5, 5),
    ),
    "shuffles": lambda: (nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2)), (8, 4, 4)),
    "lstm": lambda: (Recurrent(nn.LSTM), (7, 6)),
    "gru": lambda: (Recurrent(nn.GRU), (7, 6)),
    "rnn": lambda: (Recurrent(nn.RNN), (7, 6)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), (6, 8)),
    "activations": lambda: (
        nn.Sequential(
            nn.Linear(6, 6),
            nn.ReLU6(inplace=True),
            nn.Hardswish(inplace=True),
            nn.Hardsigmoid(inplace=True),
            nn.SiLU(inplace=True),
            nn.ELU(inplace=True),
            nn.LeakyReLU(inplace=True),
            nn.GELU(),
            nn.Softplus(),
            nn.Hardtanh(inplace=True),
            nn.Sigmoid(),
            nn.Tanh(),
            nn.Softmax(1),
            nn.LogSoftmax(1),
            nn.GLU(1),
        ),
        (6,),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_layers(name: str, interpret: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, shape = LAYERS[name]()
    check(model, shape, interpret)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_element_types(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2)).eval().to(dtype)
    x = torch.randn(3, 6).to(dtype)
    captured = capture(model, (x,), name="typed", dims={"input": {0: "batch"}})
    with torch.inference_mode():
        expected = model(x)
    (found,) = TorchEngine().compile(captured.graph).run([x], captured.weights, {"batch": 3})
    assert torch.equal(found, expected)
