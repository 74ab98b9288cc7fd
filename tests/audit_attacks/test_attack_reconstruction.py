"""Reconstruction works where it must (a whole activation), and gives nothing where nothing was seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks import gan_prior, image_metrics
from motte.audit.attacks.decoder import LinearDecoder, PairedDecoder, as_map, train_decoder
from motte.audit.attacks.gan_prior import LATENT, WithGanPrior, invert_latent, train_generator
from motte.audit.attacks.image_metrics import Lpips
from motte.audit.attacks.optimisation import ByOptimisation, Forward, total_variation
from motte.audit.attacks.reconstruction import architecture_of, input_of, parameters_before, put_weights, spread_over
from motte.audit.interface import (
    Attack,
    Budget,
    Context,
    Outcome,
    Position,
    PublicData,
    Scored,
    Subject,
    Truth,
    bracketed,
)
from motte.audit.views import VictimAccess, pipeline_of
from motte.errors import FormatError, InputError, MotteError, SettingError
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

LAYER = "2"
BUDGET = Budget(steps=12, samples=12, public_samples=160, seconds=120.0)
MEAN, STD = (0.5,), (0.5,)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def victim() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 12, 3, stride=2), nn.Flatten(), nn.Linear(108, 10)).eval()


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[start : start + count], dtype=torch.float32).unsqueeze(1) / 16
    return (images - 0.5) / 0.5, torch.tensor(data.target[start : start + count], dtype=torch.int64)


def at(position: Position, scheme: Asymmetric, model: nn.Module, private: tuple[Tensor, Tensor]) -> Subject:
    pipeline = pipeline_of(
        scheme,
        everything_leaves=False,
        position=position,
        model=model,
        audited="for a test",
        input_shape=(1, 8, 8),
        classes=10,
    )
    view = pipeline.observe(private[0])
    return Subject(view, PublicData(*digits(256, 200), MEAN, STD, pipeline), VictimAccess(pipeline, *private, 10))


def attacked(
    make: type[PairedDecoder] | type[ByOptimisation],
    scheme: Asymmetric,
    budget: Budget = BUDGET,
    kept: dict[tuple[str, str], Scored] | None = None,
) -> Outcome:
    model, private = victim(), digits(budget.samples)
    subjects = [at(position, scheme, model, private) for position in Position]
    truth = Truth(*private, MEAN, STD, model)

    def fresh() -> Attack:
        if issubclass(make, ByOptimisation):
            return make(LAYER, architecture_of(model, seed=1))
        return make(LAYER)

    known = {} if kept is None else kept

    def place(position: Position) -> tuple[dict[tuple[str, str], Scored], tuple[str, str]]:
        return known, (str(position), str(scheme) if position is Position.SCHEME else "")

    return bracketed(fresh, *subjects, truth, seed=0, budget=budget, known=place)


def test_a_paired_decoder_sees_a_whole_activation_and_not_what_noise_covers() -> None:
    noise = Gaussian(residual=Mechanism(clip=1.0, noise_multiplier=30.0))
    kept: dict[tuple[str, str], Scored] = {}
    plain, noisy = (
        {each.metric: each for each in attacked(PairedDecoder, scheme, BUDGET, kept).findings}
        for scheme in (Asymmetric(noise=None, rank=Fixed(1)), Asymmetric(noise=noise, rank=Fixed(1)))
    )
    assert plain["psnr"].ceiling.value > 25, "a full activation of the first layer is the image"
    assert plain["psnr"].above_floor, "a residual without noise shows the image"
    assert plain["matched"].ceiling.value > 0.9
    assert not noisy["psnr"].above_floor
    for finding in (plain["matched"], noisy["matched"]):
        assert finding.floor.low <= 1 / BUDGET.samples <= finding.floor.high, "nothing seen: guessing"
    assert noisy["matched"].scheme.low <= 1 / BUDGET.samples
    assert plain["psnr"].powerful
    assert plain["ssim"].position_percent is not None
    assert any("LPIPS is not available" in note for note in plain["psnr"].notes)


def test_the_same_seed_gives_the_same_finding_and_pictures_stand_beside_originals() -> None:
    budget = Budget(steps=2, samples=4, public_samples=64, seconds=120.0)
    first, second = (attacked(PairedDecoder, Asymmetric(noise=None), budget) for _ in range(2))
    assert [each.ceiling for each in first.findings] == [each.ceiling for each in second.findings]
    assert {each.position for each in first.pictures} == set(Position)
    titles = [title for title, _ in first.pictures[0].rows]
    assert titles == ["originals", "reconstructions"]
    shapes = {tuple(images.shape) for picture in first.pictures for _, images in picture.rows}
    assert shapes == {(4, 1, 8, 8)}


def test_optimisation_inverts_the_model_where_it_is_public_and_a_substitute_elsewhere() -> None:
    budget = Budget(steps=50, samples=6, public_samples=128, seconds=120.0)
    outcome = attacked(ByOptimisation, Asymmetric(noise=None, rank=Fixed(1)), budget)
    (psnr,) = [each for each in outcome.findings if each.metric == "psnr"]
    assert psnr.ceiling.value > 25
    assert psnr.above_floor, "a substitute for what runs inside can be learnt"
    assert psnr.scheme.value < psnr.ceiling.value


def test_the_model_is_taken_as_known_only_where_it_gives_what_was_seen() -> None:
    model, private = victim(), digits(4)
    for position, exact in ((Position.SCHEME, False), (Position.CEILING, True)):
        subject = at(position, Asymmetric(noise=None, rank=Fixed(1)), model, private)
        attack = ByOptimisation(LAYER, architecture_of(model, seed=1))
        attack.fit(subject.public, Context(0, Budget(steps=2, public_samples=16)))
        assert attack.forward is not None
        assert attack.forward.exact is exact


def test_a_generator_finds_the_image_that_it_can_make() -> None:
    pixels = digits(96)[0] * 0.5 + 0.5
    context = Context(3, Budget(steps=30, public_samples=96, seconds=60.0))
    maker = train_generator(pixels, context)
    z = torch.randn(3, LATENT, generator=torch.Generator().manual_seed(9))
    wanted = maker(z)
    assert wanted.shape == (3, 1, 8, 8)
    images, misfit = invert_latent(maker, Forward(lambda x: x, 0.0, exact=True), wanted, context, what="test")
    spread = (wanted - pixels.mean(0)).square().sum() / wanted.square().sum()
    assert misfit.mean() < 0.5 * spread
    assert image_metrics.psnr(images, wanted).mean() > image_metrics.psnr(pixels[:3], wanted).mean()


def test_a_generative_prior_is_an_attack_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan_prior, "RESTARTS", 2)
    outcome = attacked(WithGanPrior, Asymmetric(noise=None), Budget(steps=4, samples=3, public_samples=64))
    (psnr,) = [each for each in outcome.findings if each.metric == "psnr"]
    assert psnr.floor.value < 25
    assert psnr.ceiling.value != psnr.floor.value


def test_nothing_of_the_victim_is_left_in_an_architecture() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model.extra = nn.Parameter(torch.full((3,), 7.0))
    for buffer in model.buffers():
        buffer.fill_(5)
    blank = architecture_of(model, seed=0)
    for name, value in model.state_dict().items():
        if value.numel() > 1 and name != "1.bias" and name != "1.weight":
            assert not torch.equal(blank.state_dict()[name], value), name
    assert put_weights(blank, {"0.weight": model[0].weight, "1.weight": torch.zeros(9), "x": torch.zeros(1)}) == {
        "0.weight"
    }
    assert torch.equal(blank.get_parameter("0.weight"), model[0].weight)


def test_what_a_layer_is_given_and_what_runs_before_it() -> None:
    model, (images, _) = victim(), digits(2)
    assert torch.equal(input_of(model, LAYER, images), torch.relu(model[0](images)))
    assert parameters_before(model, LAYER, images) == {"0.weight", "0.bias"}
    with pytest.raises(SettingError, match="no layer"):
        input_of(model, "9.9", images)
    assert spread_over(("a", "b", "c", "d", "e"), 3) == ("a", "c", "e")
    assert spread_over(("a", "b"), 3) == ("a", "b")


def test_an_attack_that_was_not_fitted_does_not_attack() -> None:
    subject = at(Position.CEILING, Asymmetric(noise=None), victim(), digits(2))
    with pytest.raises(SettingError, match="fitted"):
        PairedDecoder(LAYER).attack(subject.view, Context(0, BUDGET))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((2, 7), (2, 7, 1, 1)),
        ((2, 16, 6), (2, 6, 4, 4)),
        ((2, 17, 6), (2, 6, 4, 4)),
        ((2, 6, 3), (2, 3, 1, 6)),
        ((2, 3, 4, 5, 6), (2, 12, 5, 6)),
    ],
)
def test_tensors_of_any_layer_become_maps(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert as_map(torch.randn(shape)).shape == wanted


def test_the_closed_form_finds_a_linear_way_back_at_another_resolution() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8)
    mix = torch.randn(6, 4)
    seen = torch.einsum("ck,nkhw->nchw", mix, nn.functional.pixel_unshuffle(images, 2))
    found = LinearDecoder(seen, images)(seen)
    assert image_metrics.psnr(found, images).mean() > 40
    decoder = train_decoder(seen, images, Context(0, Budget(steps=1)), purpose="test")
    assert decoder(seen).shape == images.shape
    assert decoder(seen).min() >= 0


# --- how alike images are -------------------------------------------------------------------------------------------
def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, window by window, for one channel."""
    at_ = np.arange(11) - 5
    line = np.exp(-(at_**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            both = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 2, 14, 17, generator=generator)
    return (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1), one


def test_ssim_is_the_definition() -> None:
    noisy, clean = pair()
    slow = [
        np.mean([slow_ssim(noisy[n, c].double().numpy(), clean[n, c].double().numpy()) for c in (0, 1)]) for n in (0, 1)
    ]
    assert image_metrics.ssim(noisy, clean).tolist() == pytest.approx(slow, abs=1e-9)
    assert image_metrics.ssim(clean, clean).tolist() == pytest.approx([1.0, 1.0])
    assert image_metrics.ssim(noisy[..., :8, :8], clean[..., :8, :8]).max() < 1, "smaller than the window"


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    noisy, clean = pair()
    known = metrics.structural_similarity(
        noisy[0, 0].double().numpy(),
        clean[0, 0].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(image_metrics.ssim(noisy[:1, :1], clean[:1, :1])[0]) == pytest.approx(known, abs=1e-9)


def test_psnr_is_its_formula_and_finite_for_equal_images() -> None:
    zeros = torch.zeros(2, 1, 4, 4)
    assert image_metrics.psnr(zeros + 0.1, zeros).tolist() == pytest.approx([20.0, 20.0], abs=1e-5)
    assert image_metrics.psnr(zeros, zeros).tolist() == [image_metrics.MAX_PSNR] * 2
    with pytest.raises(InputError):
        image_metrics.psnr(zeros, zeros[:1])


def test_an_image_without_contrast_is_matched_by_guessing() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 6, 6, generator=generator)
    assert image_metrics.matched(0.3 * images + 0.5, images).tolist() == [1.0] * 5
    assert image_metrics.matched(torch.full_like(images, 0.5), images).tolist() == pytest.approx([0.2] * 5)
    assert image_metrics.matched(images.roll(1, 0), images).sum() == 0


def test_lpips_needs_its_weights_and_nothing_stands_in_their_place(tmp_path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    names = ("features.0", "features.3", "features.6", "features.8", "features.10")
    shapes = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
    state = {}
    for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] ** 2)) ** 0.5
        state[f"{name}.bias"] = torch.zeros(shape[0])
        state[f"lin{number}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    path = tmp_path / "lpips.safetensors"
    save_file(state, path)
    measure = Lpips.open(path)
    clean = torch.rand(2, 1, 16, 16, generator=generator)
    near, far = ((clean + size * torch.rand(clean.shape, generator=generator)).clamp(0, 1) for size in (0.05, 0.8))
    assert measure(clean, clean).tolist() == [0.0, 0.0]
    assert (measure(near, clean) < measure(far, clean)).all()
    assert [each.name for each in PairedDecoder(LAYER, lpips=measure).metrics][-1] == "lpips"
    del state["lin4.model.1.weight"]
    save_file(state, path)
    with pytest.raises(FormatError, match="weights of LPIPS"):
        Lpips.open(path)
    path.write_bytes(b"no such file")
    with pytest.raises(FormatError):
        Lpips.open(path)


def test_total_variation_counts_what_differs_from_its_neighbour() -> None:
    image = torch.zeros(1, 1, 4, 4)
    assert total_variation(image).item() == 0
    image[0, 0, 1, 1] = 1
    assert total_variation(image).item() == pytest.approx(4 / 16)


def test_the_shipped_model_shows_a_garment_in_its_first_whole_activation() -> None:
    from motte.audit.scene import make_stage
    from motte.train.data import open_data
    from motte.zoo import shipped_models
    from motte.zoo.weights import WeightsChoice

    try:
        data = open_data("fashion-mnist", seed=0)
    except MotteError as problem:
        pytest.skip(f"no Fashion-MNIST here: {problem}")
    budget = Budget(steps=1, samples=4, public_samples=48, seconds=120.0)
    stage = make_stage(shipped_models.build(WeightsChoice()), data, suite="quick", budget=budget, seed=0)
    pipeline = pipeline_of(
        None,
        everything_leaves=True,
        position=Position.CEILING,
        model=stage.model,
        audited="accelerator",
        input_shape=stage.input_shape,
        classes=stage.classes,
    )
    layer, context, truth = "stage1.0.conv1", Context(0, budget), stage.truth("inference")
    attack = PairedDecoder(layer)
    attack.fit(PublicData(*stage.public(), stage.mean, stage.std, pipeline), context)
    view = pipeline.observe(truth.images, layers=(layer,), answers=False)
    scored = attack.score(attack.attack(view, context), truth, context)
    assert scored.brackets["psnr"].low > 25
