"""A looped diffusion transformer that turns codes into patches.

    e       = prelude(codes + time + noisy patches)
    state 0 = e
    state t = core(inject(state t-1, e))        for t = 1 .. loops
    patches = out(norm(coda(state t)))          for any t

It is the language model's own loop without a causal mask, so what a state means is the same: it
never depends on how many loops follow. It learns flow matching and predicts the clean patches,
since a patch has more numbers than the network is wide (arXiv 2511.13720). The path from noise to
a picture is z(t) = t x + (1 - t) noise. At t = 0 nothing of the picture is in z, so that the
prediction is the mean of all pictures with these codes: one step is a decoder by regression, and
several steps are sharper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.codec import CodecConfig
from looptx_core.config.model import ModelConfig
from looptx_core.media.base import Grid
from looptx_core.model.attention import VarlenBatch
from looptx_core.model.block import Block, ForwardContext
from looptx_core.model.injection import Injection
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_tables

GUIDED_FROM = 0.1
"""The least t at which codes are stressed against none: earlier, it only shifts colours."""
_WAVES = 64  # sines and cosines that describe a time


def block_config(config: CodecConfig) -> ModelConfig:
    """The configuration of a codec's blocks."""
    heads = config.width // config.head_dim
    return ModelConfig(
        d_model=config.width,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=config.head_dim,
        d_ff=3 * config.width,
        prelude_layers=config.prelude_layers,
        core_layers=config.core_layers,
        coda_layers=config.coda_layers,
        max_loops=config.max_loops,
    )


def grid_positions(grid: Grid, device: torch.device) -> Tensor:
    """Row and column of each patch, (2, 1, patches)."""
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 2)
    return places.T[:, None].to(device)


def within(window: int, grid: Grid, device: torch.device) -> Tensor | None:
    """Which patches each one sees, (patches, patches) bool: those at most `window` rows away.

    None: all, for a window of 0.
    """
    if not window:
        return None
    rows = grid_positions(grid, device)[0, 0]
    return (rows[:, None] - rows).abs() <= window


def everywhere(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None
) -> Tensor:
    """Attention both ways; the form is `model.attention.Attend`, but None masks nothing."""
    assert not isinstance(mask, VarlenBatch), "no patch is padding"
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


class Detokeniser(nn.Module):
    """Predicts clean patches from noisy ones and codes, after each of its loops."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        blocks = block_config(config)
        width = config.width
        self.narrow = nn.Linear(config.values, config.bottleneck, bias=False)
        self.enter = nn.Linear(config.bottleneck, width)
        self.code = nn.Sequential(
            nn.Linear(len(config.levels), width), nn.GELU(), nn.Linear(width, width)
        )
        self.no_code = nn.Parameter(torch.zeros(width))
        self.time = nn.Sequential(nn.Linear(_WAVES, width), nn.GELU(), nn.Linear(width, width))
        self.prelude = nn.ModuleList(Block(blocks) for _ in range(config.prelude_layers))
        self.injection = Injection(replace(blocks, injection="decay"))
        self.core = nn.ModuleList(Block(blocks) for _ in range(config.core_layers))
        self.coda = nn.ModuleList(Block(blocks) for _ in range(config.coda_layers))
        self.norm = RMSNorm(width, blocks.norm_eps)
        self.out = nn.Linear(width, config.values)

    def states(
        self, noisy: Tensor, time: Tensor, values: Tensor, grid: Grid, coded: Tensor | None = None
    ) -> Iterator[tuple[Tensor, ForwardContext]]:
        """The state after loop 1, 2, ..., (batch, patches, width), and what `read` needs too.

        noisy: (batch, patches, numbers). time: (batch,), from 0, noise, to 1. values: (batch,
        patches, digits), of the codes. coded: (batch,) bool, False where the codes are left out.
        """
        weight = self.norm.weight
        blocks = self._blocks
        rotary = rotary_tables(
            grid_positions(grid, weight.device), blocks.head_dim, blocks.rope_theta, weight.dtype
        )
        near = within(self.config.window, grid, weight.device)
        mask = None if near is None else near[None, None]
        ctx = ForwardContext(rotary, mask, attend=everywhere)
        codes = self.code(values.to(weight.dtype))
        if coded is not None:
            codes = torch.where(coded[:, None, None], codes, self.no_code.to(codes.dtype))
        x = self.enter(self.narrow(noisy.to(weight.dtype))) + codes
        x = x + self.time(waves(time).to(weight.dtype))[:, None]
        for block in self.prelude:
            x = block(x, ctx)
        state = embedding = x
        loop = 0
        while True:
            loop += 1
            state = self.injection(state, embedding, loop)
            for block in self.core:
                state = block(state, ctx)
            yield state, ctx

    def read(self, state: Tensor, ctx: ForwardContext) -> Tensor:
        """The clean patches that a state predicts, (batch, patches, numbers)."""
        for block in self.coda:
            state = block(state, ctx)
        return self.out(self.norm(state))

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        values: Tensor,
        grid: Grid,
        coded: Tensor | None = None,
        loops: int | None = None,
    ) -> Tensor:
        """The clean patches after so many loops, by default all."""
        states = self.states(noisy, time, values, grid, coded)
        for _ in range(loops or self.config.max_loops):
            state, ctx = next(states)
        return self.read(state, ctx)

    @torch.no_grad()
    def sample(
        self,
        values: Tensor,
        grid: Grid,
        *,
        steps: int = 8,
        guidance: float = 1.0,
        loops: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Patches, (batch, patches, numbers), -1 to 1, by Euler's method in so many steps.

        values: (batch, patches, digits). guidance: how far to go from what is predicted without
        codes, through what is predicted with them; 1: no further. seed: of the noise, which is the
        same for each row.
        """
        device, (batch, patches, _) = values.device, values.shape
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, patches, self.config.values, generator=draw)
        z = noise.to(device).expand(batch, -1, -1)
        for step in range(steps):
            now = step / steps
            time = torch.full((batch,), now, device=device)
            clean = self.predict(z, time, values, grid, loops=loops)
            if guidance != 1 and now >= GUIDED_FROM:
                none = torch.zeros(batch, dtype=torch.bool, device=device)
                without = self.predict(z, time, values, grid, none, loops)
                clean = without + guidance * (clean - without)
            z = z + (clean - z) / (1 - now) / steps  # the last step ends at what is predicted
        return z.float().clamp(-1, 1)

    @property
    def _blocks(self) -> ModelConfig:
        return block_config(self.config)


def waves(time: Tensor) -> Tensor:
    """Times from 0 to 1, (batch,), as sines and cosines, (batch, 64)."""
    steps = torch.arange(_WAVES // 2, device=time.device) / (_WAVES // 2)
    angles = 1000 * time.float()[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.sin(), angles.cos()], -1)
