"""The confidence head: how sure is the model after this loop, and would one more loop help?

Its targets come from the main loss of the same forward pass (see `training/objective.py`):

- `logit`: the log-odds that the model's most likely token is right, trained by binary cross-entropy
  against that token's own probability, which equals the mean of [argmax == label] for a calibrated
  model. CALM's and TRM's halting heads (arXiv 2207.07061, 2510.04871) learn [argmax == label]
  itself, which is noisy and inflated by memorised training text. Where the model is too sure,
  calibration on held-out text corrects it.
- `gain`: the expected drop of the token's loss from this loop to the next, in nats, trained by
  squared error against L[t] - L[t+1]. Ouro (arXiv 2510.25741) squashes the same difference into a
  probability; the plain mean keeps its unit, so that a threshold on it means nats per loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.injection import read_out
from looptx_core.model.norm import RMSNorm


class Confidence(NamedTuple):
    """The confidence head's output, before calibration. Both fields are (batch, length)."""

    logit: Tensor
    """Log-odds that the most likely token is right."""
    gain: Tensor
    """Nats that the next loop is predicted to gain."""


def top_log_odds(log_probs: Tensor) -> Tensor:
    """The log-odds of the most likely token's own probability.

    log_probs: (..., vocab_size), nats. Returns (...), at most about 16, the limit of float32.
    """
    best = log_probs.amax(-1).clamp(max=-1e-7)
    return best - torch.log(-torch.expm1(best))


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """By how much a loop changed the state: |after - before| / |after|, (...), from (..., d_model).

    At least 1e-6, about the precision of float32, so that its logarithm is finite. It shows well
    which tokens have converged and needs no training; Huginn's code (arXiv 2502.05171) stops by the
    same quantity, `latent-diff`.
    """
    before, after = before.float(), after.float()
    change = (after - before).norm(dim=-1) / after.norm(dim=-1).clamp(min=1e-12)
    return change.clamp(min=1e-6)


class ConfidenceHead(nn.Module):
    """Two small GeGLUs on the detached state after a loop, a narrow one and a wider one.

    It reads only the hidden state, so that deciding to stop costs no product with the vocabulary.
    The state is detached, so that the head's gradients don't reach the trunk. The first
    `gain_units` hidden units predict the gain, which a rule may need after every loop; the others
    predict the log-odds, which are needed where a token stops. The CPU kernel computes only what is
    needed, torch always both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        narrow, wide = config.gain_units, config.confidence_units
        self.widths = narrow, wide
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.hidden = nn.Linear(config.d_model, narrow + wide)
        self.gate = nn.Linear(config.d_model, narrow + wide)
        self.loop = nn.Embedding(config.max_loops, narrow + wide)
        self.out = nn.Linear(wide, 1)
        self.gain = nn.Linear(narrow, 1)

    def forward(self, state: Tensor, loop: int | Tensor) -> Confidence:
        """state: (batch, length, width) after `loop`, an int or (batch,), counted from 1."""
        state, deepest = state.detach(), self.loop.num_embeddings
        if isinstance(loop, int):
            depth = self.loop.weight[min(loop, deepest) - 1]
        else:
            depth = self.loop(loop.clamp(max=deepest)[:, None] - 1)
        state = self.norm(read_out(state, self.norm.width))
        hidden = nn.functional.gelu(self.hidden(state) + depth) * self.gate(state)
        narrow, wide = hidden.split(self.widths, -1)
        return Confidence(self.out(wide).squeeze(-1), self.gain(narrow).squeeze(-1))
