"""Pictures for the decoder: an encoder of their patches, and where the patches stand.

A picture is a grid of patches. The encoder turns each patch into a vector of the decoder's width,
by blocks of the decoder's own kind with RoPE by row and column and no causal mask. In the
sequence each patch takes the place of one image token (LLaVA, arXiv 2304.08485). A picture whose
corner stands at position p has its patches at (p + row, p + column), and the text after it goes
on at the largest position plus one (M-RoPE, arXiv 2409.12191).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from looptx_core.config.model import ModelConfig
from looptx_core.model.block import Block, Surroundings
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_tables


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, in the order of their image tokens.

    patches: (patches of all pictures, 3 * patch_size ** 2), about -1 to 1, row by row.
    grids: (pictures, 2) integers, rows and columns. hidden: (patches of all pictures,), those that
    the encoder must do without; None for none.
    """

    patches: Tensor
    grids: Tensor
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> Pictures:
        hidden = None if self.hidden is None else self.hidden.to(device)
        return Pictures(self.patches.to(device), self.grids, hidden)


class Picture(NamedTuple):
    """One picture. patches: (rows * columns, 3 * patch_size ** 2), -1 to 1, row by row."""

    patches: Tensor
    rows: int
    columns: int


def together(pictures: list[Picture]) -> Pictures | None:
    """The pictures of a batch; None for none."""
    if not pictures:
        return None
    grids = torch.tensor([[p.rows, p.columns] for p in pictures])
    return Pictures(torch.cat([p.patches for p in pictures]), grids)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand.

    positions: (2, batch, length), row and column. picture: (batch, length), the number of the
    picture that a patch belongs to, -1 for text. ends: (batch,), the position that follows.
    """

    positions: Tensor
    picture: Tensor
    ends: Tensor


class VisionEncoder(nn.Module):
    """Patches to vectors of the decoder's width; all of one picture see each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.vision_width // config.head_dim
        # Its weights stay floats where the decoder's are ternary: it runs once, not per token.
        own = replace(
            config,
            d_model=config.vision_width,
            n_heads=heads,
            n_kv_heads=heads,
            d_ff=3 * config.vision_width,
            linear="float",
        )
        self.config = own
        self.patch = nn.Linear(3 * config.patch_size**2, own.d_model)
        # What stands for a hidden patch.
        self.unknown = nn.Parameter(torch.zeros(own.d_model)) if config.reconstruct else None
        self.blocks = nn.ModuleList(Block(own) for _ in range(config.vision_layers))
        self.norm = RMSNorm(own.d_model, own.norm_eps)
        self.project = nn.Linear(own.d_model, config.d_model, bias=False)

    def forward(self, pictures: Pictures) -> Tensor:
        """-> (patches of all pictures, the decoder's d_model)."""
        grids = pictures.grids.tolist()
        sizes = [rows * columns for rows, columns in grids]
        weight = self.patch.weight
        places = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]
        x = pad_sequence(pictures.patches.to(weight.dtype).split(sizes), batch_first=True)
        positions = pad_sequence([p.view(-1, 2) for p in places], batch_first=True)
        counts = torch.tensor(sizes)[:, None]
        there = (torch.arange(x.shape[1]) < counts).to(weight.device)
        rotary = rotary_tables(
            positions.permute(2, 0, 1).to(weight.device),
            self.config.head_dim,
            self.config.rope_theta,
            weight.dtype,
        )
        # A mask even where nothing is padded: without one attention would be causal.
        around = Surroundings(rotary, there[:, None, None, :].expand(-1, 1, x.shape[1], -1))
        x = self.patch(x)
        if pictures.hidden is not None and self.unknown is not None:
            hidden = pad_sequence(pictures.hidden.split(sizes), batch_first=True)
            x = torch.where(hidden[..., None], self.unknown.to(x.dtype), x)
        for block in self.blocks:
            x = block(x, around)
        return self.project(self.norm(x))[there]


class PatchHead(nn.Module):
    """From the state at a hidden patch's place: its pixels, and the logit of drawing them well."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pixels = nn.Linear(config.d_model, 3 * config.patch_size**2)
        hidden = max(32, config.d_model // 4)
        self.sure = nn.Sequential(
            nn.Linear(config.d_model, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )


def lay_out(
    tokens: Tensor, grids: Tensor, image_token: int, padding: Tensor | None = None
) -> Layout:
    """Positions of a batch's tokens, (batch, length), some of which are image tokens.

    grids: (pictures, 2), in the order of their tokens. padding: (batch,), columns at the left that
    are none. Raises `ValueError` where image tokens and patches do not match.
    """
    is_patch = tokens == image_token
    step = (~is_patch).long()
    if padding is not None:
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        step[columns < padding[:, None].to(tokens.device)] = 0
    sizes = grids.prod(1).tolist()
    places = is_patch.nonzero()
    if len(places) != sum(sizes):
        raise ValueError(f"{len(places)} image tokens for {sum(sizes)} patches")
    offsets = torch.zeros(2, *tokens.shape, dtype=torch.long, device=tokens.device)
    picture = torch.full_like(tokens, -1)
    for number, part in enumerate(places.split(sizes)):
        rows, columns = grids[number].tolist()
        row, first = part[0].tolist()
        here = slice(first, first + len(part))
        if part[-1].tolist() != [row, first + len(part) - 1]:
            raise ValueError(f"the image tokens of picture {number + 1} are not in one run")
        offsets[0, row, here] = torch.arange(rows, device=tokens.device).repeat_interleave(columns)
        offsets[1, row, here] = torch.arange(columns, device=tokens.device).repeat(rows)
        picture[row, here] = number
        step[row, here.stop - 1] = max(rows, columns)
    ends = step.cumsum(1)
    return Layout(ends - step + offsets, picture, ends[:, -1])
