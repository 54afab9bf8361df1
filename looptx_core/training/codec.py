"""Training a codec: its encoder and its detokeniser together, by flow matching alone.

The loss is that of the velocity (v - v')^2 with v = (x - z) / (1 - t), though the network predicts
x (arXiv 2511.13720). A share of each batch is at t = 0, which trains the decoder of one step. Each
batch is read out after the last loop and after an earlier one, whose target moves from the picture
to what the last loop makes of it (arXiv 2604.09168), so that every number of loops works.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.run import RunConfig
from looptx_core.errors import LooptxError
from looptx_core.media.base import Grid
from looptx_core.media.codec.codec import Codec, is_block
from looptx_core.model import fused
from looptx_core.training.optimizer import learning_rate_factor, split_optimizer

_STEEPEST = 0.05  # 1 - t is no smaller in the velocity (JiT)
_REGRESSION = 0.25  # of each batch, at t = 0
_NO_CODES = 0.1  # of each batch, for guidance
_OTHER_CODES = 0.05  # of all codes, drawn at random, so that a wrong one costs one patch
_KEPT = 0.999  # of the averaged weights at each step
_ROWS = 64  # items that are judged at once

Progress = Callable[[int, int, float], object]
"""(step, steps, loss)."""


@dataclass
class CodecReport:
    """How good a codec is on items, pictures or stretches of speech, that it was not trained on."""

    psnr: dict[int, float] = field(default_factory=dict)
    """Decibels by the number of diffusion steps, all loops."""
    psnr_by_loop: list[float] = field(default_factory=list)
    """Decibels after each number of loops, in one step."""
    mel_error: dict[int, float] = field(default_factory=dict)
    """Of speech: the mean deviation (root mean square) of its mels in decibels of loudness, by the
    number of diffusion steps, all loops."""
    codes_used: float = 0.0
    """The share of the codes that appear."""
    bits: float = 0.0
    """Of one picture, or of a second of speech."""
    held_out: int = 0
    """Items that were judged."""
    steps: int = 0
    """Steps of the training."""
    seconds: float = 0.0
    """Of the training."""


class Averaged:
    """Parameters averaged over the steps, more slowly as they go on; they are what is kept."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.mean = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        kept = min(_KEPT, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - kept)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the parameters their averages."""
        for parameter, mean in zip(self.parameters, self.mean):
            parameter.copy_(mean)


def codec_loss(
    codec: Codec, patches: Tensor, grid: Grid, draw: torch.Generator, progress: float
) -> Tensor:
    """The objective on a batch of patches (batch, patches, numbers), -1 to 1. A scalar.

    draw: for times, noise and what is left out. progress: the share of the training that is done.
    """
    rows = len(patches)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw).to(patches.device)

    times = torch.sigmoid(0.8 * torch.randn(rows, generator=draw) - 0.8).to(patches.device)
    times[: round(_REGRESSION * rows)] = 0  # of a batch that is in no order
    noise = torch.randn(patches.shape, generator=draw).to(patches.device)
    noisy = times[:, None, None] * patches + (1 - times)[:, None, None] * noise
    values = codec.values(patches, grid)
    others = (random(*values.shape[:2]) * codec.config.codes).long()
    swapped = random(*values.shape[:2])[..., None] < _OTHER_CODES
    values = torch.where(swapped, codec.quantiser.values(others), values)

    deepest = codec.config.max_loops
    early = int(torch.randint(1, max(2, deepest), (), generator=draw))
    coded = random(rows) >= _NO_CODES
    states = codec.detokeniser.states(noisy, times, values, grid, coded)
    read: dict[int, Tensor] = {}
    for loop in range(1, deepest + 1):
        state, ctx = next(states)
        if loop in (early, deepest):
            read[loop] = codec.detokeniser.read(state, ctx)
    weight = (1 - times).clamp(min=_STEEPEST).square().reciprocal()

    def error(predicted: Tensor, target: Tensor) -> Tensor:
        return ((predicted - target).square().mean((1, 2)) * weight).mean()

    loss = error(read[deepest], patches)
    if early < deepest:
        teacher = torch.lerp(patches, read[deepest].detach(), progress)
        loss = loss + error(read[early], teacher)
    return loss


def train_codec(
    codec: Codec,
    items: Tensor,
    settings: TokenizeConfig,
    on_progress: Progress = lambda step, steps, loss: None,
) -> int:
    """Train on items (n, patches, numbers) of bytes; returns the number of steps done.

    Batch, times and noise of a step are functions of the seed and of the step. The codec ends with
    its averaged weights, in evaluation mode, after an interruption too.

    Raises `LooptxError` for a loss that is NaN or infinite.
    """
    began = time.monotonic()
    blocks = [p for name, p in codec.named_parameters() if p.dim() == 2 and is_block(name)]
    optimizer = split_optimizer(
        codec.parameters(), blocks, lr=settings.lr, weight_decay=0.05, beta2=0.95
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    factor = learning_rate_factor(RunConfig(steps=settings.steps, min_lr=0.02))
    averaged = Averaged(list(codec.parameters()))
    device = next(codec.parameters()).device
    order = Order(len(items), settings.batch_size, settings.seed)
    codec.train()
    if device.type == "cpu":
        fused.enable_fused(True)
    done = 0
    try:
        for step in range(settings.steps):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor(step)
            draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            batch = from_bytes(items[order.batch(step)]).to(device)
            loss = codec_loss(codec, batch, codec.grid, draw, step / settings.steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            averaged.update(step)
            value = float(loss.detach())
            done = step + 1
            if not math.isfinite(value):
                raise LooptxError(
                    f"the loss is {value} at step {done}; lower `lr` ({settings.lr:g})"
                )
            on_progress(done, settings.steps, value)
            if settings.max_minutes and time.monotonic() - began > 60 * settings.max_minutes:
                break
    finally:
        fused.enable_fused(False)
        averaged.put_back()
        codec.eval()
    return done


class Order:
    """Which items make batch n: each epoch an order drawn from (seed, epoch)."""

    def __init__(self, count: int, rows: int, seed: int) -> None:
        self.count, self.rows, self.seed = count, rows, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> Tensor:
        """(rows,), the numbers of the items."""
        chosen = []
        for place in range(step * self.rows, (step + 1) * self.rows):
            epoch, number = divmod(place, self.count)
            if epoch != self._epoch:
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(self.count, generator=draw)
            chosen.append(self._order[number])
        return torch.stack(chosen)


def judge_codec(codec: Codec, items: Tensor, seed: int = 0, most: int = 512) -> CodecReport:
    """The report on items (n, patches, numbers) of bytes, of which `most` are judged."""
    some = items[torch.linspace(0, len(items) - 1, min(most, len(items))).long()]
    ways = [(steps, codec.config.max_loops) for steps in (1, 8)]
    ways += [(1, loops) for loops in range(1, codec.config.max_loops)]
    errors: dict[tuple[int, int], list[Tensor]] = {way: [] for way in ways}
    used = []
    device = next(codec.parameters()).device
    for chunk in some.split(_ROWS):
        patches = from_bytes(chunk).to(device)
        codes = codec.encode(patches, codec.grid)
        used.append(codes.flatten())
        for steps, loops in ways:
            found = codec.decode(codes, codec.grid, steps=steps, loops=loops, seed=seed)
            errors[steps, loops].append((found - patches).square().mean((1, 2)))
    psnr = {way: float(decibels(torch.cat(some)).mean()) for way, some in errors.items()}
    deepest, config = codec.config.max_loops, codec.config
    mel_error, parts = {}, 1.0
    if config.kind == "speech":
        from looptx_core.media.audio.coded import DECIBELS, seconds_of

        parts = seconds_of(config.rows, config)
        mel_error = {
            steps: DECIBELS * float(torch.cat(errors[steps, deepest]).mean().sqrt())
            for steps in (1, 8)
        }
    return CodecReport(
        mel_error=mel_error,
        psnr={steps: psnr[steps, deepest] for steps in (1, 8)},
        psnr_by_loop=[psnr[1, loops] for loops in range(1, deepest + 1)],
        codes_used=len(torch.cat(used).unique()) / codec.config.codes,
        bits=math.prod(codec.grid) * codec.config.bits / parts,
        held_out=len(some),
    )


def decibels(squared_error: Tensor) -> Tensor:
    """PSNR of items whose numbers span 2, from their mean squared errors."""
    return 10 * torch.log10(4 / squared_error.clamp(min=1e-12))


def from_bytes(items: Tensor) -> Tensor:
    """Bytes as numbers from -1 to 1."""
    return items.float() / 127.5 - 1
