"""The calculator on a CUDA device gives the CPU's products, without TensorFloat-32, also with many requests at once."""

from __future__ import annotations

import pytest
import torch

from motte.accelerator.process import LocalAccelerator
from motte.linear import compute
from motte.linear.operation import LinearOperation

pytestmark = pytest.mark.gpu
CONV = LinearOperation("conv", 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))


@pytest.mark.parametrize("shared_memory_bytes", [0, 1 << 28])
def test_many_requests_under_way_give_the_products_of_the_cpu(shared_memory_bytes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(CONV.weight_shape, generator=generator) for _ in range(4)]
    inputs = [torch.randn(8, 16, 32, 32, generator=generator) for _ in range(4)]
    gradient = torch.randn(8, 32, 32, 32, generator=generator)
    with LocalAccelerator("cuda:0", shared_memory_bytes=shared_memory_bytes) as child:
        link = child.link
        held = []
        pending = []
        for index in range(4):
            link.register(f"layer{index}", CONV)
            link.put_weight(f"layer{index}", weights[index])
            pending.append(link.forward(f"layer{index}", inputs[index], step=1, hold=True))
            held.append(link.last_held())
        back = [
            link.backward(f"layer{index}", held[index], gradient, step=1, need_input=True, need_weight=True)
            for index in range(4)
        ]
        for index in range(4):
            x, weight = inputs[index].double(), weights[index].double()
            # Sums of 144 and 8192 products: TensorFloat-32 would miss these bounds by an order of magnitude.
            expected = compute.forward(CONV, x, weight).float()
            torch.testing.assert_close(pending[index].result(), expected, atol=2e-4, rtol=1e-5)
            got = back[index].result()
            expected = compute.input_gradient(CONV, x.shape, weight, gradient.double()).float()
            torch.testing.assert_close(got.input, expected, atol=2e-4, rtol=1e-5)
            expected = compute.weight_gradient(CONV, x, gradient.double()).float()
            torch.testing.assert_close(got.weight, expected, atol=5e-3, rtol=1e-5)
        assert all(traffic.compute_s > 0 for traffic in link.stats().values())
