"""What an accelerator sees of a run, frame by frame: public weights and residuals, and nothing of anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motte.engines.torch_engine import TorchEngine
from motte.linear.nodes import LinearNode, weighted_products
from motte.link.calls import Op
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

INPUT = torch.frombuffer(bytearray((b"CANARY-INPUT-PHOTO-" * 400)[: 2 * 3 * 12 * 12 * 4]), dtype=torch.float32)


def canary_input() -> Tensor:
    # As bytes a text, as numbers small enough for honest arithmetic.
    return INPUT.reshape(2, 3, 12, 12).clone()


def needles(tensor: Tensor) -> Iterator[bytes]:
    """Runs of 16 bytes from all over ``tensor`` that do not occur by chance."""
    data = tensor.detach().contiguous().numpy().tobytes()
    for start in range(0, len(data) - 15, max(16, len(data) // 64 // 4 * 4)):
        piece = data[start : start + 16]
        if len(set(piece)) > 4:
            yield piece


def private_tensors(sealed, x: Tensor) -> Mapping[str, Tensor]:
    """Every value of a run in clear, and every stored tensor that is not public, by name."""
    graph = sealed.captured.graph
    names = [value.name for node in graph.nodes for value in node.outputs if value is not None]
    labels = tuple(f"v{index}" for index in range(len(names)))
    program = TorchEngine().compile(replace(graph, outputs=tuple(names), output_names=labels))
    values = dict(zip(names, program.run([x.clone()], sealed.captured.weights, {"batch": 2}), strict=True))
    public = {f"{name}.weight" for name in sealed.plan.offload.split}
    stored = {name: weight for name, weight in sealed.captured.weights.items() if name not in public}
    return {**values, **stored, "the input": x}


def activations(sealed, x: Tensor) -> dict[str, Tensor]:
    """What each split layer is given, by layer."""
    found = private_tensors(sealed, x)
    products = [product for _, product in weighted_products(sealed.captured.graph)]
    return {
        product.weight.removesuffix(".weight"): found[product.input]
        for product in products
        if isinstance(product, LinearNode) and product.weight.removesuffix(".weight") in sealed.plan.offload.split
    }


def leaked(private: Mapping[str, Tensor], stream: bytes) -> list[str]:
    """Names of the tensors of which a piece is in ``stream``."""
    return [name for name, tensor in private.items() if any(needle in stream for needle in needles(tensor))]


@pytest.fixture(scope="module")
def watched(sealed, offload_tools, tmp_path_factory):
    """One run of the canary input: what was seen outside, and the answer."""
    folder = tmp_path_factory.mktemp("watched")
    with offload_tools.listening(folder) as other, sealed.load(accelerator=other.address) as model:
        return other.seen, model(canary_input())


def test_nothing_but_public_weights_and_residuals_leaves(sealed, watched) -> None:
    seen, answer = watched
    stream = seen.everything()
    assert {call.op for call, _ in seen.calls} == {Op.HELLO, Op.REGISTER, Op.WEIGHT, Op.FORWARD}
    private = {**private_tensors(sealed, canary_input()), "the answer": answer}
    assert leaked(private, stream) == []
    assert [text for text in (b"CANARY", b"planted", b"stem", b"head", b"aten.") if text in stream] == []
    # What is said in words is a greeting, and the geometry of the layers.
    geometry = {"family", "in_channels", "out_channels", "groups", "kernel", "stride", "padding", "dilation"}
    for call, _ in seen.calls:
        words = set(json.loads(call.extra)) if call.extra else set()
        assert words <= geometry | {"output_padding", "protocol", "shared_memory"}


def test_the_search_finds_what_does_leave(sealed, watched) -> None:
    seen, _ = watched
    split = sealed.plan.offload.split
    public = {name: sealed.captured.weights[f"{name}.weight"] for name in split}
    assert leaked(public, seen.everything()) == list(split)
    for name, (_, (sent,)) in zip(split, seen.of(Op.WEIGHT), strict=True):
        assert torch.equal(sent, public[name])
    for name, tensor in private_tensors(sealed, canary_input()).items():
        if list(needles(tensor)):
            assert leaked({name: tensor}, b"..." + tensor.contiguous().numpy().tobytes()) == [name]


def test_what_left_and_what_stayed_is_the_activation_and_what_left_alone_is_not(sealed, watched) -> None:
    seen, _ = watched
    given = activations(sealed, canary_input())
    assert list(given) == list(sealed.plan.offload.split)
    for (_, (left,)), (name, whole) in zip(seen.of(Op.FORWARD), given.items(), strict=True):
        if name == "uneven":
            # Padded inside, one row below and one column more to the right than to the left.
            whole = torch.nn.functional.pad(whole, (1, 2, 0, 1))
        assert left.shape == whole.shape
        # What stayed has the rank that the scheme says, and holds most of the energy.
        assert torch.linalg.matrix_rank((whole - left).flatten(2), rtol=1e-4).max() <= 2, name
        assert float((left**2).sum()) < 0.9 * float((whole**2).sum()), name


def test_with_noise_the_same_request_leaves_with_the_same_noise_and_is_no_residual(
    offload_tools, accelerator, tmp_path
) -> None:
    noise = Gaussian(residual=Mechanism(clip=1.0, noise_multiplier=0.5))
    other, x = accelerator(), canary_input()
    sealed = offload_tools.seal_many(tmp_path, Asymmetric(noise=noise, rank=Fixed(2)), ["strided", "up", "dilated"])
    with sealed.load(accelerator=other.address) as model:
        assert model.offload.noise
        first, again = model(x), model(x)
        model(torch.randn(2, 3, 12, 12))
    assert torch.equal(first, again)
    left = [tensors[0] for _, tensors in other.seen.of(Op.FORWARD)]
    assert [torch.equal(a, b) for a, b in zip(left[:3], left[3:6], strict=True)] == [True] * 3
    assert not torch.equal(left[0], left[6])
    # Sigma of every value that left is at least that of the noise.
    assert all(float(each.std()) > 0.4 for each in left)
