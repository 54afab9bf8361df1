"""The two matrices of a model's vocabulary: of the embedding and of the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.int8 import Int8Embedding, Int8Linear

if TYPE_CHECKING:
    from looptx_core.model.loop import LoopedTransformer


def new_embedding(config: ModelConfig) -> nn.Embedding | Int8Embedding:
    """The matrix that gives each token its vector."""
    kind = Int8Embedding if config.linear == "int8" else nn.Embedding
    return kind(config.vocab_size, config.d_model)


def new_head(config: ModelConfig) -> nn.Linear | Int8Linear:
    """The matrix that gives each token its logit."""
    if config.linear == "int8":
        return Int8Linear(config.d_model, config.vocab_size)
    return nn.Linear(config.d_model, config.vocab_size, bias=False)


def tie_head(model: LoopedTransformer) -> None:
    """Let a model's head use the weights of its embedding, where the configuration says so."""
    if model.config.tie_embeddings:
        for name in ("weight", "weight_scale"):
            if hasattr(model.embedding, name):
                setattr(model.head, name, getattr(model.embedding, name))
