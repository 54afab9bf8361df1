"""What local layers attend to, see `looptx_core.config.local_attention`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.model.attention import VarlenBatch
from looptx_core.model.block import ForwardContext
from looptx_core.model.rope import rotary_tables


def with_local(
    ctx: ForwardContext, config: ModelConfig, positions: Tensor, length: int
) -> ForwardContext:
    """The context, with that of local layers where the model has some.

    positions: as for `rotary_tables`. length: of the new tokens.
    """
    own = config.local_attention
    if not own.window:
        return ctx
    if ctx.view is None:
        columns, seen = torch.arange(length, device=positions.device)[None], length
    else:
        columns, seen = ctx.view.columns, ctx.view.stop
    mask = within_window(ctx.mask, columns, seen, own.window)
    rotary = rotary_tables(positions, config.head_dim, own.rope_theta, ctx.rotary[0].dtype)
    return replace(ctx, local=replace(ctx, rotary=rotary, mask=mask))


def within_window(
    mask: Tensor | VarlenBatch | None, columns: Tensor, seen: int, window: int
) -> Tensor | VarlenBatch | None:
    """The mask of layers that attend to the last `window` tokens; the mask itself where no query
    sees more.

    columns: (rows or 1, new), of the queries. seen: columns of the keys. mask: as for `Attend`.
    """
    if seen <= window:
        return mask
    if isinstance(mask, VarlenBatch):
        mask = mask.mask()
    behind = columns[:, None, :, None] - torch.arange(seen, device=columns.device)
    return (behind < window) & (behind >= 0 if mask is None else mask)
