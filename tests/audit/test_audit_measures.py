"""Measures, each compared with a closed form or with the slow obvious way."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from motte.audit.measures.exposure import exposure
from motte.audit.measures.figure import Figure
from motte.audit.measures.fisher import clean_release, fisher_figure, traces
from motte.audit.measures.mutual_information import MAX_DIMENSIONS, gaussian_information, mutual_information, projected
from motte.audit.measures.patch_entropy import SIZES, patch_entropy, profile_figures, write_csv, write_violin
from motte.audit.measures.spectrum import spectrum, spectrum_figures
from motte.errors import InputError, MeasureError
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

Array = NDArray[np.float64]


# --- mutual information ---------------------------------------------------------------------------------------------
def gaussians(correlations: list[float], count: int, seed: int) -> tuple[Array, Array]:
    """Pairs with these canonical correlations, one side rotated and scaled, which changes no information."""
    generator = np.random.default_rng(seed)
    rho, size = np.array(correlations), len(correlations)
    x = generator.standard_normal((count, size))
    y = rho * x + np.sqrt(1 - rho**2) * generator.standard_normal((count, size))
    turn, _ = np.linalg.qr(generator.standard_normal((size, size)))
    return x @ turn * 7.0 + 3.0, y


@pytest.mark.parametrize("correlations", [[0.9], [0.9, 0.7]], ids=["1", "2"])
def test_mutual_information_of_gaussians_is_within_5_percent_of_the_closed_form(correlations: list[float]) -> None:
    known = gaussian_information(np.array(correlations))
    found = [mutual_information(*gaussians(correlations, 2000, seed), seed=0) for seed in (0, 2)]
    assert np.mean(found) == pytest.approx(known, rel=0.05)


def test_where_there_is_none_there_is_next_to_none_and_many_dimensions_fall_short_and_do_not_exceed() -> None:
    assert mutual_information(*gaussians([0.0] * 5, 600, 0), seed=0) < 0.1
    for correlations in ([0.9, 0.8, 0.5], [0.999, 0.99, 0.9, 0.5, 0.2]):
        found = mutual_information(*gaussians(correlations, 600, 0), seed=0)
        known = gaussian_information(np.array(correlations))
        assert 0.3 * known < found < known, "a lower bound"


def test_without_the_correction_strong_dependence_is_missed() -> None:
    # However strong: the plain estimator counts k neighbours at least on either side, and so is capped.
    count, k = 600, 5
    capped = (math.log(count) - 0.5 / count) - (math.log(k) - 0.5 / k) - 1 / k
    x, y = gaussians([0.999999], count, 0)
    found, known = mutual_information(x, y, seed=0, neighbours=k), gaussian_information(np.array([0.999999]))
    assert found > capped + 1.0
    assert found == pytest.approx(known, rel=0.05)


def test_projections() -> None:
    generator = np.random.default_rng(0)
    flat = generator.standard_normal((50, 2)) @ generator.standard_normal((2, 40))
    assert projected(flat, 5).shape == (50, 2), "directions without variance are left out"
    assert projected(np.ones((50, 3)), 2).shape == (50, 0)
    with pytest.raises(MeasureError, match="dimensions"):
        mutual_information(np.zeros((99, 6)), np.zeros((99, MAX_DIMENSIONS - 5)), seed=0)
    with pytest.raises(MeasureError, match="too few"):
        mutual_information(np.zeros((9, 1)), np.zeros((9, 1)), seed=0)
    with pytest.raises(MeasureError, match="no variance"):
        mutual_information(np.zeros((99, 1)), generator.standard_normal((99, 1)), seed=0)


# --- energy and spectrum --------------------------------------------------------------------------------------------
def test_exposed_energy() -> None:
    whole = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    u, s, v = torch.linalg.svd(whole.flatten(2), full_matrices=False)
    s[:, :2] = 0
    left = (u * s[:, None]) @ v
    found = exposure(left.reshape(whole.shape), whole, layer="a")
    share = float((s**2).sum() / (whole**2).sum())
    assert (found.energy, found.aligned) == pytest.approx((share, share))
    scaled = exposure(0.1 * whole, whole, layer="a")
    assert (scaled.energy, scaled.aligned) == pytest.approx((0.01, 1.0)), "a scale hides nothing"
    assert exposure(torch.randn(4, 6, 5, 5) * 9, whole, layer="a").aligned < 0.1
    assert exposure(torch.zeros_like(whole), whole, layer="a").aligned == 0.0
    with pytest.raises(MeasureError, match="not of these inputs"):
        exposure(whole[:2], whole, layer="a")


def test_spectrum_of_known_singular_values() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    u, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))
    sample = ((u * values) @ v.T).reshape(1, 4, 3, 3)
    found = spectrum(torch.cat((sample, torch.zeros(1, 4, 3, 3, dtype=torch.float64))), layer="a")
    assert found.entropy[0] == pytest.approx(-math.log2((16 + 4 + 1 + 1) / 64))
    assert found.entropy[1] == 0.0
    assert found.ranks == (2, 0), "16 + 4 of 22 is the first share above 90 %"
    equal = spectrum(torch.eye(4, dtype=torch.float64).reshape(1, 4, 2, 2), layer="a")
    assert equal.entropy[0] == pytest.approx(2.0), "four equal channels: 2 bits, rank 4"
    tokens = spectrum(sample.flatten(2).transpose(1, 2), layer="a", tokens=True)
    assert tokens.entropy[0] == pytest.approx(found.entropy[0])
    figures = spectrum_figures({"a": sample, "vector": torch.ones(1, 4)}, ("a", "vector", "absent"))
    assert [each.layer for each in figures] == ["a", "a"]


def test_a_figure_has_a_value_or_a_reason() -> None:
    for wrong in ({}, {"value": 1.0, "missing": "why"}, {"value": float("nan")}):
        with pytest.raises(MeasureError):
            Figure(**{"name": "a", "audited": None, "layer": None, "unit": "1", "value": None, **wrong})  # type: ignore[arg-type]


# --- patch entropy --------------------------------------------------------------------------------------------------
def slow(image: NDArray[np.uint8], size: int) -> float:
    found = []
    for top in range(image.shape[0] - size + 1):
        for left in range(image.shape[1] - size + 1):
            counts = Counter(image[top : top + size, left : left + size].ravel().tolist()).values()
            found.append(-sum(each / size**2 * math.log2(each / size**2) for each in counts))
    return sum(found) / len(found)


def test_patch_entropy_against_counting(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(6, size=(3, 2, 11, 12)).astype(np.uint8)
    images[1] = 7
    found = patch_entropy(images)
    assert list(found.by_size) == list(SIZES)
    for size in (3, 8, 11):
        wanted = [np.mean([slow(channel, size) for channel in image]) for image in images]
        assert found.by_size[size] == pytest.approx(wanted)
    assert found.by_size[5][1] == 0.0, "a flat image has none"
    assert list(patch_entropy(images[:, :, :4]).by_size) == [3, 4]
    with pytest.raises(InputError):
        patch_entropy(images[:, :, :2])
    assert len(profile_figures(found)) == len(SIZES)
    write_csv(found, tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "size,image,entropy_bits"
    assert len(lines) == 1 + 3 * len(SIZES)
    assert lines[2] == "3,1,0.000000"
    with pytest.raises(InputError):
        write_csv(found, tmp_path / "a.csv")
    write_violin(found, tmp_path / "a.png", title="patches")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- Fisher information ---------------------------------------------------------------------------------------------
def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 2)).eval()


def test_fisher_information_of_a_linear_release_is_its_jacobian() -> None:
    model, pixels = linear_net(), torch.rand(3, 1, 6, 6)
    # Nothing inside, and a clip that is never reached: the release is the first convolution, linear in the pixels.
    noise = Gaussian(residual=Mechanism(1e6, 1e-6))
    scheme = Asymmetric(noise=noise, rank=Fixed(0))
    jacobian = torch.autograd.functional.jacobian(model[0], pixels[:1]).reshape(48, 36)
    exact = float((jacobian**2).sum()) / 0.25
    generator = torch.Generator().manual_seed(0)
    found = traces(model, scheme, ("1",), pixels, mean=(0.5,), std=(0.5,), generator=generator, probes=64)
    assert found.numpy() == pytest.approx([exact] * 3, rel=0.15)
    figure = fisher_figure(
        model, scheme, ("1",), pixels, audited="a", mean=(0.5,), std=(0.5,), generator=torch.Generator().manual_seed(0)
    )
    error = 36 / exact
    assert figure.value == pytest.approx(-10 * math.log10(error), abs=1.5)


def test_a_clip_and_a_principal_part_leave_less() -> None:
    model, images = linear_net(), torch.randn(2, 1, 6, 6)
    noise = Gaussian(residual=Mechanism(0.5, 1.0))
    clipped = clean_release(model, Asymmetric(noise=noise, rank=Fixed(0)), ("1",), images)["1"]
    assert clipped.norm(dim=1).tolist() == pytest.approx([0.5, 0.5])
    plain = clean_release(model, Asymmetric(noise=None, rank=Fixed(0)), ("1",), images)["1"]
    assert torch.allclose(plain, model[0](images).flatten(1))
    found = []
    for clip in (0.5, 1e6):
        scheme = Asymmetric(noise=Gaussian(residual=Mechanism(clip, 1.0)), rank=Fixed(0))
        generator = torch.Generator().manual_seed(0)
        found.append(traces(model, scheme, ("1",), images, mean=(0.0,), std=(1.0,), generator=generator))
    assert bool((found[0] < found[1]).all()), "what a clip scales down changes less with the input"
    principal = clean_release(model, Asymmetric(noise=None, rank=Fixed(2)), ("1",), images)["1"]
    assert bool((principal.norm(dim=1) < 0.7 * plain.norm(dim=1)).all())
    nothing = fisher_figure(
        model, Asymmetric(noise=None), ("1",), images, audited="a", mean=(0.0,), std=(1.0,), generator=torch.Generator()
    )
    assert nothing.value is None
    assert "infinite" in str(nothing.missing)
