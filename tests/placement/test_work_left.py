"""The layers of a model with their shapes, placement ``all`` and lists, and the work that is left inside."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import motte.zoo.vision_ops  # noqa: F401  torchvision's own operators are replaced before it is imported
from motte.errors import SettingError, UnsupportedError
from motte.linear.operation import LinearOperation
from motte.offload.layers import Trace, trace
from motte.offload.placement import low_rank_gains, most_rank, place_all, place_listed, place_none, planned_rank
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Gaussian, Mechanism, Schedule
from motte.offload.work import work

# torch warns once a process of what an even kernel under padding="same" costs.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
PLAIN = Asymmetric(noise=None)
NOISY = Asymmetric(noise=Gaussian(residual=Mechanism(1.0, 1.0)))


def vision(name: str) -> nn.Module:
    from torchvision import models

    with torch.device("meta"):
        return models.get_model(name)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def vgg16() -> Trace:
    return trace(vision("vgg16"), (32, 3, 224, 224))


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(8, 8, 4, padding="same", groups=8),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(289, 16),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


# --- the published figure ---------------------------------------------------------------------------------------------
def test_vgg16_leaves_at_most_12_and_20_per_cent_inside(vgg16: Trace) -> None:
    scheme = Asymmetric(noise=None, rank=Schedule())
    placement = place_all(vgg16.layers, scheme)
    assert len(placement.split) == 12
    found = work(vgg16, None, scheme, placement)
    assert found.whole("forward") == 32 * 15_470_264_320
    assert found.share("forward", published=True) == pytest.approx(0.0939, abs=1e-4)
    assert found.share("forward", published=True) <= 0.12
    assert found.share("forward", published=False) <= 0.20
    assert found.share("training", published=True) <= 0.12
    assert found.share("training", published=False) <= 0.20
    assert found.bound("forward", published=False) == 1 / found.share("forward", published=False)
    assert [row.rank for row in found.rows if row.side == "split"] == [2, 4, 8, 16] + [32] * 8


def test_vgg16_by_hand(vgg16: Trace) -> None:
    """The published count, layer by layer: R x M x positions x 9, and all of what stays."""
    inside = {"features.0": 3 * 64 * 9 * 224 * 224, "fc": 25088 * 4096 + 4096 * 4096 + 4096 * 1000}
    shapes = [(2, 64, 224), (4, 128, 112), (8, 128, 112), (16, 256, 56), *[(32, 256, 56)] * 2]
    shapes += [(32, 512, 28)] * 3 + [(32, 512, 14)] * 3
    hand = sum(inside.values()) + sum(rank * made * size * size * 9 for rank, made, size in shapes)
    found = work(vgg16, None, PLAIN, place_all(vgg16.layers, PLAIN))
    assert found.inside("forward").product == 32 * hand
    assert found.traffic.forward_out == 4 * 32 * sum(row.shapes[0][1] * row.shapes[0][2] ** 2 for row in split(vgg16))


def split(seen: Trace) -> list:  # type: ignore[type-arg]
    return [seen[name] for name in place_all(seen.layers, PLAIN).split]


# --- layers ---------------------------------------------------------------------------------------------------------
def test_the_layers_of_a_model_and_why_each_stays() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    shapes = {layer.name: layer.shapes for layer in seen.layers}
    # "same" with an even kernel, and any mode but zeros, are padded inside before the operator.
    assert shapes == {
        "0": ((4, 3, 8, 8),),
        "2": ((4, 8, 10, 10),),
        "3": ((4, 8, 11, 11),),
        "5": ((4, 8, 8, 8),),
        "7": ((4, 6, 289),),
        "9": ((4, 96),),
    }
    placed = place_all(seen.layers, Asymmetric(noise=None, rank=Fixed(2)))
    assert {each.name: each.side for each in placed.layers} == {
        "0": "inside", "2": "split", "3": "inside", "5": "split", "7": "split", "9": "inside",
    }  # fmt: skip
    assert placed["0"].reason == "it meets the raw input"
    assert placed["3"].reason == "rank 2 gains nothing: 121 positions, 1 input channel a group"
    assert placed["9"].reason == "one vector per sample has nothing to decompose"


def test_the_trace_counts_every_multiply_add_and_changes_nothing() -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as flops:
        model(x)
    seen = trace(model, x)
    assert seen.elsewhere + sum(layer.multiply_adds for layer in seen.layers) == flops.get_total_flops() // 2
    assert seen.elsewhere == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_products_that_are_no_layer_stay_inside_and_count() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))

    seen = trace(Attention().eval(), (2, 5, 8))
    assert seen.elsewhere == 2 * 2 * 5 * 5 * 8
    found = work(seen, None, PLAIN, place_none(seen.layers))
    assert found.share("forward", published=True) == found.share("training", published=False) == 1.0


class Tricky(nn.Module):
    """Meets its raw input twice, runs a layer twice, skips one, and ends in one that is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1)
        self.beside = nn.Conv2d(3, 8, 1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 3)
        self.windows = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.beside(x.view_as(x))
        y = self.twice(self.twice(y))
        tokens = self.windows(y.flatten(2).mT.reshape(-1, 4, 8))
        return self.last(y + tokens.mean())


def test_order_of_running_decides_what_is_first_and_last() -> None:
    seen = trace(Tricky(), (2, 3, 8, 8))
    assert [layer.name for layer in seen.layers] == ["last", "beside", "first", "twice", "never", "windows"]
    assert {layer.name for layer in seen.layers if layer.meets_raw_input} == {"first", "beside"}
    assert {layer.name for layer in seen.layers if layer.runs_last} == {"last"}
    assert len(seen["twice"].shapes) == 2
    assert seen["never"].must_stay == "it does not run as a module of its own"
    placed = place_all(seen.layers, Asymmetric(noise=None, rank=Fixed(2)))
    assert placed.split == ("twice", "windows")
    assert placed["last"].reason.startswith("the last layer")
    noisy = place_all(seen.layers, replace(NOISY, rank=Fixed(2)))
    assert noisy["windows"].reason.startswith("its first axis is not the batch")


def test_unknown_modules_and_dtypes_stay_inside() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Own(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    assert place_all(trace(model, (2, 3, 9, 9)).layers, PLAIN)["1"].reason == "Own has no split form"
    half = trace(model.half(), torch.zeros(2, 3, 9, 9, dtype=torch.half))
    assert place_all(half.layers, PLAIN)["2"].reason == "its element type is not split"
    assert half["2"].element_bytes == 2


def test_a_model_that_branches_on_its_data_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match="shapes alone"):
        trace(Branch(), (2, 3))


# --- lists and schemes ----------------------------------------------------------------------------------------------
def test_a_list_is_taken_as_it_is_and_unknown_layers_are_refused() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    placed = place_listed(seen.layers, Asymmetric(noise=None, rank=Fixed(2)), ["0", "3", "5", "9"])
    assert placed.split == ("0", "5")
    assert placed["0"].reason == "listed, although it meets the raw input"
    assert placed["3"].reason.startswith("rank 2 gains nothing")
    assert placed["9"].reason.startswith("one vector")
    assert placed["2"].reason == "not listed"
    for names, trusted in ((["0", "4"], None), (["0"], ("nope",)), (["0"], ("0",))):
        with pytest.raises(SettingError):
            place_listed(seen.layers, replace(PLAIN, trusted_layers=trusted), names)


def test_trusted_and_offloaded_layers_of_the_scheme_are_kept_to() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    assert (
        place_all(seen.layers, replace(PLAIN, rank=Fixed(1), trusted_layers=("5",)))["5"].reason == "named as trusted"
    )
    assert place_all(seen.layers, replace(PLAIN, rank=Fixed(1), offloaded_layers=("5",))).split == ("5",)
    assert place_none(seen.layers).split == ()


def test_the_schedule_counts_split_layers_only() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    scheme = Asymmetric(noise=None, rank=Schedule(start=1, factor=3, cap=4))
    found = work(seen, None, scheme, place_all(seen.layers, scheme))
    assert {row.name: row.rank for row in found.rows if row.side == "split"} == {"2": 1, "5": 3, "7": 4}


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [(Fixed(3), [3, 3]), (Schedule(), [2, 4]), (Energy(0.9), [5, 5]), (Energy(0.9, 4), [4, 4]), (Entropy(2), [2, 2])],
)
def test_planned_ranks(rule: object, ranks: list[int]) -> None:
    assert [planned_rank(rule, position, 5) for position in (0, 1)] == ranks  # type: ignore[arg-type]


def test_what_a_low_rank_gains() -> None:
    conv = LinearOperation("conv", 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), groups=4)
    assert [low_rank_gains(conv, (1, 16, 8, 8), rank) for rank in (3, 4)] == [True, False]
    assert [low_rank_gains(conv, (1, 16, 1, 3), rank) for rank in (2, 3)] == [True, False]
    linear = LinearOperation("linear", 16, 4)
    assert [low_rank_gains(linear, (1, 5, 16), rank) for rank in (4, 5)] == [True, False]
    assert most_rank(conv, (9, 16, 2, 3)) == 6


# --- the table ------------------------------------------------------------------------------------------------------
def test_the_rows_add_up_and_traffic_is_what_crosses() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    scheme = Asymmetric(noise=None, rank=Fixed(2), residual_dtype="bfloat16")
    found = work(seen, None, scheme, place_all(seen.layers, scheme))
    row = next(row for row in found.rows if row.name == "5")
    assert (row.traffic.forward_out, row.traffic.forward_in) == (2 * 4 * 8 * 64, 4 * 4 * 6 * 289)
    assert row.traffic.backward_out == 4 * 4 * 6 * 289
    assert row.traffic.backward_in == 4 * (4 * 8 * 64 + 8 * 6 * 9)
    assert row.traffic.weight_out == 4 * 8 * 6 * 9
    assert row.forward.product == 4 * 2 * 6 * 9 * 64
    inside = found.inside("training")
    assert inside.total == sum(each.forward.total + each.backward.total for each in found.rows)
    assert inside.total == inside.product + inside.decomposition + inside.per_sample + inside.integrity
    assert all(part > 0 for part in (inside.product, inside.decomposition, inside.per_sample, inside.integrity))
    # The first layer has no gradient to its input.
    assert found.rows[0].whole_backward == found.rows[0].whole_forward
    assert found.rows[1].whole_backward == 2 * found.rows[1].whole_forward


def test_what_is_switched_off_costs_nothing() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    placement = place_all(seen.layers, PLAIN)
    off = work(seen, None, replace(PLAIN, integrity="off"), placement).inside("training")
    assert off.integrity == 0 < work(seen, None, PLAIN, placement).inside("training").integrity
    more = work(seen, None, replace(PLAIN, iterations=4), placement).inside("forward")
    assert more.decomposition > work(seen, None, PLAIN, placement).inside("forward").decomposition
    entropy = Asymmetric(noise=None, rank=Entropy(2))
    chosen = place_all(seen.layers, entropy)
    both = [work(seen, None, each, chosen) for each in (entropy, replace(entropy, rank=Fixed(2)))]
    assert both[0].inside("forward").decomposition > both[1].inside("forward").decomposition
    assert [row.rank_is_bound for row in both[0].rows] == [row.side == "split" for row in both[0].rows]


def test_frozen_weights_have_no_gradient_to_count() -> None:
    model = small()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    seen = trace(model, (4, 3, 8, 8))
    row = work(seen, None, PLAIN, place_all(seen.layers, PLAIN)).rows[1]
    assert row.whole_backward == row.whole_forward
    assert (row.backward.product, row.backward.per_sample) == (0, 0)
    assert row.traffic.backward_in == 4 * math.prod((4, 8, 10, 10))


def test_a_placement_of_another_model_is_refused() -> None:
    seen = trace(small(), (4, 3, 8, 8))
    with pytest.raises(SettingError, match="no such layer"):
        work(seen, None, PLAIN, place_none(seen.layers[1:]))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "mobilenet_v3_small"])
def test_other_architectures(name: str) -> None:
    seen = trace(vision(name), (2, 3, 224, 224))
    placement = place_all(seen.layers, PLAIN)
    found = work(seen, None, PLAIN, placement)
    assert found.elsewhere_forward == 0
    assert 0 < found.share("forward", published=True) < 1
    depthwise = [layer for layer in seen.layers if layer.operation and layer.operation.groups > 1]
    assert all(placement[layer.name].side == "inside" for layer in depthwise)
    assert bool(depthwise) == (name == "mobilenet_v3_small")
