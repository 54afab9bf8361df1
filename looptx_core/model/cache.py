"""The cache of a batch: a `LayerState` for each layer, and how many columns each row has filled.

A row is one text of the batch, a column one token of it. Each row fills its columns at its own
pace, and may be reset for another text at any time. A forward pass works on a `CacheView`: the
next columns of some rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.media.batch import position_axes
from looptx_core.model.attention import VarlenBatch, with_groups
from looptx_core.model.layer_state import POLICIES, Attended, KVState, LayerState, StateSpec
from looptx_core.model.memory import Remembered
from looptx_core.model.rope import rotary_tables

__all__ = ["POLICIES", "CacheView", "FixedCacheView", "LayerView", "LoopCache"]


class LayerView(NamedTuple):
    """One layer's state in one pass, at one loop or at each row's own loop."""

    state: LayerState
    view: CacheView
    loop: int | Tensor

    def update(self, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None) -> Attended:
        """Write the new entries and return what attention reads, see `LayerState.update`."""
        return self.state.update(self.view, self.loop, keys, values, mask)

    def remembered(self) -> Remembered | None:
        """What the new tokens read besides, see `LayerState.remembered`."""
        return self.state.remembered(self.view, self.loop)


class LoopCache:
    """What a model remembers of a batch of texts.

    Row r has filled the columns below `lengths[r]`. A pass writes the columns after them, and
    `CacheView.advance` then counts them as filled. None of its tokens runs more than `deepest[r]`
    loops, by default `loops`: what a row holds depends on its own text and depth alone, and not on
    the rows beside it.

    batch: rows. capacity: columns of a row. loops: the deepest loop that will run. policy, kind,
    new_state: see `looptx_core.model.layer_state`. Raises `UsageError` for an unknown policy or
    number type.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        loops: int,
        *,
        policy: str = "fill",
        kind: str = "float",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        new_state: Callable[[StateSpec], LayerState] = KVState,
    ) -> None:
        def states(part: str, count: int, loops: int) -> list[LayerState]:
            spec = StateSpec(config, part, batch, capacity, loops, policy, kind, dtype, device)
            return [new_state(replace(spec, layer=layer)) for layer in range(count)]

        self.config = config
        self.policy, self.kind, self.loops, self.dtype = policy, kind, loops, dtype
        self.prelude = states("prelude", config.prelude_layers, 1)
        self.core = states("core", config.core_layers, loops)
        self.coda = states("coda", config.coda_layers, 1)
        self.lengths = [0] * batch
        self.deepest = [loops] * batch
        self.start = torch.zeros(batch, dtype=torch.long, device=device)
        # Columns minus positions, (batch,): padding has none, a picture fewer than it has patches.
        self.shift = self.start.clone()
        self.padded = self.shifted = False
        limits = [state.capacity for state in self.layers if state.capacity is not None]
        self.capacity: int | None = min(limits, default=None)
        # Of a model with a memory, the layers' windows are rings of this many columns.
        self.ring = config.memory_window if config.has_memory else None
        axes = position_axes(config) if config.has_memory else 0
        self.positions = torch.zeros(axes, batch, self.ring or 0, dtype=torch.long, device=device)
        self.folder: Callable[[LoopCache, Sequence[int], int], None] | None = None
        """Of a back end that folds by itself, in place of `fold`."""

    @property
    def layers(self) -> list[LayerState]:
        """The states of the prelude, the core and the coda, in this order."""
        return [*self.prelude, *self.core, *self.coda]

    @property
    def length(self) -> int:
        """How many columns the longest row has filled."""
        return max(self.lengths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers and loops."""
        return sum(state.bytes_per_token for state in self.layers)

    @property
    def can_roll_back(self) -> bool:
        """Whether every layer can take back its last tokens."""
        return all(state.can_roll_back for state in self.layers)

    def pad_left(self, counts: Tensor) -> None:
        """Set how many columns at the left of each row, (batch,), are padding. Before first use."""
        assert self.length == 0, "padding is stated before the first token"
        assert self.ring is None, "a memory would take padding for text"
        self.start = counts.to(self.start.device)
        self.shift = self.start.clone()
        self.padded = self.shifted = bool((counts > 0).any())

    def view(self, new: int, rows: Sequence[int] | None = None) -> CacheView:
        """The next `new` columns of these rows, by default of all."""
        return CacheView(self, new, list(range(len(self.lengths))) if rows is None else list(rows))

    def parts(self, columns: int, rows: Sequence[int] | None = None) -> list[slice]:
        """How these rows, all of one length, take so many columns: at once, or by blocks."""
        if self.ring is None:
            return [slice(0, columns)]
        filled = {self.lengths[row] for row in (range(len(self.lengths)) if rows is None else rows)}
        assert len(filled) == 1, "rows enter their blocks together"
        size = self.config.memory_block
        edges = [0, *range(size - filled.pop() % size, columns, size), columns]
        return [slice(first, stop) for first, stop in itertools.pairwise(edges)]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, as they are allocated."""
        return sum(state.nbytes for state in self.layers)

    def has_room(self, columns: int) -> bool:
        """Whether a row can hold this many columns."""
        return self.capacity is None or columns <= self.capacity

    def needs_backfill(self, loop: int, rows: Sequence[int] | None = None) -> bool:
        """Whether a token of these rows that exits after this loop has to write for deeper, later
        tokens."""
        deepest = self.deepest if rows is None else [self.deepest[row] for row in rows]
        # Under `last` the first layer holds the entries of the next loop whatever the row's depth.
        below = self.policy == "last" or loop < max(deepest)
        return below and any(state.needs_backfill(loop) for state in self.core)

    def wipe(self) -> None:
        """Return to the state of a new cache."""
        for state in self.layers:
            state.wipe()
        for row in range(len(self.lengths)):
            self.reset_row(row)
        self.padded = self.shifted = False

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, (n,), in this order."""
        for state in self.layers:
            state.select_rows(rows)
        self.start, self.shift = self.start[rows], self.shift[rows]
        self.positions = self.positions[:, rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.deepest = [self.deepest[row] for row in rows.tolist()]
        self.padded = bool((self.start > 0).any())
        self.shifted = bool((self.shift != 0).any())

    def reset_row(self, row: int) -> None:
        """Empty a row for another text."""
        for state in self.layers:
            state.reset_row(row)
        self.lengths[row], self.deepest[row] = 0, self.loops
        self.start[row] = self.shift[row] = 0

    def advance(self, rows: Sequence[int]) -> None:
        """Count the next column of these rows as filled."""
        self.fill(dict.fromkeys(rows, 1))

    def fill(self, columns: Mapping[int, int]) -> None:
        """Count so many next columns as filled, by row. Blocks that leave the window are folded."""
        for row, count in columns.items():
            self.lengths[row] += count
        if self.ring is None:
            return
        size = self.config.memory_block
        leaving: dict[int, list[int]] = {}
        for row, count in columns.items():
            length = self.lengths[row]
            if count and length % size == 0 and length >= self.ring:
                leaving.setdefault(length % self.ring, []).append(row)
        for first, rows in leaving.items():
            (self.folder or LoopCache.fold)(self, rows, first)

    def fold(self, rows: Sequence[int], first: int) -> None:
        """Take the block of these rows that begins at slot `first` into the core's memories."""
        positions = self.positions[:, rows, first : first + self.config.memory_block]
        width, theta = self.config.head_dim, self.config.rope_theta
        scaling = self.config.scaled_rope
        rotary = rotary_tables(positions, width, theta, self.dtype, scaling, far=True)
        for state in self.core:
            state.fold(rows, first, rotary, [self.deepest[row] for row in rows])

    def truncate(self, columns: int, rows: Sequence[int] | None = None) -> None:
        """Drop the last columns of these rows, or of all, so that they can be written again."""
        if not columns:
            return
        assert self.can_roll_back, "a layer can't take back what it has folded in"
        for row in range(len(self.lengths)) if rows is None else rows:
            assert 0 <= columns <= self.lengths[row]
            self.lengths[row] -= columns
            for state in self.layers:
                state.roll_back(row, columns)


class CacheView:
    """The columns that one pass fills: the next `new` ones of each of some rows.

    Rows of the same length are read and written by slices, others by an index for each row.
    `write`, `read` and `read_new` index a layer's store (depths, batch, heads, columns, width).
    """

    def __init__(self, cache: LoopCache, new: int, rows: list[int]) -> None:
        self.cache, self.new, self.rows = cache, new, rows
        self.first = [cache.lengths[row] for row in rows]
        self.stop = max(self.first) + new
        assert cache.has_room(self.stop), "the cache is full"
        self._level = len(set(self.first)) == 1
        ring = self.ring = cache.ring
        if ring is not None:
            size = cache.config.memory_block
            assert all(first % size + new <= size for first in self.first), "a pass is in one block"
        self.seen = self.stop if ring is None else min(self.stop, ring)
        """Slots of a layer's store that are read."""
        slot = self.first[0] if ring is None else self.first[0] % ring
        self._span = slice(slot, slot + new)
        # Consecutive rows are a view of the cache; others are copied whenever they are read.
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        self._pick: Any = slice(rows[0], rows[0] + len(rows)) if consecutive else self._index

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.rows, device=self.cache.start.device)

    def pick(self, by_index: bool = False) -> Any:
        """What indexes the rows in a tensor of all; by_index: beside an index for each of them."""
        return self._index if by_index else self._pick

    @cached_property
    def slots(self) -> Tensor:
        """Where the new columns stand in a layer's store, (rows or 1, new)."""
        return self.columns if self.ring is None else self.columns % self.ring

    @cached_property
    def columns(self) -> Tensor:
        """Indices of the new columns, (rows or 1, new)."""
        first = torch.tensor(self.first[:1] if self._level else self.first)
        return (first[:, None] + torch.arange(self.new)).to(self.cache.start.device)

    def positions(self) -> Tensor:
        """Positions for RoPE, (rows or 1, new); those of padding are 0."""
        if not self.cache.shifted:
            return self.columns
        return (self.columns - self.cache.shift[self._pick, None]).clamp(min=0)

    def set_positions(self, ends: Tensor) -> None:
        """Set the position, (rows,), of the column that follows the new ones."""
        self.cache.shift[self._pick] = self.columns[:, -1] + 1 - ends.to(self.cache.shift.device)
        self.cache.shifted = bool((self.cache.shift != 0).any())

    def mask(self) -> Tensor | None:
        """True where a query may attend to a key, (rows or 1, 1, new, seen).

        None where plain causal attention is right.
        """
        if self.ring is not None:
            return self._ring_mask(self.ring)
        fresh = self.first[0] == 0
        if self._level and not self.cache.padded and (fresh or self.new == 1):
            return None
        columns = torch.arange(self.stop, device=self.columns.device)
        queries = self.columns[:, None, :, None]
        causal = columns <= queries
        if not self.cache.padded:
            return causal
        own = columns == queries  # padding attends to itself, as softmax needs at least one key
        return (causal & (columns >= self.cache.start[self._pick, None, None, None])) | own

    def _ring_mask(self, ring: int) -> Tensor:
        columns, size = self.columns, self.cache.config.memory_block
        last, slots = columns[:, -1:], torch.arange(self.seen, device=columns.device)
        held = (last - (last - slots) % ring)[:, None, None]  # the column in each slot
        oldest = (columns // size + 1) * size - ring
        queries = columns[:, None, :, None]
        return (held <= queries) & (held >= oldest[:, None, :, None].clamp(min=0))

    def keep_positions(self, positions: Tensor) -> None:
        """Note the new columns' positions, (axes or 1, rows or 1, new), for their folding."""
        if self.ring is not None:
            place = slice(None), self._index[:, None], self.slots
            self.cache.positions[place] = positions.to(self.cache.positions)

    def with_groups(self, mask: Tensor | None, groups: Tensor) -> Tensor:
        """See `looptx_core.model.attention.with_groups`; in a ring, as far as the block goes."""
        if self.ring is None:
            return with_groups(mask, groups)
        assert mask is not None and self._level
        same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, None, :]
        seen = mask.expand(len(groups), -1, -1, -1).clone()
        seen[..., self._span] |= same[:, None]
        return seen

    def prelude(self, layer: int) -> LayerView:
        return LayerView(self.cache.prelude[layer], self, 1)

    def core(self, layer: int, loop: int | Tensor) -> LayerView:
        """A core layer's state at a loop, or at each row's own loop, (rows,), counted from 1."""
        return LayerView(self.cache.core[layer], self, loop)

    def coda(self, layer: int) -> LayerView:
        return LayerView(self.cache.coda[layer], self, 1)

    def backfill(self, loop: int, entries: tuple[Tensor, Tensor]) -> None:
        """Write what later, deeper tokens will attend to; the view's tokens exit after `loop`.

        entries: the keys and values of the first core layer in the next loop, (rows, kv_heads,
        new, head_dim). The other layers copy those of their last loop.
        """
        for layer, state in enumerate(self.cache.core):
            if state.needs_backfill(loop):
                state.backfill(self, loop, None if layer else entries)

    def write(self, store: Tensor, depth: int | slice | Tensor, x: Tensor) -> None:
        """Write x, (rows, heads, new, width), at one depth, at each row's, or at a slice."""
        if self._level:
            rows = self._index if isinstance(depth, Tensor) else self._pick
            store[depth, rows, :, self._span] = x
            return
        if isinstance(depth, Tensor):
            depth = depth[:, None]
        # With indices on both sides of the heads, torch puts the indexed dimensions first.
        x = x.transpose(1, 2)
        if isinstance(depth, slice):
            x = x[:, :, None]
        store[depth, self._index[:, None], :, self.slots] = x

    def read(self, store: Tensor, depth: int | Tensor) -> Tensor:
        """All columns up to the new ones, (rows, heads, seen, width)."""
        return store[..., : self.seen, :][depth, self.pick(isinstance(depth, Tensor))]

    def read_new(self, store: Tensor, depth: int) -> Tensor:
        """The new columns' entries, (rows, heads, new, width)."""
        if self._level:
            return store[depth, self._pick, :, self._span]
        return store[depth, self._index[:, None], :, self.slots].transpose(1, 2)

    def advance(self, by: int | None = None) -> None:
        """Count the first `by` of the new columns, by default all, as filled."""
        assert all(self.cache.lengths[row] == first for row, first in zip(self.rows, self.first))
        self.cache.fill(dict.fromkeys(self.rows, self.new if by is None else by))


class FixedCacheView(CacheView):
    """One new column of a cache with one row, for CUDA graphs.

    The column's index is a tensor, so that shapes and addresses are the same for every column.

    columns: (1, 1), to be set to an index below `stop`; attention reads the columns below `stop`.
    This view does not advance the cache; a `CacheView` does.
    """

    def __init__(self, cache: LoopCache, stop: int) -> None:
        self.cache, self.new, self.rows, self.stop, self.ring = cache, 1, [0], stop, None
        self.columns = torch.zeros(1, 1, dtype=torch.long, device=cache.start.device)

    def positions(self) -> Tensor:
        return (self.columns - self.cache.shift[:, None]).clamp(min=0)

    def mask(self) -> Tensor:
        return torch.arange(self.stop, device=self.columns.device) <= self.columns[:, None, :, None]

    def write(self, store: Tensor, depth: int | slice | Tensor, x: Tensor) -> None:
        into = store[depth]
        into.index_copy_(into.dim() - 2, self.columns[0], x.expand(*into.shape[:-2], *x.shape[-2:]))

    def read(self, store: Tensor, depth: int | Tensor) -> Tensor:
        return store[depth][..., : self.stop, :]

    def read_new(self, store: Tensor, depth: int) -> Tensor:
        return store[depth].index_select(-2, self.columns[0])
