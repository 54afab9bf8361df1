"""Hidden patches drawn back from the loops' states, beside the loss on text.

A share of each picture's patches is hidden from the encoder and drawn from what the decoder made of
their places, after each loop that is read out. As in MAE (arXiv 2111.06377) only hidden patches
count, and each patch is compared after its own mean and deviation are taken out: an error of 1 is
what an even patch would get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.vision import Pictures

GOOD = 0.5
"""A patch with an error below this was drawn well; the head's confidence is of that."""
_FLAT = 1e-2  # added to the variance, so that noise on an even patch is not blown up


class Drawn(NamedTuple):
    """error: (...,), of each hidden patch; logit: of a good one."""

    error: Tensor
    logit: Tensor


def hide(pictures: Pictures, share: float) -> Pictures:
    """Hide so many of the patches, by torch's generator of the CPU."""
    drawn = torch.rand(len(pictures.patches)) < share
    return replace(pictures, hidden=drawn.to(pictures.patches.device))


def places_of(tokens: Tensor, image_token: int, hidden: Tensor) -> Tensor:
    """Of each token the number of its hidden patch, -1 for all others; shaped as the tokens."""
    found = torch.full_like(tokens, -1)
    numbers = torch.arange(len(hidden), device=tokens.device)
    found[tokens == image_token] = numbers.masked_fill(~hidden, -1)
    return found


def draw(model: LoopedTransformer, decoded: Tensor, places: Tensor, pictures: Pictures) -> Drawn:
    """What the model draws at the places of hidden patches, against what was there.

    decoded: (batch, length, d_model), what the head reads. places: (batch, length), by `places_of`.
    """
    assert model.patch_head is not None, "a model without reconstruct draws nothing"
    there = places >= 0
    seen = decoded[there]
    wanted = pictures.patches[places[there]].to(seen.dtype)
    spread, mean = torch.var_mean(wanted, -1, keepdim=True, correction=0)
    wanted = (wanted - mean) / (spread + _FLAT).sqrt()
    error = (model.patch_head.pixels(seen) - wanted).square().mean(-1)
    return Drawn(error, model.patch_head.sure(seen.detach()).squeeze(-1))


def drawing_losses(drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Scalars: the mean error, and what the confidence costs; no hidden patch costs nothing."""
    if not len(drawn.error):
        return drawn.error.sum(), drawn.logit.sum()
    good = (drawn.error.detach() < GOOD).to(drawn.logit.dtype)
    return drawn.error.mean(), F.binary_cross_entropy_with_logits(drawn.logit, good)
