"""From measured times and a budget to a placement: planted times, no clock."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import SettingError
from motte.offload.decide import Budget, LayerTimes, Measured, Phase, place_auto
from motte.offload.placement import Placed, Placement
from motte.offload.trial import settle


def times(inside: float, split: float, *, bytes_out: int = 1, energy: float = 0.1) -> Measured:
    return Measured(LayerTimes(Phase(inside, low_rank=split, transfer=0.0, accelerator=0.0)), bytes_out, energy)


def base(*split: str, inside: tuple[str, ...] = ()) -> Placement:
    return Placement(
        (*(Placed(name, "inside", "kept") for name in inside), *(Placed(name, "split", "all") for name in split))
    )


def test_the_longer_of_the_two_that_overlap_counts() -> None:
    both = {"decomposition": 1.0, "noise": 2.0, "check": 4.0, "merge": 8.0}
    assert Phase(0.0, low_rank=100.0, transfer=30.0, accelerator=40.0, **both).split == 115.0
    assert Phase(0.0, low_rank=50.0, transfer=30.0, accelerator=40.0, **both).split == 85.0
    assert Phase(0.0, low_rank=50.0, transfer=30.0, accelerator=40.0, **both).at_best == 65.0
    training = LayerTimes(Phase(5.0, 1.0, 0.0, 0.0), Phase(7.0, 0.0, 2.0, 1.0))
    assert (training.inside, training.split) == (12.0, 4.0)


def test_only_what_is_faster_is_split() -> None:
    found = place_auto(base("a", "b", inside=("x",)), {"a": times(35, 36), "b": times(52, 12)}, Budget("layers", 9))
    assert found.split == ("b",)
    assert found["a"].reason.startswith("not faster: 3.5e+04 ms inside")
    assert found["b"].reason.startswith("faster: ")
    assert found["x"] == Placed("x", "inside", "kept")


def test_as_slow_stays_inside() -> None:
    assert place_auto(base("a"), {"a": times(2, 2)}, Budget("layers", 1)).split == ()


@pytest.mark.parametrize(
    ("budget", "split"),
    [
        ("layers=0", ()),
        ("layers=1", ("a",)),
        ("layers=2", ("a", "c")),
        # Saved per byte: a 0.9, b 2, c 1.
        ("bytes=1", ("b",)),
        ("bytes=3", ("b",)),
        ("bytes=6", ("b", "c")),
        # a alone would save more; a greedy choice does not see that.
        ("bytes=10", ("b", "c")),
        ("bytes=16", ("a", "b", "c")),
        ("bytes=0.5KiB", ("a", "b", "c")),
        # Shares 0.05, 0.9 and 0.1 of three layers: their mean is what is bounded.
        ("energy=0", ()),
        ("energy=0.05", ("a", "c")),
        ("energy=0.35", ("a", "b", "c")),
        ("energy=1", ("a", "b", "c")),
    ],
)
def test_the_best_time_saved_per_exposure_goes_first(budget: str, split: tuple[str, ...]) -> None:
    measured = {
        "a": times(20, 11, bytes_out=10, energy=0.05),
        "b": times(4, 2, bytes_out=1, energy=0.9),
        "c": times(15, 10, bytes_out=5, energy=0.1),
    }
    assert place_auto(base("a", "b", "c"), measured, Budget.parse(budget)).split == split


def test_what_exposes_nothing_goes_first() -> None:
    measured = {"a": times(100, 1, energy=0.5), "b": times(2, 1, energy=0.0)}
    assert place_auto(base("a", "b"), measured, Budget("energy", 0.0)).split == ("b",)


measured_layers = st.lists(
    st.builds(
        times,
        st.floats(1e-6, 10),
        st.floats(1e-6, 10),
        bytes_out=st.integers(0, 1 << 30),
        energy=st.floats(0, 1),
    ),
    max_size=8,
)


@given(measured_layers, st.sampled_from(["layers", "bytes", "energy"]), st.floats(0, 1))
def test_the_budget_is_kept_and_every_layer_has_a_reason(layers: list[Measured], kind: str, share: float) -> None:
    amount = {"layers": round(share * 9), "bytes": round(share * (1 << 32)), "energy": share}[kind]
    budget = Budget(kind, amount)  # type: ignore[arg-type]
    measured = {f"l{index}": each for index, each in enumerate(layers)}
    found = place_auto(base(*measured), measured, budget)
    exposure = sum(measured[name].exposure(budget.kind) for name in found.split)
    assert exposure <= amount * (len(layers) if kind == "energy" else 1) * (1 + 1e-9)
    for each in found.layers:
        faster = measured[each.name].times.split < measured[each.name].times.inside
        word = "faster" if each.side == "split" else "beyond" if faster else "not faster"
        assert each.reason.startswith(word)
        assert faster or each.side == "inside"


def test_a_layer_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(SettingError, match="not measured"):
        place_auto(base("a", "b"), {"a": times(2, 1)}, Budget("layers", 1))


@pytest.mark.parametrize(
    "text", ["layers", "layers=", "layers=-1", "layers=1.5", "layers=1KiB", "bytes=1MB", "energy=1.1", "time=3", "x=1"]
)
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(SettingError):
        Budget.parse(text)


def test_budgets() -> None:
    assert Budget.parse("bytes=1.5MiB") == Budget("bytes", 1.5 * (1 << 20))
    assert str(Budget.parse("energy=0.25")) == "energy=0.25"
    assert Budget.parse(str(Budget.parse("bytes=64MiB"))) == Budget("bytes", 64 << 20)


def test_ranks_are_measured_again_until_nothing_drops() -> None:
    """Under a schedule a layer's rank follows from the split layers before it, and so does its time."""
    asked: list[dict[str, int]] = []

    def measure(positions: Mapping[str, int]) -> Mapping[str, Measured]:
        asked.append(dict(positions))
        # a never gains; b does only at position 0, c always, d only behind the first place.
        split = {"a": 9.0, "b": 1.0 + 9 * positions.get("b", 0), "c": 1.0, "d": 1.0 if positions.get("d", 0) else 9.0}
        return {name: times(5.0, split[name]) for name in positions}

    placement, found, rounds = settle(base("a", "b", "c", "d"), measure, Budget("layers", 4))
    # b was not faster behind a, and does not come back once a is gone: so it ends.
    assert asked == [{"a": 0, "b": 1, "c": 2, "d": 3}, {"c": 0, "d": 1}]
    assert (placement.split, rounds) == (("c", "d"), 2)
    assert found["b"][1] == 1
    assert (found["c"][1], found["d"][1]) == (0, 1)
    assert placement["a"].reason.startswith("not faster")
