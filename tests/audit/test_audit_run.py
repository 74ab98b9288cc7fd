"""A whole audit of a small victim: schemes, findings, files; failures and contradictions are said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn

from motte.audit import run as suites
from motte.audit.attacks.registry import ABOUT_WHAT_WAS_LEARNT, ATTACKS
from motte.audit.document import decode_audit
from motte.audit.epsilon import EmpiricalEpsilon
from motte.audit.interface import Budget, Check, Context, Job, Outcome, Scene, standard_job
from motte.audit.observe import observe_file
from motte.audit.run import AuditRequest, record_inference, run_audit, write_audit
from motte.audit.scene import Audited, activations, make_stage
from motte.audit.tensorboard import write_tensorboard
from motte.capture.signature import ImagePreprocessing, Signature
from motte.cli import audit as cli
from motte.errors import InputError, MeasureError, SettingError, UnsupportedError
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

NOISED = Asymmetric(noise=Gaussian(residual=Mechanism(1.0, 4.0)), rank=Fixed(2))
PLAIN = Asymmetric(noise=None, rank=Fixed(2))
ALL = (Audited("trusted"), Audited("asymmetric", PLAIN), Audited("asymmetric", NOISED), Audited("accelerator"))


class Planned:
    """The attacks of these tests: one that looks, one that fails, one that measures epsilon and tries a check."""

    def __init__(self, peek: Any, *, lower: float = 0.5) -> None:
        self.peek = peek
        self.lower = lower

    def plan(self, scene: Scene) -> Sequence[Job]:
        def fails(context: Context) -> Outcome:
            raise UnsupportedError("this model is not for me")

        def epsilon(context: Context) -> Outcome:
            found = EmpiricalEpsilon(
                lower=self.lower,
                upper=2.0,
                upper_because="stated",
                delta=1e-5,
                adjacency="replace",
                confidence=0.95,
                method="one run",
                trials=10,
                counted="x",
            )
            return Outcome(epsilons=(found,), checks=(Check("tried", "A2", True, "refused"),), extra={"extra": 1.0})

        jobs = [standard_job("peek", lambda: self.peek("3"), scene, "inference")]
        if scene.scheme is NOISED:
            jobs += [Job("fails", fails), Job("epsilon", epsilon)]
        return jobs


@pytest.fixture
def planned(bars: Any, monkeypatch: pytest.MonkeyPatch) -> Planned:
    made = Planned(bars.Peek)
    monkeypatch.setattr(suites, "ATTACKS", {"test": ("", "")})
    monkeypatch.setattr(suites, "load", lambda _name, **_options: made)
    return made


def request_of(bars: Any, audited: tuple[Audited, ...] = ALL, **more: Any) -> AuditRequest:
    return AuditRequest(built=bars.built(), data=bars.data_set(), audited=audited, **more)


def test_a_whole_audit(bars: Any, planned: Planned, tmp_path: Path) -> None:
    said: list[str] = []
    audit = run_audit(request_of(bars), progress=lambda done, total, what: said.append(what))
    found = audit.document
    assert [each.audited for each in found.schemes] == [str(each) for each in ALL]
    psnr = {each.audited: each for each in found.findings if each.metric == "psnr"}
    assert psnr["trusted"].position_percent == 0.0
    assert psnr["accelerator"].position_percent == 100.0
    assert (psnr[str(ALL[1])].position_percent or 0) > (psnr[str(ALL[2])].position_percent or 0)
    (failure,) = found.failures
    assert (failure.job, failure.audited) == ("fails", str(ALL[2]))
    verdicts = {each.claim: each.verdict for each in found.claims}
    assert [verdicts[each] for each in ("A2", "F1", "F3", "F4", "F8", "B1")] == ["held"] * 5 + ["not tested"]
    assert verdicts["F, not claimed: residuals without noise"] == "not held"
    assert {"peek, trusted", "measures"} <= set(said)
    trusted, plain, _, everything = found.schemes
    assert (trusted.inference, trusted.training, trusted.declared) == ((), (), ())
    assert plain.declared == ("3", "5")
    assert (plain.first, plain.last) == ("0", "8")
    assert {row.layer for row in everything.inference} == {"0", "3", "5", "8"}
    names = {each.name for each in found.figures}
    assert {"exposed energy", "SVD-channel entropy", "patch entropy, 3 x 3", "extra"} <= names
    assert any(each.name.startswith("Fisher") and each.value is not None for each in found.figures)
    information = {
        (each.audited, each.layer): each for each in found.figures if each.name.startswith("mutual information")
    }
    assert information[("trusted", "3")].missing is None or "too few" in str(information[("trusted", "3")].missing)

    folder = tmp_path / "results"
    assert write_audit(audit, folder) == ()
    assert decode_audit((folder / "audit.json").read_bytes(), where="x") == found
    files = sorted(each.name for each in (folder / "audit").iterdir())
    assert len(files) == len(found.pictures) + 2
    assert all((folder / each.file).is_file() for each in found.pictures)
    with Image.open(folder / found.pictures[0].file) as picture:
        assert picture.size[0] > 8 * 64
    assert [each.name for each in folder.iterdir() if each.name.startswith(".")] == []
    with pytest.raises(InputError, match="lies there already"):
        write_audit(audit, folder)
    write_audit(audit, folder, overwrite=True)
    assert write_tensorboard(audit, tmp_path / "events") > len(found.findings) * 3
    assert list((tmp_path / "events").iterdir())


def test_the_same_seed_gives_the_same_findings_where_nothing_is_noised(bars: Any, planned: Planned) -> None:
    first, again = (run_audit(request_of(bars, (Audited("asymmetric", PLAIN),), seed=5)).document for _ in range(2))
    assert first.findings == again.findings
    assert first.figures == again.figures


def test_nothing_is_left_where_an_audit_cannot_be_written(
    bars: Any, planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = run_audit(request_of(bars, (Audited("asymmetric", PLAIN),)))

    def breaks(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "write_csv", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_audit(audit, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


def test_a_limit_is_shared_by_the_jobs_still_to_come(bars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Spends:
        def plan(self, scene: Scene) -> Sequence[Job]:
            def run(context: Context) -> Outcome:
                given.append(context.budget.seconds)
                return Outcome()

            return [Job(str(number), run) for number in range(4)]

    monkeypatch.setattr(suites, "ATTACKS", {"test": ("", "")})
    monkeypatch.setattr(suites, "load", lambda _name, **_options: Spends())
    full = replace(request_of(bars, ALL[:1], suite="full"), data=bars.data_set(200, 128))
    run_audit(replace(full, seconds=80.0))
    assert given == pytest.approx([20, 26.7, 40, 80], rel=0.1)
    given.clear()
    run_audit(replace(full, budget=0.1))
    assert given == [90.0] * 4, "no limit but each position's own"
    for wrong in (0.0, float("inf")):
        with pytest.raises(SettingError, match="number of seconds"):
            request_of(bars, seconds=wrong)


def test_what_random_weights_say_nothing_of_is_said_and_not_measured(
    bars: Any, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "ABOUT_WHAT_WAS_LEARNT", {"test": "for a test"})
    request = request_of(bars, ALL[:2])
    found = run_audit(request).document
    assert found.weights_origin == "random"
    assert (found.findings, [each.message for each in found.failures]) == ((), ["n/a: for a test"] * 2)
    trained = replace(request, built=replace(request.built, signature=Signature("bars-net", "a file")))
    assert run_audit(trained).document.findings
    assert set(ABOUT_WHAT_WAS_LEARNT) <= set(ATTACKS)


def test_what_cannot_be_audited(bars: Any, planned: Planned) -> None:
    with pytest.raises(SettingError, match="each scheme once"):
        request_of(bars, ())
    with pytest.raises(SettingError, match="each scheme once"):
        request_of(bars, (Audited("trusted"), Audited("trusted")))
    with pytest.raises(SettingError, match="no attack of that name"):
        request_of(bars, attacks=("unknown",))
    with pytest.raises(SettingError):
        Audited("trusted", PLAIN)
    with pytest.raises(SettingError):
        Audited("asymmetric")
    wrong = bars.built(bars.victim()[:7])
    budget = suites.BUDGETS["quick"]
    with pytest.raises(UnsupportedError, match="classifiers"):
        make_stage(wrong, bars.data_set(), suite="quick", budget=budget, seed=0)


# --- observing a recording ------------------------------------------------------------------------------------------
def test_grey_images_are_given_to_a_model_of_colours_as_three_equal_ones(bars: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    photos = ImagePreprocessing("RGB", 8, 8, "bilinear", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    built = replace(bars.built(model), signature=Signature("colours", "random", photos))
    data = bars.data_set()
    stage = make_stage(built, data, suite="quick", budget=Budget(), seed=0)
    assert stage.input_shape == (3, 8, 8)
    images, _ = stage.records("test", 3)
    grey = torch.from_numpy(data.test.read(np.arange(3), None)).float() / 255
    assert torch.allclose(images, grey - torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1), atol=1e-6)
    two = replace(data, shape=(2, 8, 8))
    with pytest.raises(UnsupportedError, match="other colours"):
        make_stage(built, two, suite="quick", budget=Budget(), seed=0)


def test_a_recording_is_listed_with_shares_where_the_inputs_are_known(bars: Any, tmp_path: Path) -> None:
    request = request_of(bars, (Audited("trusted"), Audited("asymmetric", PLAIN)), budget=1.0)
    record_inference(request, tmp_path / "run")
    plain = observe_file(tmp_path / "run")
    assert {(row.layer, row.direction, row.kind) for row in plain.rows} == {
        (layer, *rest)
        for layer in ("3", "5")
        for rest in (("sent", "weight"), ("sent", "activation"), ("received", "output"))
    }
    assert all(row.exposed is None for row in plain.rows)
    first = plain.rows[1]
    assert (first.bytes, first.shapes) == (16 * 6 * 8 * 8 * 4, ((16, 6, 8, 8),))
    assert plain.bytes_out == sum(row.bytes for row in plain.rows if row.direction == "sent")
    stage = make_stage(bars.built(), bars.data_set(), suite="quick", budget=suites.BUDGETS["quick"], seed=0)
    known = activations(stage.model, stage.private("inference")[0])
    shares = {row.layer: row.exposed for row in observe_file(tmp_path / "run", known).rows if row.exposed is not None}
    assert set(shares) == {"3", "5"}
    for each in shares.values():
        assert 0.0 < each.energy < 0.7
        assert each.energy == pytest.approx(each.aligned, rel=1e-3), "without noise they are the same share"
    other = activations(stage.model, stage.records("train", 16)[0])
    strange = {row.layer: row.exposed for row in observe_file(tmp_path / "run", other).rows if row.exposed is not None}
    assert strange["3"].aligned != pytest.approx(strange["3"].energy, rel=1e-2), "other inputs: the two disagree"
    with pytest.raises(MeasureError, match="not of these inputs"):
        observe_file(tmp_path / "run", {name: value[:3] for name, value in known.items()})
    with pytest.raises(SettingError, match="has a link to record"):
        record_inference(request_of(bars, (Audited("trusted"),)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- the command line -----------------------------------------------------------------------------------------------
MODEL = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(6 * 64, 2))

def example_inputs():
    return torch.zeros(2, 3, 8, 8)
"""


def motte_audit(*words: str) -> int:
    status = typer.main.get_command(cli.app).main(list(words), "motte audit", standalone_mode=False)
    return status if isinstance(status, int) else 0


@pytest.fixture
def own(bars: Any, tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    images, labels = bars.images_of(60, 3)
    for number, (image, label) in enumerate(zip(images, labels % 2, strict=True)):
        split = "train" if number < 40 else "val"
        folder = tmp_path / "photos" / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).convert("RGB").save(folder / f"{number}.png")
    return f"{tmp_path / 'net.py'}:net", f"folder:{tmp_path / 'photos'}"


def test_the_command_line(
    own: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = own
    run = str(tmp_path / "run.recording")
    words = [model, "--data", data, "--attack", "none", "--rank", "fixed:2", "--noise", "none", "-q"]
    kept = ("--out", str(tmp_path / "out"), "--recording", run, "--findings", str(tmp_path / "f.md"))
    status = motte_audit(*words, *kept)
    shown = capsys.readouterr().out
    assert status == 0
    assert "F1: Held:" in shown
    assert "asymmetric, noise none, rank fixed:2" in shown
    assert decode_audit((tmp_path / "out" / "audit.json").read_bytes(), where="x").suite == "quick"
    assert "### What left" in (tmp_path / "f.md").read_text(encoding="utf-8")

    assert motte_audit("observe", run, "--model", model, "--data", data) == 0
    listed = capsys.readouterr().out
    assert "activation" in listed
    assert "%" in listed
    assert motte_audit("observe", run, "--model", model) == 2
    capsys.readouterr()
    for wrong, status in (
        (["--scheme", "magic"], 2),
        (["--scheme", "trusted"], 2),
        (["--out", str(tmp_path / "out")], 2),
    ):
        assert motte_audit(*words, *wrong) == status, wrong
    assert motte_audit(model, "--data", "sealed:x") == 2
    capsys.readouterr()

    again = (*words, "--scheme", "asymmetric", "--add")
    assert motte_audit(*again) == 2, "--add needs --out"
    assert motte_audit(*again, "--out", str(tmp_path / "out")) == 2, "of other schemes"
    assert motte_audit(*words, "--add", "--out", str(tmp_path / "out"), "--attack", "conformance") == 0
    assert decode_audit((tmp_path / "out" / "audit.json").read_bytes(), where="x").checks
    capsys.readouterr()

    # An attack that proves more than the accountant states is a failure of motte, and of this command.
    monkeypatch.setattr(suites, "ATTACKS", {"test": ("", "")})
    monkeypatch.setattr(suites, "load", lambda _name, **_options: _Contradicts())
    assert motte_audit(model, "--data", data, "--scheme", "trusted") == 1
    assert "an attack proves more than motte states" in capsys.readouterr().err


class _Contradicts(Planned):
    def __init__(self) -> None:
        super().__init__(None, lower=3.0)

    def plan(self, scene: Scene) -> Sequence[Job]:
        found = EmpiricalEpsilon(
            lower=3.0,
            upper=2.0,
            upper_because="stated",
            delta=1e-5,
            adjacency="replace",
            confidence=0.95,
            method="one run",
            trials=10,
            counted="x",
        )
        return [Job("epsilon", lambda _context: Outcome(epsilons=(found,)))]
