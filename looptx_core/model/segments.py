"""Running whole rows block by block, for models with a memory: training and evaluation.

A cache does the same while generating (`looptx_core.model.memory_state`). This one writes nothing
in place, so that gradients flow through all blocks, and rows that need no more loops are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looptx_core.model.attention import VarlenBatch
from looptx_core.model.block import Block, ForwardContext
from looptx_core.model.layer_state import Attended
from looptx_core.model.memory import Memory, Remembered, without_rope

if TYPE_CHECKING:
    from looptx_core.model.loop import LoopedTransformer, Step

Entries = tuple[Tensor, Tensor]
"""Keys and values of a block, (rows, kv_heads, tokens, head_dim)."""


class SegmentView:
    """The past that one block of whole rows attends to and reads; its own entries are kept.

    window: the entries of the blocks before, oldest first, by layer and loop. memories: by layer,
    and by loop where each has its own, else under loop 0. documents: (rows, tokens) of this block.
    """

    def __init__(
        self,
        window: dict[tuple[int, int], list[Entries]],
        memories: dict[tuple[int, int], Memory],
        per_loop: bool,
        documents: Tensor | None,
    ) -> None:
        self.window, self.memories, self.per_loop = window, memories, per_loop
        self.documents = documents
        self.written: dict[tuple[int, int], Entries] = {}

    def core(self, layer: int, loop: int | Tensor) -> SegmentLayer:
        assert isinstance(loop, int), "whole rows run their loops together"
        return SegmentLayer(self, layer, loop)


class SegmentLayer(NamedTuple):
    """One core layer's past at one loop, with the methods of `LayerView`."""

    view: SegmentView
    layer: int
    loop: int

    def update(self, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None) -> Attended:
        rows = len(keys)
        # Called again where a loop is recomputed in the backward pass, with the same result.
        self.view.written[self.layer, self.loop] = keys, values
        before = self.view.window.get((self.layer, self.loop), [])
        return Attended(
            torch.cat([*(k[:rows] for k, _ in before), keys], 2),
            torch.cat([*(v[:rows] for _, v in before), values], 2),
            mask,
        )

    def remembered(self) -> Remembered | None:
        view = self.view
        memory = view.memories.get((self.layer, self.loop if view.per_loop else 0))
        if memory is None:
            return None
        written = view.written[self.layer, self.loop][0]
        memory = memory.rows(slice(len(written)))
        if view.documents is None:
            return Remembered(memory, (memory.document == 0)[:, None])
        return Remembered(memory, memory.document[:, None] == view.documents[: len(written)])


def iterate_blocks(
    model: LoopedTransformer,
    state: Tensor,
    embedding: Tensor,
    ctx: ForwardContext,
    loops: range,
    step: Step,
    running: Callable[[int], int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`LoopedTransformer.iterate` for whole rows of a model with a memory.

    The loops start at 1, and a memory holds what the last of a row's loops wrote: the state after
    an earlier loop is that of a token whose predecessors ran all of them. The first yield comes
    after all blocks have run.
    """
    if not loops:
        return
    assert loops.start == 1 and isinstance(ctx.mask, Tensor)
    config, length = model.config, state.shape[1]
    size, held = config.memory_block, config.memory_window // config.memory_block
    counts = {loop: running(loop) if running else len(state) for loop in loops}
    window: dict[tuple[int, int], list[Entries]] = {}
    memories: dict[tuple[int, int], Memory] = {}
    outputs: dict[int, list[Tensor]] = {loop: [] for loop in loops}
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(0, start - (held - 1) * size)
        cut = slice(start, stop)
        documents = None if ctx.documents is None else ctx.documents[:, cut]
        view = SegmentView(window, memories, config.memory_per_loop, documents)
        own = replace(
            ctx, rotary=_columns(ctx.rotary, cut), mask=ctx.mask[..., cut, first:stop],
            documents=documents,
        )  # fmt: skip
        x, e = state[:, cut], embedding[:, cut]
        for loop in loops:
            rows = slice(max(counts[loop], 1))
            x, e, own = x[rows], e[rows], own.rows(rows)
            x = step(x, e, loop, replace(own, segment=view))
            outputs[loop].append(x)
        # New containers, as a recomputed block reads the old ones.
        window = {key: [*window.get(key, []), new] for key, new in view.written.items()}
        if start >= (held - 1) * size and stop < length:
            leaves = start - (held - 1) * size
            left = slice(leaves, leaves + size)
            memories = _fold(model, window, memories, ctx, left, counts)
            window = {key: blocks[1:] for key, blocks in window.items()}
    for loop in loops:
        yield loop, torch.cat(outputs[loop], 1)


def _fold(
    model: LoopedTransformer,
    window: dict[tuple[int, int], list[Entries]],
    memories: dict[tuple[int, int], Memory],
    ctx: ForwardContext,
    columns: slice,
    counts: dict[int, int],
) -> dict[tuple[int, int], Memory]:
    """The memories after the oldest block of the window, whose columns these are."""
    folded = {}
    rotary = _columns(ctx.rotary, columns)
    for layer, block in enumerate(model.core):
        assert isinstance(block, Block) and block.attention.memory is not None
        part = block.attention.memory
        if model.config.memory_per_loop:
            entries = {loop: window[layer, loop][0] for loop in counts}
        else:
            entries = {0: _deepest({loop: window[layer, loop][0] for loop in counts}, counts)}
        for loop, (keys, values) in entries.items():
            rows = slice(len(keys))
            turned = tuple(table if len(table) == 1 else table[rows] for table in rotary)
            plain = without_rope(keys.transpose(1, 2), (turned[0], turned[1])).transpose(1, 2)
            before = memories.get((layer, loop))
            if before is None:
                before = part.empty(len(keys), dtype=keys.dtype, device=keys.device)
            documents = None if ctx.documents is None else ctx.documents[rows, columns]
            folded[layer, loop] = part.fold(before, plain, values, documents)
    return folded


def _deepest(entries: dict[int, Entries], counts: dict[int, int]) -> Entries:
    """Each row's entries at its own last loop. Rows are sorted, the deepest first.

    counts: of rows by loop; 0 where a row runs on for other ranks alone, which it has to ignore.
    """
    parts: list[Entries] = []
    have = 0
    for loop in sorted(entries, reverse=True):
        if counts[loop] > have:
            keys, values = entries[loop]
            parts.append((keys[have:], values[have:]))
            have = counts[loop]
    return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])


def _columns(rotary: tuple[Tensor, Tensor], columns: slice) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return cos[:, columns], sin[:, columns]
