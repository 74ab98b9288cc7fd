"""From output tensors to answers: probabilities, embeddings, and the origin of the weights that no answer loses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.signature import Signature, TextPreprocessing
from motte.errors import InputError, SettingError, UnsupportedError
from motte.run.answers import RANDOM_NOTE, embed, read_answers, softmax, top_labels

LABELS = ("cat", "dog", "eel")
MEAN = TextPreprocessing("{}", 8, "mean", True)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_softmax_equals_torchs_in_double(logits: list[float]) -> None:
    ours = softmax(np.array(logits, dtype=np.float32))
    theirs = torch.tensor(logits, dtype=torch.float32).double().softmax(0).numpy()
    assert np.allclose(ours, theirs, rtol=1e-12, atol=0)
    assert math.isclose(ours.sum(), 1, rel_tol=1e-12)


def test_the_likeliest_come_first_and_ties_keep_their_index() -> None:
    top = top_labels(np.array([1.0, 3.0, 3.0], dtype=np.float32), LABELS, 5)
    assert [(r.index, r.label) for r in top] == [(1, "dog"), (2, "eel"), (0, "cat")]
    assert top[0].probability == top[1].probability > top[2].probability
    assert math.isclose(sum(r.probability for r in top), 1)
    assert top[0].percent == "46.8 %"
    assert len(top_labels(np.zeros(3), LABELS, 1)) == 1


def test_huge_logits_do_not_overflow() -> None:
    top = top_labels(np.array([3e38, -3e38, 0], dtype=np.float32), LABELS, 3)
    assert [r.probability for r in top] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_no_answer(bad: float) -> None:
    with pytest.raises(UnsupportedError, match="not finite"):
        top_labels(np.array([0, bad, 0], dtype=np.float32), LABELS, 3)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 3), ()])
def test_labels_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="labels do not fit"):
        top_labels(np.zeros(shape), LABELS, 1)


@pytest.mark.parametrize("topk", [0, -1])
def test_topk_is_at_least_one(topk: int) -> None:
    with pytest.raises(SettingError):
        top_labels(np.zeros(3), LABELS, topk)


def test_a_batch_of_classifications() -> None:
    logits = np.eye(3, dtype=np.float32)[[2, 0]] * 5
    answers = read_answers([logits], Signature("m", "shipped", labels=LABELS), ["x.png", "y.png"], topk=1)
    assert [(a.input, a.top[0].label) for a in answers] == [("x.png", "eel"), ("y.png", "cat")]
    assert all(a.warning == "" and a.weights_origin == "shipped" for a in answers)
    body = json.loads(json.dumps(answers[0].to_json(), allow_nan=False))
    assert body["top"][0]["label"] == "eel"
    assert "warning" not in body


@pytest.mark.parametrize(
    ("signature", "output"),
    [
        (Signature("m", "random", labels=LABELS), np.zeros((1, 3), dtype=np.float32)),
        (Signature("m", "random", MEAN), np.ones((1, 2, 4), dtype=np.float32)),
        (Signature("m", "random"), np.zeros((1, 7), dtype=np.float32)),
    ],
)
def test_random_weights_are_part_of_every_answer(signature: Signature, output: np.ndarray) -> None:
    (answer,) = read_answers([output], signature, ["x"])
    assert answer.warning == RANDOM_NOTE
    body = answer.to_json()
    assert body["weights_origin"] == "random"
    assert body["warning"] == RANDOM_NOTE


def test_mean_pooling_counts_attended_tokens_only_and_normalises() -> None:
    hidden = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    mask = np.array([1, 1, 1, 0, 0])
    ours = embed(hidden, mask, MEAN)
    mean = torch.from_numpy(hidden[:3]).double().mean(0)
    assert np.allclose(ours, torch.nn.functional.normalize(mean, dim=0).numpy(), rtol=1e-12)
    assert not np.allclose(ours, embed(hidden, None, MEAN))
    assert math.isclose(float((ours**2).sum()), 1)


def test_no_pooling_keeps_every_token() -> None:
    hidden = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    plain = embed(hidden, None, TextPreprocessing("{}", 8, "none", False))
    assert np.array_equal(plain, hidden.astype(np.float64))
    unit = embed(hidden, None, TextPreprocessing("{}", 8, "none", True))
    assert np.allclose((unit**2).sum(axis=1), 1)
    assert np.array_equal(embed(np.zeros((2, 3)), None, MEAN), np.zeros(3))


@pytest.mark.parametrize(
    ("hidden", "mask"),
    [(np.zeros(3), None), (np.zeros((2, 3)), np.ones(3)), (np.zeros((2, 3)), np.zeros(2)), (np.zeros((0, 3)), None)],
)
def test_vectors_that_are_no_text_are_refused(hidden: np.ndarray, mask: np.ndarray | None) -> None:
    with pytest.raises(InputError):
        embed(hidden, mask, MEAN)


def test_a_batch_of_embeddings_uses_each_texts_mask() -> None:
    hidden = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    first, second = read_answers([hidden], Signature("m", "published", MEAN), ["a", "b"], mask=mask)
    assert first.embedding is not None
    assert second.embedding is not None
    assert np.array_equal(first.embedding, embed(hidden[0, :2], None, MEAN))
    assert np.array_equal(second.embedding, embed(hidden[1, :1], None, MEAN))
    assert len(first.to_json()["embedding"]) == 4


def test_outputs_of_unknown_meaning_are_given_as_they_are() -> None:
    scores, shared = np.array([[1.5, math.nan], [math.inf, 2.0]]), np.zeros(3, dtype=np.int64)
    first, second = read_answers([scores, shared], Signature("m", "file"), ["a", "b"])
    assert first.to_json()["outputs"] == [
        {"shape": [2], "dtype": "float64", "values": [1.5, None]},
        {"shape": [3], "dtype": "int64", "values": [0, 0, 0]},
    ]
    assert json.dumps(second.to_json(), allow_nan=False)


@pytest.mark.parametrize("outputs", [[], [np.zeros(())], [np.zeros((3, 2))]])
def test_outputs_that_do_not_fit_the_batch_are_refused(outputs: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="does not fit the batch"):
        read_answers(outputs, Signature("m", "file"), ["a", "b"])
