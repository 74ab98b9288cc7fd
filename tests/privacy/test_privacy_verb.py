"""``motte privacy``: the table, the sentences, the JSON document, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import typer

from motte.cli.privacy import privacy

Run = Callable[..., tuple[int, str, str]]
TRAIN = ("--records", "50000", "--batch-size", "32", "--epochs", "3", "--layers", "13")
CLIPS = ("--residual-clip", "1", "--gradient-clip", "0.1", "--update-clip", "2")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command()(privacy)

    def call(*words: str) -> tuple[int, str, str]:
        status = typer.main.get_command(app).main(["privacy", *words], "motte", standalone_mode=False)
        found = capsys.readouterr()
        return status if isinstance(status, int) else 0, found.out, found.err

    return call


def test_a_training_run_as_a_table_and_words(run: Run) -> None:
    code, out, err = run(*TRAIN, *CLIPS, "--noise-multiplier", "1", "--inside", "frozen", "--no-batch-norm")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].rstrip() == "training, 13 split layers, neighbours: one record replaced"
    assert lines[3].split() == ["residual", "1", "1", "1", "60,957", "39", "1", "2", "clips"]
    assert lines[4].split() == ["gradient", "0.1", "1", "0.1", "60,957", "39", "1", "2", "clips"]
    assert "epsilon per record: 325.4   delta: 1e-05" in out
    assert "forward only, no guarantee for training: 130.4" in out
    assert "composed by dp-accounting" in out
    assert "* Per record, not per person" in out


def test_what_is_not_given_is_the_worse_case(run: Run) -> None:
    _, out, _ = run(*TRAIN, *CLIPS, "--noise-multiplier", "1")
    assert "1.327e+08" in out
    assert "60,957      60,957          32" in out
    code, out, _ = run(*TRAIN)
    assert code == 0
    assert "epsilon per record: infinite" in out
    assert out.count("unbounded") == 3


def test_noise_for_a_budget_as_json(run: Run) -> None:
    code, out, _ = run(*TRAIN, *CLIPS, "--epsilon", "8", "--inside", "frozen", "--no-batch-norm", "--json")
    document = json.loads(out)
    assert code == 0
    assert 7.99 < document["epsilon"] <= 8
    assert {each["noise_multiplier"] for each in document["releases"]} == {12.984940518287807}
    assert document["releases"][1]["sigma"] == pytest.approx(1.2984940518287807)
    assert document["layers"] == 13


def test_inference(run: Run) -> None:
    code, out, _ = run("--queries", "10", "--layers", "13", "--residual-clip", "1", "--epsilon", "8")
    assert code == 0
    assert "epsilon per record: 8 " in out
    assert "13.69" in out
    assert "forward only" not in out
    assert "10 queries about the same record" in out


def test_the_layers_of_a_model_are_counted(run: Run) -> None:
    # ResNet-18 has twenty convolutions; the first meets the image, and the linear layer stays inside.
    code, out, _ = run("--queries", "1", "--model", "resnet18", "--residual-clip", "1", "--epsilon", "1")
    assert code == 0
    assert "19 split layers" in out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--layers", "1"), "training or inference?"),
        ((*TRAIN, "--queries", "1"), "training or inference?"),
        (TRAIN[2:], "training needs all three"),
        (TRAIN[:6], "how many layers"),
        ((*TRAIN, "--model", "vgg16"), "how many layers"),
        ((*TRAIN, *CLIPS), "how much noise?"),
        ((*TRAIN, *CLIPS, "--epsilon", "1", "--noise-multiplier", "1"), "given twice"),
        ((*TRAIN, "--epsilon", "1"), "no clip"),
        ((*TRAIN, "--gradient-clip", "1", "--noise-multiplier", "1"), "no clip"),
        ((*TRAIN, "--residual-clip", "1", "--epsilon", "1"), "no noise gives a finite epsilon"),
        ((*TRAIN, "--residual-clip", "-1", "--noise-multiplier", "1"), "positive"),
        (("--queries", "1", "--layers", "1", *CLIPS, "--epsilon", "1"), "neither gradients nor updates"),
        (("--queries", "1", "--model", "vgg16", "--image-shape", "32"), "not the shape"),
        (("--queries", "1", "--layers", "1", "--delta", "2"), "delta"),
    ],
)
def test_contradictions_are_wrong_use(run: Run, words: tuple[str, ...], what: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert what in err
