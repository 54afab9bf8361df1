"""A teacher, whose probabilities of the next token a model learns beside the targets (distillation,
arXiv 1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.checkpoint.folder import as_float, load_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.config.model import ModelConfig
from looptx_core.documents import read_json
from looptx_core.errors import UsageError
from looptx_core.media.batch import Media
from looptx_core.media.registry import media_for
from looptx_core.model.loop import LoopedTransformer

FIRST_LOOP = "first-loop"
"""In place of a folder: the model's own first loop."""


class Teacher:
    """A trained model at the depth that it was trained for; or a model's own first loop.

    name: a run or a model folder, or `FIRST_LOOP`. Raises `DataError` for a folder that is none.
    """

    def __init__(self, name: str) -> None:
        self.model: LoopedTransformer | None = None
        self.loops = 1
        if name != FIRST_LOOP:
            folder = resolve_model(name, need=frozenset({"weights"})).folder
            self.model = as_float(load_model(folder, dtype=torch.float32)).model
            self.model.requires_grad_(False).eval()
            self.loops = self.model.config.loops

    @torch.no_grad()
    def logits(
        self,
        student: LoopedTransformer,
        tokens: Tensor,
        documents: Tensor | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """(batch, length, vocab_size), for tokens and documents, (batch, length), as in
        `LoopedTransformer.context`."""
        model = student if self.model is None else self.model.to(tokens.device)
        layout = model.layout(tokens, media)
        ctx = model.context(tokens.shape[1], documents=documents, layout=layout)
        state = embedding = model.embed(tokens, ctx, media)
        for _, after in model.iterate(embedding, embedding, ctx, range(1, self.loops + 1)):
            state = after
        return model.logits(model.coda_hidden(state, ctx))


def divergence(taught: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || student) of each token, nats, (tokens,); both (tokens, vocab_size) logits."""
    ours, theirs = logits.float().log_softmax(-1), taught.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def check_teacher(name: str | None, config: ModelConfig, tokenizer: str) -> None:
    """Raise `UsageError` for a teacher that can't teach a model, `DataError` for no model.

    config: of the model that is trained. tokenizer: the fingerprint of its tokenizer.
    """
    if name is None or name == FIRST_LOOP:
        return
    folder = resolve_model(name, need=frozenset({"weights"})).folder
    settings = read_json(folder / "config.json")
    words = settings.get("vocab_size")
    if words != config.vocab_size or settings.get("tokenizer_fingerprint") != tokenizer:
        raise UsageError(
            f"`teacher` {name}: its {words} tokens are not the model's {config.vocab_size}; give a "
            "teacher with the same tokenizer"
        )
    if media_for(config):
        raise UsageError(
            f"`teacher` {name}: a teacher of text alone, and the model reads media; leave it out, "
            f"or give {FIRST_LOOP}"
        )
