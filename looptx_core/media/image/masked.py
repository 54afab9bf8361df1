"""Hidden patches drawn back from the loops' states, beside the loss on text.

A share of each picture's patches is hidden from the encoder and drawn from what the decoder made of
their places, after each loop that is read out. As in MAE (arXiv 2111.06377) only hidden patches
count, and each patch is compared after its own mean and deviation are taken out: an error of 1 is
what an even patch would get.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.media.base import MediumLosses
from looptx_core.media.batch import MediaBatch

GOOD = 0.5
"""A patch with an error below this was drawn well; the head's confidence is of that."""
_FLAT = 1e-2  # added to the variance, so that noise on an even patch is not blown up


class Reconstruction(NamedTuple):
    """error: (...,), of each hidden patch; logit: of a good one."""

    error: Tensor
    logit: Tensor


class PatchHead(nn.Module):
    """From the state at a hidden patch's place: its pixels, and the logit of drawing them well."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pixels = nn.Linear(config.d_model, 3 * config.patch_size**2)
        hidden = max(32, config.d_model // 4)
        self.sure = nn.Sequential(
            nn.Linear(config.d_model, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )


def reconstruct(
    head: nn.Module, decoded: Tensor, numbers: Tensor, images: MediaBatch
) -> Reconstruction:
    """What the head makes of hidden patches, against what was there.

    decoded: (rows, length, d_model), what the output head reads. numbers: (rows, length), which
    patch is hidden there, -1 elsewhere.
    """
    assert isinstance(head, PatchHead)
    there = numbers >= 0
    seen = decoded[there]
    wanted = images.features[numbers[there]].to(seen.dtype)
    spread, mean = torch.var_mean(wanted, -1, keepdim=True, correction=0)
    wanted = (wanted - mean) / (spread + _FLAT).sqrt()
    error = (head.pixels(seen) - wanted).square().mean(-1)
    return Reconstruction(error, head.sure(seen.detach()).squeeze(-1))


def reconstruction_losses(drawn: Reconstruction) -> MediumLosses:
    """The mean error, and the cost of the confidence; no hidden patch costs nothing."""
    if not len(drawn.error):
        return MediumLosses(drawn.error.sum(), drawn.logit.sum())
    good = (drawn.error.detach() < GOOD).to(drawn.logit.dtype)
    return MediumLosses(drawn.error.mean(), F.binary_cross_entropy_with_logits(drawn.logit, good))
