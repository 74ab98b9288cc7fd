"""A run that stops and goes on is the run that never stopped: to the bit, and with noise on to the released byte."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motte.errors import InputError, IntegrityError, MeasureError, RollbackError, SettingError
from motte.link.recording import RecordedFrame, Recording
from motte.offload.settings import Fixed, Gaussian, Mechanism
from motte.seal.keys import RecipientPrivateKey
from motte.train.loop import train
from motte.train.result import Progress
from motte.train.settings import TrainSettings

Make = Callable[..., TrainSettings]
NOISE = Gaussian(residual=Mechanism(5.0, 0.5), gradient=Mechanism(0.1, 0.5), update=Mechanism(1.0, 0.5))


def weights_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}


def crash_at(step: int) -> Callable[[Progress], None]:
    def tell(now: Progress) -> None:
        if now.phase == "train" and now.step == step:
            raise RuntimeError("the machine went down")

    return tell


@pytest.fixture
def key() -> RecipientPrivateKey:
    return RecipientPrivateKey.new()


@pytest.mark.parametrize(
    ("scheme", "first"),
    [("trusted", 3), ("trusted", 2), ("asymmetric", 3), ("asymmetric", 4), ("lowrank", 2), ("accelerator", 5)],
)
def test_six_steps_are_some_steps_a_resume_and_the_rest(
    make: Make, tmp_path: Path, key: RecipientPrivateKey, scheme: str, first: int
) -> None:
    change: dict[str, Any] = {"scheme": scheme, "checkpoint_key": key}
    if scheme in ("asymmetric", "lowrank"):
        change["rank"] = Fixed(2)
    straight = train(make(**change, checkpoint_dir=tmp_path / "a"))
    half = train(make(**change, checkpoint_dir=tmp_path / "b", max_steps=first))
    rest = train(make(**change, checkpoint_dir=tmp_path / "b", resume=True))
    assert (straight.steps, half.steps, rest.steps) == (6, first, 6)
    assert weights_of(rest.model) == weights_of(straight.model) != weights_of(half.model)
    assert rest.history == straight.history
    assert (rest.test_loss, rest.test_accuracy) == (straight.test_loss, straight.test_accuracy)


def test_without_the_momentum_and_the_generator_the_bits_would_differ(make: Make, tmp_path: Path) -> None:
    # The test above can fail: dropout and momentum matter in this net.
    usual = train(make(scheme="trusted"))
    assert weights_of(train(make(scheme="trusted", momentum=0.0)).model) != weights_of(usual.model)
    assert weights_of(train(make(scheme="trusted", seed=1)).model) != weights_of(usual.model)
    assert weights_of(train(make(scheme="trusted")).model) == weights_of(usual.model)


def released(recording: Recording, steps: range) -> list[tuple[str, int, bytes, tuple[bytes, ...]]]:
    def wanted(frame: RecordedFrame) -> bool:
        return bool(frame.tensors) and frame.step in steps and frame.op.name in ("FORWARD", "BACKWARD")

    return [
        (frame.layer, frame.step, frame.op.name.encode(), frame.tensors) for frame in recording.sent() if wanted(frame)
    ]


def test_with_noise_on_a_resumed_run_sends_the_bytes_that_were_released_already(
    make: Make, tmp_path: Path, key: RecipientPrivateKey, caplog: pytest.LogCaptureFixture
) -> None:
    change: dict[str, Any] = {"noise": NOISE, "rank": Fixed(2), "checkpoint_key": key, "checkpoint_dir": tmp_path / "c"}
    first, second = Recording(), Recording()
    with pytest.raises(RuntimeError, match="went down"):
        train(make(**change, checkpoint_every=2), progress=crash_at(5), recorder=first)
    # The checkpoint is of step 4: step 5 was released and is run again.
    again = train(make(**change, resume=True), recorder=second)
    assert again.steps == 6
    assert "may have been released before" in caplog.text
    with pytest.raises(SettingError) as caught:
        train(make(**change, resume=True, threads=2))
    assert caught.value.where == "threads"
    assert released(second, range(5, 6)) == released(first, range(5, 6)) != []
    # A retry is no new release: 2 layers, 6 steps.
    assert again.spent.statement is not None
    assert [kind.releases for kind in again.spent.statement.kinds] == [12, 12, 12]
    # Another run of the same settings has another key: the noise, and with it every byte, differs.
    other = Recording()
    train(make(**{**change, "checkpoint_dir": tmp_path / "d"}), recorder=other)
    assert released(other, range(1, 2)) != released(first, range(1, 2))


def test_a_signal_ends_the_step_keeps_a_checkpoint_and_changes_nothing(
    make: Make, tmp_path: Path, key: RecipientPrivateKey
) -> None:
    change: dict[str, Any] = {"scheme": "trusted", "checkpoint_key": key}
    straight = train(make(scheme="trusted"))
    for number, (phase, step) in enumerate((("train", 1), ("train", 3), ("test", 3), ("train", 6), ("test", 6))):
        folder = tmp_path / str(number)

        def interrupt(now: Progress, phase: str = phase, step: int = step) -> None:
            if (now.phase, now.step) == (phase, step):
                os.kill(os.getpid(), signal.SIGINT if step < 6 else signal.SIGTERM)

        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        stopped = train(make(**change, checkpoint_dir=folder), progress=interrupt)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        # The signal comes after the step was counted: at most one more step is made.
        assert stopped.stopped == ("SIGINT" if step < 6 else "SIGTERM")
        assert stopped.test_accuracy is None
        assert step <= stopped.steps <= step + 1
        rest = train(make(**change, checkpoint_dir=folder, resume=True))
        assert (rest.stopped, rest.steps) == (None, 6)
        assert weights_of(rest.model) == weights_of(straight.model)
        assert rest.history == straight.history


def test_a_second_signal_is_not_caught(make: Make) -> None:
    def twice(now: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make(scheme="trusted"), progress=twice)


def test_a_lying_accelerator_ends_the_run_and_the_last_checkpoint_stands(
    make: Make, tmp_path: Path, key: RecipientPrivateKey, liar: Any
) -> None:
    change: dict[str, Any] = {"rank": Fixed(2), "checkpoint_key": key, "checkpoint_dir": tmp_path / "c"}
    liar.after = 20
    with pytest.raises(IntegrityError):
        train(make(**change, checkpoint_every=1))
    liar.after = None
    rest = train(make(**change, resume=True))
    straight = train(make(rank=Fixed(2)))
    assert weights_of(rest.model) == weights_of(straight.model)


def test_a_run_that_diverges_says_so_and_keeps_the_checkpoint_from_before(
    make: Make, tmp_path: Path, key: RecipientPrivateKey
) -> None:
    with pytest.raises(MeasureError, match="not finite"):
        train(make(scheme="trusted", lr=1e6, checkpoint_key=key, checkpoint_dir=tmp_path, epochs=200))
    assert (tmp_path / "last.checkpoint").is_file()


def test_another_setting_is_refused_and_more_epochs_are_not_under_the_step_scheduler(
    make: Make, tmp_path: Path, key: RecipientPrivateKey
) -> None:
    change: dict[str, Any] = {"scheme": "trusted", "checkpoint_key": key, "checkpoint_dir": tmp_path}
    train(make(**change, scheduler="step", decay_period=1, lr_decay=0.5))
    again = {**change, "resume": True, "scheduler": "step", "decay_period": 1, "lr_decay": 0.5}
    for name, value in (("seed", 5), ("lr", 0.06), ("batch_size", 4), ("scheme", "lowrank"), ("epochs", 1)):
        with pytest.raises(SettingError, match="another setting") as caught:
            train(make(**{**again, name: value}))
        assert caught.value.where in (name, "iterations")
    longer = train(make(**again, epochs=3))
    assert len(longer.history) == 3
    straight = train(make(scheme="trusted", scheduler="step", decay_period=1, lr_decay=0.5, epochs=3))
    assert weights_of(longer.model) == weights_of(straight.model)


def test_a_used_folder_and_an_empty_one(make: Make, tmp_path: Path, key: RecipientPrivateKey) -> None:
    change: dict[str, Any] = {"scheme": "trusted", "checkpoint_key": key}
    with pytest.raises(InputError, match="no checkpoint to continue from"):
        train(make(**change, checkpoint_dir=tmp_path / "none", resume=True))
    train(make(**change, checkpoint_dir=tmp_path / "a", max_steps=1))
    with pytest.raises(InputError, match="left its checkpoint here") as caught:
        train(make(**change, checkpoint_dir=tmp_path / "a"))
    assert "--resume" in str(caught.value.hint)


def test_an_older_checkpoint_is_refused(make: Make, tmp_path: Path, key: RecipientPrivateKey) -> None:
    change: dict[str, Any] = {"scheme": "trusted", "checkpoint_key": key, "checkpoint_dir": tmp_path}
    train(make(**change, max_steps=1))
    old = tmp_path / "old"
    shutil.copy(tmp_path / "last.checkpoint", old)
    newest = train(make(**change, resume=True)).release
    shutil.copy(old, tmp_path / "last.checkpoint")
    with pytest.raises(RollbackError):
        train(make(**change, resume=True))
    # The host can take its counter back too; what the owner remembers, it cannot.
    (tmp_path / "newest-release").unlink()
    with pytest.raises(RollbackError):
        train(make(**change, resume=True, min_release=newest))
    assert train(make(**change, resume=True)).steps == 6
