"""How well logits predict their targets."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from looptx_core.model.fused import can_use_fused, cross_entropy

_NONE = -100
"""A target that does not count, as PyTorch has it; its loss is 0."""


class Score(NamedTuple):
    """How well the logits predict their targets. Each field is (tokens,)."""

    loss: Tensor
    """Nats."""
    hit: Tensor
    """1 where the top token is the target, else 0."""
    top: Tensor
    """The probability of the top token, without a gradient."""


def score(logits: Tensor, targets: Tensor) -> Score:
    """Score logits, (tokens, vocab_size), in float32 by their targets, (tokens,) ids."""
    if can_use_fused(logits, operation="loss"):
        loss, hit, top = cross_entropy(logits, targets)
        return Score(loss.where(targets != _NONE, 0.0), hit, top)
    logits, counts = logits.float(), targets != _NONE
    known = targets.where(counts, 0)
    losses = F.cross_entropy(logits, known, reduction="none")
    top_logit, top = logits.detach().max(-1)
    own = logits.detach().gather(1, known[:, None]).squeeze(1)
    # The loss is the log of all exponentials' sum less the target's logit.
    probability = (top_logit - own - losses.detach()).exp()
    return Score(losses.where(counts, 0.0), (top == targets).float(), probability)
