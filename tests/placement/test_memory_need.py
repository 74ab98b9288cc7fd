"""Memory computed from shapes, against what torch really allocates and keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import ResourceError
from motte.offload.memory import MemoryNeed, inference_memory, refuse_above, training_memory
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed

SHAPE, BATCH = (3, 16, 16), 6


class Block(nn.Module):
    """Two convolutions of one input, one of them in a shortcut; norms, an in-place activation, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.two = nn.Conv2d(8, 16, 1, stride=2)
        self.three = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        self.tied = nn.Linear(16, 5)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.stem(x)))
        y = self.one(y) + self.two(y)
        y = nn.functional.max_pool2d(self.three(y), 2).mean((2, 3))
        return self.head(y) + self.tied(y)


def kept_by_autograd(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages saved for the backward pass, parameters and the input left out."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(found.values())


def test_a_plain_training_step_is_exact() -> None:
    torch.manual_seed(0)
    model = Block().train()
    x = torch.randn(BATCH, *SHAPE)
    need = training_memory(model, None, SHAPE, BATCH, optimizer_states=1)
    assert need.activations == kept_by_autograd(model, x) + x.nbytes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    assert need.parameters == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert need.gradients == sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    assert need.optimizer == sum(state["momentum_buffer"].nbytes for state in optimizer.state.values())
    assert (need.weight_copies, need.principal, need.residuals) == (0, 0, 0)
    assert training_memory(model, None, SHAPE, BATCH, optimizer_states=2).optimizer == 2 * need.optimizer


def test_what_split_layers_keep_is_exact() -> None:
    torch.manual_seed(0)
    model = Block().train()
    scheme = Asymmetric(noise=None, rank=Fixed(3))
    need = training_memory(model, scheme, SHAPE, BATCH)
    protected = protect(
        model, replace(scheme, offloaded_layers=("one", "two", "three")), accelerator=InProcessAccelerator()
    ).train()
    x = torch.randn(BATCH, *SHAPE)
    kept = kept_by_autograd(protected, x)
    # rank 3 of 8 and of 16 channels: rows and columns of the factors, and the residual of each layer.
    factors = 3 * (8 + 256) + 3 * (8 + 256) + 3 * (16 + 64)
    assert need.principal == 4 * BATCH * factors
    assert need.residuals == 4 * BATCH * (8 * 256 + 8 * 256 + 16 * 64)
    assert need.weight_copies == 4 * (16 * 8 * 9 + 16 * 8 + 16 * 16 * 9)
    assert need.activations - x.nbytes + need.principal + need.residuals == kept


def test_half_the_residual_and_the_batch_scale() -> None:
    model = Block()
    whole = training_memory(model, Asymmetric(noise=None, rank=Fixed(3)), SHAPE, BATCH)
    half = training_memory(model, Asymmetric(noise=None, rank=Fixed(3), residual_dtype="bfloat16"), SHAPE, BATCH)
    assert 2 * half.residuals == whole.residuals
    double = training_memory(model, Asymmetric(noise=None, rank=Fixed(3)), SHAPE, 2 * BATCH)
    assert double.residuals == 2 * whole.residuals
    assert double.parameters == whole.parameters
    lower = training_memory(model, Asymmetric(noise=None, rank=Fixed(1)), SHAPE, BATCH)
    assert 3 * lower.principal == whole.principal


def test_the_mode_of_the_model_stays() -> None:
    model = Block().eval()
    model.norm.train()
    training_memory(model, None, SHAPE, BATCH)
    inference_memory(model, None, SHAPE, BATCH)
    assert not model.training
    assert model.norm.training
    assert int(model.norm.num_batches_tracked or 0) == 0


def test_an_answer_holds_what_is_alive_at_a_time() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    need = inference_memory(model, None, (3, 10, 10), 4)
    # The input, the first output and its activation: the input lives as long as the caller holds it.
    assert need.activations == 4 * 4 * 100 * (3 + 8 + 8)
    assert (need.gradients, need.optimizer, need.workspace) == (0, 0, 0)
    inplace = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3, padding=1))
    assert inference_memory(inplace, None, (3, 10, 10), 4).activations == 4 * 4 * 100 * (3 + 8 + 2)


def test_what_does_not_fit_is_refused_with_its_parts_and_a_way_out() -> None:
    need = training_memory(Block(), Asymmetric(noise=None, rank=Fixed(3)), SHAPE, 64)
    refuse_above(need, need.total)
    with pytest.raises(ResourceError) as refused:
        refuse_above(need, need.total - 1)
    assert "activations" in str(refused.value.got)
    assert "retained residuals" in str(refused.value.got)
    for way in ("smaller batch", "checkpoint", "lower rank", "bfloat16"):
        assert way in str(refused.value.hint)


def test_the_hint_names_only_what_helps() -> None:
    need = MemoryNeed(900, 0, 0, 0, 100, 0, 0, 0)
    with pytest.raises(ResourceError) as refused:
        refuse_above(need, 10)
    assert refused.value.hint == "a smaller batch or a smaller model"
    assert refused.value.expected == "at most 10 bytes"
    assert need.breakdown() == "parameters and buffers 900 bytes, activations 100 bytes"
