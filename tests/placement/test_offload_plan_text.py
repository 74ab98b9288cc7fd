"""The offload section of a plan: one text for each, strict, and the way to and from the settings loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FormatError, PlanError, SettingError
from motte.offload.placement import Placed, Placement, from_plan, frozen_scheme, plain_reason, to_plan
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Gaussian, Mechanism, Schedule
from motte.plan.offload import (
    MAX_REASON_BYTES,
    OffloadPlan,
    PlannedGpuReference,
    PlannedLayer,
    PlannedMechanism,
    PlannedNoise,
    PlannedRank,
    nothing_leaves,
)
from motte.plan.plan import Plan
from motte.plan.text import dumps, loads

BEFORE = f"motte-plan 1\ngraph {'0123456789abcdef' * 4}\nobjective memory\ncut 1 after features.12\n"
SECTION = """offload asymmetric
rank schedule 2 2 32
iterations 1
decomposition als
residual-dtype same
noise gaussian replace
mechanism residual 1.0 0.5
mechanism update 0.25 2.0
integrity freivalds 2
layer features.0 inside it meets the raw input
layer features.2 split placement all
"""
EXAMPLE = OffloadPlan(
    rank=PlannedRank("schedule", (2, 2, 32)),
    iterations=1,
    decomposition="als",
    residual_dtype="same",
    noise=PlannedNoise("replace", (PlannedMechanism("residual", 1.0, 0.5), PlannedMechanism("update", 0.25, 2.0))),
    integrity="freivalds",
    integrity_vectors=2,
    layers=(
        PlannedLayer("features.0", "inside", "it meets the raw input"),
        PlannedLayer("features.2", "split", "placement all"),
    ),
)

ONE, TWO = "0a" * 48, "0b" * 64
ON_GPU = f"""offload trusted
gpu-reference 550.90.07 96.00.9F.00.01
gpu-measurement 0 {ONE}
gpu-measurement 35 {ONE},{TWO}
gpu-reference 570.1 97.00
gpu-measurement 1 {TWO}
layer a inside not chosen
layer b confidential-gpu named for the confidential GPU
"""
MEASURED = (
    PlannedGpuReference("550.90.07", "96.00.9F.00.01", ((0, (ONE,)), (35, (ONE, TWO)))),
    PlannedGpuReference("570.1", "97.00", ((1, (TWO,)),)),
)
LAYERS = (
    PlannedLayer("a", "inside", "not chosen"),
    PlannedLayer("b", "confidential-gpu", "named for the confidential GPU"),
)

mechanisms = st.builds(Mechanism, st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
noises = st.none() | st.builds(
    Gaussian,
    residual=mechanisms,
    gradient=st.none() | mechanisms,
    update=st.none() | mechanisms,
    adjacency=st.sampled_from(["replace", "add-remove"]),
)
ranks = st.one_of(
    st.builds(Fixed, st.integers(0, 65_536)),
    st.builds(Schedule, st.integers(1, 65_536), st.integers(1, 64), st.integers(1, 65_536)),
    st.builds(Energy, st.floats(1e-9, 1.0), st.integers(1, 65_536)),
    st.builds(Entropy, st.integers(1, 65_536)),
)
schemes = st.builds(
    Asymmetric,
    noise=noises,
    rank=ranks,
    iterations=st.integers(1, 16),
    decomposition=st.sampled_from(["als", "range-finder"]),
    residual_dtype=st.sampled_from(["same", "float32", "bfloat16"]),
    integrity=st.sampled_from(["freivalds", "off"]),
    integrity_vectors=st.integers(1, 8),
)
names = st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() and " " not in text)
reasons = st.text(max_size=250).map(plain_reason)
placements = st.lists(
    st.builds(Placed, names, st.sampled_from(["inside", "split"]), reasons),
    max_size=5,
    unique_by=lambda each: each.name,
).map(lambda layers: Placement(tuple(layers)))


@given(schemes, placements)
def test_settings_and_placement_come_back_from_the_text(scheme: Asymmetric, placement: Placement) -> None:
    section = to_plan(scheme, placement)
    text = dumps(replace(loads(BEFORE), offload=section))
    assert loads(text).offload == section
    assert from_plan(section) == (frozen_scheme(scheme, placement), placement)


def test_the_text_is_the_one_in_the_specification() -> None:
    plan = replace(loads(BEFORE), offload=EXAMPLE)
    assert dumps(plan) == BEFORE + SECTION
    assert loads(BEFORE + SECTION) == plan
    assert EXAMPLE.split == ("features.2",)
    assert EXAMPLE.inside == ("features.0",)


def test_a_section_under_which_nothing_leaves_holds_no_setting_but_the_good_measurements_of_a_gpu() -> None:
    plan = replace(loads(BEFORE), offload=nothing_leaves(LAYERS, MEASURED))
    assert dumps(plan) == BEFORE + ON_GPU
    assert loads(BEFORE + ON_GPU) == plan
    placement = Placement(tuple(Placed(each.name, each.side, each.reason) for each in LAYERS))
    assert to_plan(None, placement, gpu_references=MEASURED) == plan.offload
    with_scheme = replace(EXAMPLE, layers=(*EXAMPLE.layers, LAYERS[1]), gpu_references=MEASURED)
    assert loads(dumps(replace(plan, offload=with_scheme))).offload == with_scheme
    with pytest.raises(PlanError):
        dumps(replace(plan, offload=replace(nothing_leaves(LAYERS), integrity="freivalds")))
    with pytest.raises(SettingError, match="without a scheme"):
        to_plan(None, Placement((Placed("a", "split", "x"),)))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("offload trusted", "offload trusted\nrank fixed 1", 6),
        ("gpu-reference 550.90.07 96", "gpu-reference 550.90.07  96", 6),
        ("550.90.07 96.00.9F.00.01", "550.90.07", 6),
        (f"gpu-measurement 0 {ONE}\ngpu-measurement 35 {ONE},{TWO}\n", "", 7),
        (f"0 {ONE}", f"00 {ONE}", 7),
        (f"0 {ONE}", f"0 {ONE[:-2]}", 7),
        (f"0 {ONE}", f"0 {ONE.upper()}", 7),
        (f"0 {ONE}", "0 ", 7),
        ("35 ", "0 ", 8),
        ("35 ", "255 ", 8),
        (f"{ONE},{TWO}", f"{TWO},{ONE}", 8),
        (f"{ONE},{TWO}", f"{ONE},{ONE}", 8),
        (f"gpu-measurement 1 {TWO}\n", "", 10),
        ("layer a", "integrity off 1\nlayer a", 11),
        ("gpu-reference 570.1", f"gpu-reference 1 1\ngpu-measurement 1 {ONE}\n" * 15 + "gpu-reference 570.1", 39),
    ],
)
def test_other_measurements_are_refused_with_their_line(old: str, new: str, line: int) -> None:
    assert old in ON_GPU
    with pytest.raises(FormatError) as refused:
        loads(BEFORE + ON_GPU.replace(old, new, 1))
    assert refused.value.where == f"plan line {line}"


def test_a_plan_without_the_section_is_read_as_before() -> None:
    assert loads(BEFORE).offload is None
    assert dumps(loads(BEFORE)) == BEFORE


@given(st.lists(st.sampled_from([*SECTION.splitlines(keepends=True), "noise none\n", "rank fixed 3\n"]), max_size=14))
def test_whatever_is_read_is_written_the_same(lines: list[str]) -> None:
    try:
        plan = loads(BEFORE + "".join(lines))
    except FormatError:
        return
    assert dumps(plan) == BEFORE + "".join(lines)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("offload asymmetric", "offload lowrank", 5),
        ("offload asymmetric", "offload asymmetric 2", 5),
        ("rank schedule 2 2 32", "rank schedule 2 2", 6),
        ("rank schedule 2 2 32", "rank schedule 2 65 32", 6),
        ("rank schedule 2 2 32", "rank schedule 0 2 32", 6),
        ("rank schedule 2 2 32", "rank schedule 02 2 32", 6),
        ("rank schedule 2 2 32", "rank schedule", 6),
        ("rank schedule 2 2 32", "rank guess 2", 6),
        ("rank schedule 2 2 32", "rank energy 1.5 3", 6),
        ("rank schedule 2 2 32", "rank energy .5 3", 6),
        ("rank schedule 2 2 32", "rank energy nan 3", 6),
        ("rank schedule 2 2 32", "rank fixed -1", 6),
        ("iterations 1", "iterations 17", 7),
        ("iterations 1\n", "", 7),
        ("decomposition als", "decomposition svd", 8),
        ("residual-dtype same", "residual-dtype float16", 9),
        ("noise gaussian replace", "noise laplace replace", 10),
        ("noise gaussian replace", "noise gaussian both", 10),
        ("noise gaussian replace", "noise none", 11),
        ("noise gaussian replace", "noise none replace", 10),
        ("mechanism residual 1.0 0.5\n", "", 11),
        ("mechanism residual 1.0 0.5", "mechanism residual 1 0.5", 11),
        ("mechanism residual 1.0 0.5", "mechanism residual 0.0 0.5", 11),
        ("mechanism residual 1.0 0.5", "mechanism residual inf 0.5", 11),
        ("mechanism update 0.25 2.0", "mechanism updates 0.25 2.0", 12),
        ("mechanism update 0.25 2.0", "mechanism update 0.25 2.0\nmechanism gradient 1.0 1.0", 13),
        ("integrity freivalds 2", "integrity none 2", 13),
        ("integrity freivalds 2", "integrity freivalds 9", 13),
        ("integrity freivalds 2", "integrity freivalds 2\nseed 4", 14),
        ("features.0 inside", "features.0 outside", 14),
        ("inside it meets the raw input", "inside", 14),
        ("inside it meets", "inside  it meets", 14),
        ("raw input\n", "raw input \n", 14),
        ("raw input\n", "raw \u00e9\n", 14),
        ("raw input\n", "raw " + "x" * MAX_REASON_BYTES + "\n", 14),
        ("features.2", "features.0", 15),
        ("placement all\n", "placement all\nnote x\n", 16),
    ],
)
def test_everything_else_is_refused_with_its_line(old: str, new: str, line: int) -> None:
    assert old in SECTION
    with pytest.raises(FormatError) as refused:
        loads(BEFORE + SECTION.replace(old, new, 1))
    assert refused.value.where == f"plan line {line}"


@pytest.mark.parametrize(
    "section",
    [
        replace(EXAMPLE, layers=(PlannedLayer("a b", "inside", "why"),)),
        replace(EXAMPLE, layers=(PlannedLayer("a", "inside", ""),)),
        replace(EXAMPLE, layers=(PlannedLayer("a", "inside", "x"), PlannedLayer("a", "inside", "x"))),
        replace(EXAMPLE, rank=PlannedRank("fixed", (2.0,))),
        replace(EXAMPLE, noise=PlannedNoise("replace", ())),
        replace(EXAMPLE, scheme="masked"),
        replace(EXAMPLE, iterations=True),
    ],
)
def test_what_its_text_cannot_say_is_not_written(section: OffloadPlan) -> None:
    plan: Plan = replace(loads(BEFORE), offload=section)
    with pytest.raises(PlanError):
        dumps(plan)


def test_a_scheme_that_lists_other_layers_is_refused() -> None:
    placement = Placement((Placed("a", "inside", "x"), Placed("b", "split", "x")))
    with pytest.raises(SettingError, match="other layers"):
        to_plan(Asymmetric(noise=None, offloaded_layers=("a", "b")), placement)
    with pytest.raises(SettingError, match="trusted layer"):
        to_plan(Asymmetric(noise=None, trusted_layers=("b",)), placement)
    with pytest.raises(SettingError, match="placed twice"):
        Placement((Placed("a", "inside", "x"), Placed("a", "split", "x")))


@pytest.mark.parametrize(
    "section",
    [
        replace(EXAMPLE, rank=PlannedRank("fixed", (2, 3))),
        replace(EXAMPLE, rank=PlannedRank("fixed", (2.5,))),
        replace(EXAMPLE, noise=PlannedNoise("replace", (PlannedMechanism("update", 1.0, 1.0),))),
        replace(EXAMPLE, integrity_vectors=9),
    ],
)
def test_a_section_made_by_hand_is_checked_by_the_settings(section: OffloadPlan) -> None:
    with pytest.raises(SettingError):
        from_plan(section)
