"""The encoder of recordings: 12.5 vectors of the decoder's width a second.

Two convolutions make 25 rows a second of 100 frames, blocks let them see each other, and each pair
becomes one vector: the shape of today's speech encoders (Qwen3-Omni, arXiv 2509.17765; Moonshine,
arXiv 2410.15608), without padding to a fixed length. A head for CTC (Graves et al., ICML 2006) over
bytes stands at 25 rows a second, where a text fits: it aligns sound and text, which a decoder by
itself learns late (arXiv 1609.06773).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.media.audio.features import FRAMES, MELS
from looptx_core.media.base import Encoded
from looptx_core.media.batch import MediaBatch
from looptx_core.media.encoder import Encoder, present

ROWS = 2
"""Rows of the blocks for one token."""
BLANK = 0
"""CTC's symbol for no byte; byte b is b + 1."""


class AudioEncoder(Encoder):
    """Log-mels to vectors of the decoder's width; all of one recording see each other."""

    first: nn.Conv1d
    second: nn.Conv1d

    def __init__(self, config: ModelConfig) -> None:
        width = config.audio.width
        super().__init__(
            config,
            config.audio.layers,
            width,
            first=nn.Conv1d(MELS, width, 3, stride=2, padding=1),
            second=nn.Conv1d(width, width, 3, stride=2, padding=1),
        )
        self.ctc = nn.Linear(width, 1 + 256) if config.audio.ctc_weight else None
        self.project = nn.Linear(ROWS * width, config.d_model, bias=False)

    def reset_stem(self) -> None:
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=math.sqrt(1 / layer.weight[0].numel()))

    def forward(self, recordings: MediaBatch, with_loss: bool = False) -> Encoded:
        """The vectors of all recordings, and CTC's loss where asked for and learned."""
        x, there = self._rows(recordings)
        pairs = x.reshape(len(x), -1, ROWS * x.shape[-1])
        vectors = self.project(pairs)[there[:, ::ROWS]]
        wanted = with_loss and self.ctc is not None and recordings.labels is not None
        return Encoded(vectors, self._loss(x, recordings) if wanted else None)

    def scores(self, recordings: MediaBatch) -> Tensor:
        """CTC's log-probabilities, (items, rows of 40 ms, 257), padded at the right.

        Raises `UsageError` for an encoder without CTC.
        """
        if self.ctc is None:
            raise UsageError("this model's encoder was trained without CTC; use another")
        return self.ctc(self._rows(recordings)[0]).log_softmax(-1)

    def _rows(self, recordings: MediaBatch) -> tuple[Tensor, Tensor]:
        """What the blocks make of recordings, (items, rows, width), and where no padding is."""
        sizes = recordings.grids[:, 0].tolist()
        weight = self.project.weight
        frames = pad_sequence(recordings.features.to(weight.dtype).split(sizes), batch_first=True)
        x = frames.view(len(sizes), -1, MELS).transpose(1, 2)
        # A row looks at no frame beyond its token's end, so padding changes nothing.
        x = F.gelu(self.second(F.gelu(self.first(x)))).transpose(1, 2)
        assert x.shape[1] * FRAMES == frames.shape[1] * FRAMES * ROWS
        positions = torch.arange(x.shape[1], device=x.device)[None, None]
        there = present([ROWS * size for size in sizes], x.device)
        return self.run(x, positions, there), there

    def _loss(self, x: Tensor, recordings: MediaBatch) -> Tensor:
        """Nats a byte, over the recordings that have a label."""
        labels, lengths = recordings.labels, recordings.label_lengths
        assert self.ctc is not None and labels is not None and lengths is not None
        lengths, sizes = lengths.cpu(), recordings.grids[:, 0].cpu()
        known = (lengths >= 0).nonzero()[:, 0]
        scores = self.ctc(x[known.to(x.device)]).float()
        if not len(known):
            return scores.sum() + 0.0 * (self.ctc.weight.sum() + self.ctc.bias.sum())
        losses = F.ctc_loss(
            scores.log_softmax(-1).transpose(0, 1),
            labels + 1,
            ROWS * sizes[known],
            lengths[known],
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        )
        return losses / max(1, int(lengths[known].sum()))


def frames_needed(label: Tensor) -> int:
    """The rows that CTC needs for a label: one a byte, and a blank between equal ones."""
    return len(label) + int((label[1:] == label[:-1]).sum())
