"""One run through the library: what it finds, what leaves, what is refused before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motte.errors import FormatError, LinkError, ResourceError, SettingError, UnsupportedError
from motte.link.recording import Recording
from motte.measure.record_file import read
from motte.offload.settings import Energy, Fixed, Gaussian, Mechanism, Schedule
from motte.seal.keys import RecipientPrivateKey
from motte.train.curves import MAX_POINTS, Curve, Point, curves_table, difference, points_of, sparkline
from motte.train.data import open_data
from motte.train.distributed import World, open_world, own_address
from motte.train.figures import append_records, document
from motte.train.loop import train
from motte.train.privacy import spent_privacy
from motte.train.result import Progress
from motte.train.run import with_input_noise
from motte.train.schemes import has_amx, resolved_dtype, resolved_threads
from motte.train.settings import TrainSettings
from motte.train.state import Tally

Make = Callable[..., TrainSettings]
FULL = Gaussian(residual=Mechanism(5.0, 0.5), gradient=Mechanism(0.1, 0.5), update=Mechanism(1.0, 0.5))


def test_asymmetric_without_noise_is_plain_training(make: Make) -> None:
    plain = train(make(scheme="trusted"))
    split = train(make(rank=Schedule()))
    assert [point.step for point in plain.curve] == [point.step for point in split.curve] == list(range(1, 7))
    assert difference(plain.curve, split.curve) < 1e-4
    assert split.bytes_out > 0 < split.bytes_in
    assert plain.bytes_out == plain.bytes_in == 0
    assert [(side.name, side.side) for side in split.layers] == [
        ("first", "inside"),
        ("second", "split"),
        ("third", "split"),
        ("last", "inside"),
    ]


def test_the_loop_is_the_slow_obvious_one(make: Make) -> None:
    settings = make(scheme="trusted", model=make().model.replace("smooth", "sure"))
    result = train(settings)
    from motte.train.models import build_model

    data = open_data("mnist", data_dir=settings.data_dir, seed=0, image_size=8)
    model = build_model(settings.model, classes=10, image_shape=data.shape, seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    losses = []
    for epoch in range(2):
        for batch in data.batches("train", batch_size=8, epoch=epoch):
            loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
    assert [point.loss for point in result.curve] == pytest.approx(losses, abs=1e-6)
    model.eval()
    (test,) = data.batches("test", batch_size=8)
    with torch.no_grad():
        logits = model(test.images)
    assert result.test_accuracy == float((logits.argmax(1) == test.labels).float().mean())
    assert result.test_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, test.labels)), abs=1e-5)


def test_nothing_of_the_test_split_leaves_unless_it_is_asked_for(make: Make) -> None:
    inside, split = Recording(), Recording()
    kept = train(make(rank=Fixed(2)), recorder=inside)
    train(make(rank=Fixed(2), evaluate="split"), recorder=split)
    # Two layers, six training steps; then also one forward pass of each layer for each of the two evaluations.
    forwards = [[frame for frame in each.sent() if frame.op.name == "FORWARD"] for each in (inside, split)]
    assert [len(each) for each in forwards] == [12, 16]
    assert kept.test_loss is not None


def test_what_was_spent_is_said_as_it_is(make: Make) -> None:
    assert train(make(scheme="trusted", epochs=1)).spent.epsilon is None
    for settings in (
        make(epochs=1),
        make(epochs=1, noise=Gaussian(residual=Mechanism(1.0, 5.0))),
        make(epochs=1, scheme="accelerator"),
    ):
        spent = train(settings).spent
        assert spent.epsilon == math.inf
        assert str(spent).startswith("infinite, because ")
        assert spent.to_json()["epsilon"] == "infinite"
    noisy = train(make(noise=FULL, rank=Fixed(2)))
    statement = noisy.spent.statement
    assert noisy.spent.epsilon is not None
    assert math.isfinite(noisy.spent.epsilon)
    assert statement is not None
    assert [(kind.releases, kind.per_record, kind.samples) for kind in statement.kinds] == [(12, 12, 8)] * 3
    # A rank that is found per batch couples the samples of a batch; the other delta is used.
    energy = train(make(noise=FULL, rank=Energy(0.5), delta=1e-3, epochs=1)).spent.statement
    assert energy is not None
    assert energy.delta == 1e-3
    assert any("meet" in sentence for sentence in energy.sentences)


def test_what_is_told_in_the_clear_beside_the_link_is_not_overlooked(make: Make) -> None:
    from dataclasses import replace

    from motte.train.opening import open_training_data
    from motte.train.schemes import placed

    settings = make(noise=FULL, rank=Fixed(2))
    with (
        open_training_data(settings) as data,
        placed(settings, _built(settings), torch.zeros(1, 1, 8, 8), world=World(), threads=1, noise_key=None) as place,
    ):
        assert place.session is not None
        place.session.step = 3
        assert math.isfinite(spent_privacy(settings, data, place, 8, World()).epsilon or math.inf)
        together = spent_privacy(settings, data, place, 8, World(0, 2))
        assert together.epsilon == math.inf
        assert "unencrypted" in together.because
        attested = spent_privacy(settings, data, place, 8, World(0, 2, attested=True))
        assert attested.epsilon == math.inf
        assert "several accelerators" in attested.because
        told = replace(settings, insecure_plaintext_log=True, log_dir=Path("x"))
        assert math.isfinite(spent_privacy(told, data, place, 8, World()).epsilon or math.inf)
        assert spent_privacy(told, replace(data, private=True), place, 8, World()).epsilon == math.inf


def _built(settings: TrainSettings) -> torch.nn.Module:
    from motte.train.models import build_model

    return build_model(settings.model, classes=10, image_shape=(1, 8, 8), seed=0)


def test_progress_says_where_the_run_is(make: Make) -> None:
    seen: list[Progress] = []
    train(make(scheme="trusted"), progress=seen.append)
    steps = [now.step for now in seen if now.phase == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    ends = [now for now in seen if now.phase == "epoch"]
    assert [now.finished.epoch for now in ends if now.finished is not None] == [0, 1]
    assert {now.epochs for now in seen} == {2}
    assert [(now.epoch, now.batch, now.batches) for now in seen if now.phase == "train"][3] == (2, 1, 3)


def test_what_the_process_had_is_put_back(make: Make) -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state()
    train(make(scheme="trusted", epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1


def test_a_limit_of_steps_ends_where_it_says(make: Make) -> None:
    found = train(make(scheme="trusted", max_steps=4))
    assert (found.steps, len(found.history)) == (4, 1)
    assert found.test_accuracy is not None
    exact = train(make(scheme="trusted", max_steps=3))
    assert (exact.steps, len(exact.history)) == (3, 1)


def test_a_batch_larger_than_the_data_is_one_batch(make: Make) -> None:
    assert train(make(scheme="trusted", batch_size=100, epochs=1)).steps == 1
    # 24 records in batches of 10: the last 4 are left out.
    assert train(make(scheme="trusted", batch_size=10, epochs=1)).steps == 2


def test_threads_that_read_ahead_change_nothing(make: Make) -> None:
    assert train(make(scheme="trusted", workers=2)).curve == train(make(scheme="trusted")).curve


def test_a_subset_is_chosen_by_the_seed(make: Make) -> None:
    from motte.train.opening import open_training_data

    with open_training_data(make(subset=5)) as small, open_training_data(make(subset=5)) as again:
        assert len(small.train) == len(small.test) == 5
        first, second = (data.train.read(np.arange(5), None) for data in (small, again))
        assert np.array_equal(first, second)
        whole = open_data("mnist", data_dir=make().data_dir, seed=0, image_size=8)
        every = whole.train.read(np.arange(24), None)
        places = [next(i for i in range(24) if np.array_equal(every[i], image)) for image in first]
        assert places == sorted(set(places))
        assert [int(whole.train.labels[place]) for place in places] == small.train.labels.tolist()
    with open_training_data(make(subset=5, seed=1)) as other:
        assert not np.array_equal(other.train.read(np.arange(5), None), first)


def test_bf16_is_autocast(make: Make) -> None:
    exact, rounded = train(make(scheme="trusted", epochs=1)), train(make(scheme="trusted", epochs=1, dtype="bf16"))
    assert rounded.dtype == "bf16"
    assert 0 < difference(exact.curve, rounded.curve) < 0.1
    split = train(make(rank=Fixed(2), epochs=1, dtype="bf16"))
    assert 0 < difference(exact.curve, split.curve) < 0.1


def test_amx_decides_for_trusted_only(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (("flags : fpu amx_bf16 amx_tile", True), ("flags : fpu avx512_bf16", False), ("", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        assert has_amx(tmp_path / "cpuinfo") is expected
    assert not has_amx(tmp_path / "nothing")
    monkeypatch.setattr("motte.train.schemes.has_amx", lambda: True)
    assert resolved_dtype(make(scheme="trusted")) == "bf16"
    assert resolved_dtype(make(scheme="trusted", dtype="fp32")) == resolved_dtype(make()) == "fp32"
    assert resolved_threads(make(threads=None), World(0, 1000)) == 1


def test_the_simulation_and_the_lack_of_protection_are_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    for scheme, said, unsaid in (
        ("trusted", "SIMULATED: no hardware protection", "NOT PROTECTED"),
        ("asymmetric", "SIMULATED: no hardware protection", "NOT PROTECTED"),
        ("accelerator", "NOT PROTECTED", "SIMULATED"),
    ):
        caplog.clear()
        train(make(scheme=scheme, epochs=1, max_steps=1))
        assert said in caplog.text
        assert unsaid not in caplog.text


def test_what_does_not_fit_the_memory_is_refused_before_the_start(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not fit") as caught:
        train(make(memory_bytes=10_000, checkpoint_dir=tmp_path / "c", insecure_plaintext_checkpoint=True))
    assert "activations" in str(caught.value)
    assert not (tmp_path / "c").exists()
    assert train(make(memory_bytes=1 << 30, epochs=1)).steps == 3
    # Outside, nothing of it is trusted memory.
    assert train(make(scheme="accelerator", memory_bytes=1, epochs=1)).steps == 3


def test_a_device_that_is_not_there(make: Make) -> None:
    for scheme in ("accelerator", "asymmetric"):
        with pytest.raises(UnsupportedError, match="no such device"):
            train(make(scheme=scheme, device="cuda:99"))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["accelerator", "asymmetric"])
@pytest.mark.usefixtures("real_accelerator")
def test_on_a_cuda_device_and_resumed(make: Make, tmp_path: Path, scheme: str) -> None:
    key = RecipientPrivateKey.new()
    plain = train(make(scheme="trusted"))
    change: dict[str, Any] = {"scheme": scheme, "device": "cuda:0", "checkpoint_key": key, "checkpoint_dir": tmp_path}
    half = train(make(**change, max_steps=4))
    found = train(make(**change, resume=True))
    assert (half.steps, found.steps) == (4, 6)
    # Dropout draws from the device's own generator under the scheme accelerator.
    assert difference(plain.curve, found.curve) < (1e-2 if scheme == "asymmetric" else 1.0)


# --- input noise, research modes ------------------------------------------------------------------------------------
def test_input_noise_belongs_to_the_sample_and_not_to_the_batch(make: Make) -> None:
    images, indices = torch.zeros(6, 3, 5, 5), torch.tensor([4, 9, 1, 7, 3, 2])
    noisy = with_input_noise(images, indices, 0.5, 3, 1)
    assert torch.equal(with_input_noise(images[2:4], indices[2:4], 0.5, 3, 1), noisy[2:4])
    for change in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert not torch.equal(with_input_noise(images, indices, 0.5, change["seed"], change["epoch"]), noisy)
    many = with_input_noise(torch.zeros(200, 1, 8, 8), torch.arange(200), 0.5, 0, 0)
    assert float(many.std()) == pytest.approx(0.5, rel=0.03)
    assert float(many.mean()) == pytest.approx(0.0, abs=0.02)
    assert train(make(scheme="trusted", input_noise=0.5)).curve != train(make(scheme="trusted")).curve


@pytest.mark.parametrize("scheme", ["lowrank", "residual"])
def test_research_modes_train_on_half_of_each_activation(make: Make, scheme: str) -> None:
    half, plain = train(make(scheme=scheme, rank=Fixed(1))), train(make(scheme="trusted"))
    assert half.bytes_out == 0
    assert half.curve != plain.curve
    assert [side.side for side in half.layers].count("split") == 2
    everything = train(make(scheme="lowrank", rank=Fixed(64)))
    assert difference(everything.curve, plain.curve) < 1e-4


# --- logs, records --------------------------------------------------------------------------------------------------
def test_scalars_ranks_and_the_timeline_are_logged(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make(rank=Energy(0.5), noise=FULL, log_dir=tmp_path, profile=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train_step")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("accuracy/test")] == [
        pytest.approx(epoch.test_accuracy) for epoch in result.history
    ]
    assert events.Scalars("privacy/epsilon")[-1].value == pytest.approx(result.spent.epsilon)
    assert events.Scalars("bytes/out")[-1].value == result.bytes_out
    assert {"rank/second", "rank/third"} <= set(events.Tags()["histograms"])
    lines = [json.loads(line) for line in (tmp_path / "profile.jsonl").read_text().splitlines()]
    assert {(line["step"], line["layer"]) for line in lines} == {
        (s, n) for s in range(1, 7) for n in ("second", "third")
    }
    works = {span[1] for line in lines for span in line["spans"]}
    assert {"decompose", "send", "wait", "check"} <= works
    assert all(line["link"]["sent_bytes"] > 0 for line in lines)


def test_results_become_records(make: Make, tmp_path: Path) -> None:
    settings = make(rank=Fixed(2), record=tmp_path / "records.jsonl")
    result = train(settings)
    for _ in range(2):
        append_records(tmp_path / "records.jsonl", settings, result)
    found = read(tmp_path / "records.jsonl")
    assert len(found) == 8
    accuracy, loss, seconds, out = found[:4]
    assert (accuracy.value, loss.value) == (result.test_accuracy, result.test_loss)
    assert (seconds.unit, seconds.statistic, len(seconds.samples)) == ("s", "median", 6)
    assert (out.value, out.unit) == (float(result.bytes_out), "B")
    assert accuracy.parameters["noise"] == "none"
    assert accuracy.parameters["rank"] == "fixed:2"
    assert str(accuracy.parameters["epsilon"]).startswith("infinite, because")
    assert accuracy.setting.enclave.simulated
    plain = make(scheme="accelerator", epochs=1)
    append_records(tmp_path / "plain.jsonl", plain, train(plain))
    assert read(tmp_path / "plain.jsonl")[0].setting.enclave.kind == "none"


def test_figures_on_private_data_are_not_told(make: Make, tmp_path: Path) -> None:
    from motte.seal.keys import SignerPrivateKey

    result = train(make(scheme="trusted", epochs=1))
    private: dict[str, Any] = {"data_key": RecipientPrivateKey.new(), "data_signer": SignerPrivateKey.new().public}
    hidden = document(make(scheme="trusted", **private), result)
    assert not {"test_accuracy", "test_loss", "train_loss", "history", "curve"} & set(hidden)
    assert "test_accuracy" in document(make(scheme="trusted", **private, insecure_plaintext_log=True), result)
    with pytest.raises(SettingError, match="in the clear"):
        train(make(scheme="trusted", **private, record=tmp_path / "r"))


# --- curves ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [0, 1, 5, 63, 64, 65, 1000, 4097])
def test_a_curve_stays_small_and_keeps_the_mean(count: int) -> None:
    curve = Curve()
    losses = [math.sin(step) for step in range(count)]
    for step, loss in enumerate(losses, start=1):
        curve.add(step, loss)
    points = curve.points
    assert len(points) <= MAX_POINTS
    assert [point.step for point in points] == sorted({point.step for point in points})
    if count:
        assert points[-1].step == count
        ends = [0, *(point.step for point in points)]
        for point, begin, end in zip(points, ends, ends[1:], strict=False):
            assert point.loss == pytest.approx(sum(losses[begin:end]) / (end - begin))


def test_curves_side_by_side() -> None:
    from rich.console import Console

    runs = {"plain": [Point(step, 2.0 / step) for step in range(1, 31)], "asymmetric": [Point(1, 2.0), Point(30, 0.1)]}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(curves_table(runs, rows=5))
    console.file.close()
    text = console.export_text()
    assert "plain" in text
    assert "asymmetric" in text
    assert "2.0000" in text
    assert "█" in text
    assert len([line for line in text.splitlines() if "0." in line or "2." in line]) == 5
    assert sparkline([0.0, 1.0, 2.0], low=0.0, high=2.0) == "▁▅█"
    assert sparkline([1.0], low=1.0, high=1.0) == "▁"
    assert difference(runs["plain"], runs["asymmetric"]) == pytest.approx(abs(2.0 / 30 - 0.1))
    assert math.isnan(difference(runs["plain"], []))


def test_the_curve_of_a_document(make: Make) -> None:
    settings = make(scheme="trusted", epochs=1)
    result = train(settings)
    assert points_of(json.loads(json.dumps(document(settings, result)))) == result.curve
    assert points_of({}) == ()
    for wrong in ({"curve": [{"step": 1}]}, {"curve": 3}, {"curve": [{"step": "x", "loss": 1}]}):
        with pytest.raises(FormatError):
            points_of(wrong)


def test_a_tally_of_nothing_is_no_zero() -> None:
    assert math.isnan(Tally().loss)
    assert math.isnan(Tally().accuracy)


# --- the world ------------------------------------------------------------------------------------------------------
def test_a_world_of_one_sends_nothing() -> None:
    with open_world(insecure_plaintext_collectives=False, environment={}) as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert world.total([1.0, 2.0]) == [1.0, 2.0]
        assert world.from_main(b"x") == b"x"
        model = torch.nn.Linear(1, 1)
        assert world.wrap(model) is model
    assert not torch.distributed.is_initialized()


def test_several_processes_are_refused_without_the_word() -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0"}
    with (
        pytest.raises(SettingError, match="unencrypted") as caught,
        open_world(insecure_plaintext_collectives=False, environment=environment),
    ):
        pass
    assert "--insecure-plaintext-collectives" in str(caught.value.hint)


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "-1"}]
)
def test_a_world_that_is_none_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(SettingError), open_world(insecure_plaintext_collectives=True, environment=environment):
        pass


def test_each_process_has_an_accelerator_of_its_own() -> None:
    assert own_address("unix:/a", World()) == "unix:/a"
    assert own_address("unix:/a-{rank}", World(3, 4)) == "unix:/a-3"
    with pytest.raises(SettingError, match="of its own"):
        own_address("unix:/a", World(0, 2))


def test_what_a_lost_peer_says_is_an_error_of_ours() -> None:
    with pytest.raises(LinkError, match="ended or stalled"), World(0, 2).faults():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8134")
    with pytest.raises(RuntimeError, match="shapes"), World(0, 2).faults():
        raise RuntimeError("shapes do not fit")
