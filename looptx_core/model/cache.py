"""The KV cache: one slot per layer and loop, preallocated, with a policy for early exits.

A token that leaves after loop t has no keys and values for the loops after t, which later
tokens that go deeper will look for. A policy says which slot a loop reads and writes, and what
an exit leaves behind:

- `fill`: every loop has its own slot; an exit copies its last loop's entries into the deeper
  slots (Huginn, arXiv 2502.05171; AdaPonderLM, arXiv 2603.01914).
- `last`: all loops share one slot, so that it holds each token's last computed loop; a prompt,
  which is processed loop by loop, still sees its own loop (Ouro's decoding, arXiv 2510.25741).

In the core's first layer both leave not copies but what one more loop would have left: those
entries follow from the state alone, as in CALM's propagation (arXiv 2207.07061).

Each row fills its columns at its own pace, and may be cleared for another text at any time.
A pass works on a `Window`: the next columns of some rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.model.rounding import KINDS

POLICIES = ("fill", "last")


class Slot(NamedTuple):
    """One layer's place in the cache for a window and its loop, or each row's own loop."""

    window: Window
    place: int | Tensor

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new entries (rows, kv_heads, new, head_dim); return all seen so far."""
        return self.window.extend(self.place, keys, values)


class LoopCache:
    """Keys and values of a batch.

    `keys` and `values`: (slots, batch, kv_heads, capacity, width of an entry), of the activations'
    type, or rounded (`kind`: see `looptx_core.model.rounding`) with `scales`. Row r has filled the
    columns below `lengths[r]`; a pass writes the columns after them, and `Window.advance` makes
    them count.
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
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"--kv-policy {policy}: not one of {', '.join(POLICIES)}")
        if kind not in KINDS:
            raise UsageError(f"--kv-type {kind}: not one of {', '.join(KINDS)}")
        self.policy, self.kind, self.loops, self.dtype = policy, KINDS[kind], loops, dtype
        self.prelude, self.core = config.prelude_layers, config.core_layers
        self.trained = config.max_loops
        self.depths = loops if policy == "fill" else 1
        slots = self.prelude + config.coda_layers + self.core * self.depths
        shape = (slots, batch, config.n_kv_heads, capacity, config.head_dim)
        self.key_scales: Tensor | None
        self.value_scales: Tensor | None
        self.keys, self.key_scales = self.kind.empty(shape, dtype, device)
        self.values, self.value_scales = self.kind.empty(shape, dtype, device)
        self.lengths = [0] * batch
        self.start = torch.zeros(batch, dtype=torch.long, device=device)
        # Columns minus positions, (batch,): padding has no position, a picture fewer than patches.
        self.shift = self.start.clone()
        self.padded = self.shifted = False

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def length(self) -> int:
        """Columns that the longest row has filled."""
        return max(self.lengths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all slots."""
        _, batch, _, capacity, _ = self.keys.shape
        return sum(part.nbytes for part in self._parts()) // (batch * capacity)

    def _parts(self) -> Iterator[Tensor]:
        for part in (self.keys, self.key_scales, self.values, self.value_scales):
            if part is not None:
                yield part

    def pad_left(self, counts: Tensor) -> None:
        """Say how many columns at the left of each row, (batch,), are padding. Before use."""
        assert self.length == 0, "padding is stated before the first token"
        self.start = counts.to(self.start.device)
        self.shift = self.start.clone()
        self.padded = self.shifted = bool((counts > 0).any())

    def window(self, new: int, rows: Sequence[int] | None = None) -> Window:
        """The next `new` columns of these rows; None: of all."""
        return Window(self, new, list(range(len(self.lengths))) if rows is None else list(rows))

    def slot(self, layer: int, loop: int | Tensor) -> int | Tensor:
        """The slot of a core layer at a loop, counted from 1; a tensor of loops gives as many."""
        last = self.depths
        depth = loop.clamp(max=last) - 1 if isinstance(loop, Tensor) else min(loop, last) - 1
        return self.prelude + depth * self.core + layer

    def leaves(self, loop: int) -> bool:
        """Whether a token that ends after this loop leaves more than its entries: for deeper slots,
        or, where one slot serves all, as far as the model is trained to go."""
        return loop < (self.loops if self.policy == "fill" else self.trained)

    def wipe(self) -> None:
        """Make all of it as it was when it was new."""
        for part in self._parts():
            part.zero_()
        for row in range(len(self.lengths)):
            self.clear(row)
        self.padded = self.shifted = False

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (n,), only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        if self.key_scales is not None and self.value_scales is not None:
            self.key_scales = self.key_scales[:, rows]
            self.value_scales = self.value_scales[:, rows]
        self.start, self.shift = self.start[rows], self.shift[rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.padded = bool((self.start > 0).any())
        self.shifted = bool((self.shift != 0).any())

    def clear(self, row: int) -> None:
        """Make room for another text. What is left there is never looked at."""
        self.lengths[row] = 0
        self.start[row] = self.shift[row] = 0

    def grow(self, rows: Sequence[int]) -> None:
        """Count the next column of these rows as filled."""
        for row in rows:
            self.lengths[row] += 1

    def forget(self, columns: int, rows: Sequence[int] | None = None) -> None:
        """Drop the last columns of these rows, or of all, so that they can be written again."""
        for row in range(len(self.lengths)) if rows is None else rows:
            assert 0 <= columns <= self.lengths[row]
            self.lengths[row] -= columns


class Window:
    """The columns that one pass fills: `new` of them in each of some rows, after those they have.

    Rows at one column are read and written by slices; else every row has its own place.
    """

    def __init__(self, cache: LoopCache, new: int, rows: list[int]) -> None:
        self.cache, self.new, self.rows = cache, new, rows
        self.first = [cache.lengths[row] for row in rows]
        self.stop = max(self.first) + new
        assert self.stop <= cache.capacity, "the cache is full"
        self._level = len(set(self.first)) == 1
        # A run of rows is a view of the cache, others are copied at each look.
        run = rows == list(range(rows[0], rows[0] + len(rows)))
        self._pick: Any = slice(rows[0], rows[0] + len(rows)) if run else self._index

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.rows, device=self.cache.start.device)

    @cached_property
    def columns(self) -> Tensor:
        """(rows or 1, new)."""
        first = torch.tensor(self.first[:1] if self._level else self.first)
        return (first[:, None] + torch.arange(self.new)).to(self.cache.start.device)

    def positions(self) -> Tensor:
        """RoPE's, (rows or 1, new); padding stands at 0."""
        if not self.cache.shifted:
            return self.columns
        return (self.columns - self.cache.shift[self._pick, None]).clamp(min=0)

    def place(self, ends: Tensor) -> None:
        """Say at which position, (rows,), the column after these stands."""
        self.cache.shift[self._pick] = self.columns[:, -1] + 1 - ends.to(self.cache.shift.device)
        self.cache.shifted = bool((self.cache.shift != 0).any())

    def mask(self) -> Tensor | None:
        """Who may look at whom, (rows or 1, 1, new, stop); None where the default serves."""
        fresh = self.first[0] == 0
        if self._level and not self.cache.padded and (fresh or self.new == 1):
            return None
        columns = torch.arange(self.stop, device=self.columns.device)
        queries = self.columns[:, None, :, None]
        causal = columns <= queries
        if not self.cache.padded:
            return causal
        own = columns == queries  # a padding query looks at itself: no empty row
        return (causal & (columns >= self.cache.start[self._pick, None, None, None])) | own

    def prelude(self, layer: int) -> Slot:
        return Slot(self, layer)

    def core(self, layer: int, loop: int | Tensor) -> Slot:
        """The slot of a core layer at a loop, or at each row's own, (rows,), counted from 1."""
        return Slot(self, self.cache.slot(layer, loop))

    def coda(self, layer: int) -> Slot:
        cache = self.cache
        return Slot(self, cache.prelude + cache.core * cache.depths + layer)

    def extend(self, place: int | Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.cache
        both = (cache.keys, cache.key_scales, keys), (cache.values, cache.value_scales, values)
        read = []
        for store, scales, x in both:
            codes, scale = cache.kind.round(x)
            self._write(store, place, codes)
            seen, their_scales = self._read(store, place), None
            if scales is not None:
                self._write(scales, place, scale)
                their_scales = self._read(scales, place)
            read.append(cache.kind.restore(seen, their_scales, cache.dtype))
        return read[0], read[1]

    def _write(self, store: Tensor, place: int | slice | Tensor, x: Tensor) -> None:
        """x: (rows, kv_heads, new, width); a slice of places gets it everywhere."""
        if self._level:
            rows = self._index if isinstance(place, Tensor) else self._pick
            store[place, rows, :, self.first[0] : self.stop] = x
            return
        if isinstance(place, Tensor):
            place = place[:, None]
        # Indices on both sides of the heads: what they pick comes first, then the heads.
        x = x.transpose(1, 2)
        if isinstance(place, slice):
            x = x[:, :, None]
        store[place, self._index[:, None], :, self.columns] = x

    def _read(self, store: Tensor, place: int | Tensor) -> Tensor:
        rows = self._index if isinstance(place, Tensor) else self._pick
        return store[..., : self.stop, :][place, rows]

    def leave(self, loop: int, keys: Tensor, values: Tensor) -> None:
        """The rows end their current tokens after `loop`: provide for deeper ones of later tokens.

        keys, values: of the core's first layer in the next loop, (rows, kv_heads, new, head_dim).
        """
        cache = self.cache
        end = cache.prelude + cache.core * cache.depths
        both = (cache.keys, cache.key_scales, keys), (cache.values, cache.value_scales, values)
        for store, scales, x in both:
            for part, made in zip((store, scales), cache.kind.round(x)):
                if part is None:
                    continue
                for layer in range(cache.core if cache.depths > 1 else 1):
                    now, then = (cache.slot(layer, each) for each in (loop, loop + 1))
                    assert isinstance(now, int)
                    entry = self._new(part, now) if layer else made
                    self._write(part, slice(then, end, cache.core), entry)

    def _new(self, store: Tensor, place: int) -> Tensor:
        """These columns' entries, (rows, kv_heads, new, width)."""
        if self._level:
            return store[place, self._pick, :, self.first[0] : self.stop]
        return store[place, self._index[:, None], :, self.columns].transpose(1, 2)

    def advance(self, by: int | None = None) -> None:
        """Count the first `by` of these columns, by default all, as filled."""
        for row, first in zip(self.rows, self.first):
            self.cache.lengths[row] = first + (self.new if by is None else by)


class FixedWindow(Window):
    """One new column of a cache of one row, numbered on the device: the same shapes and the same
    memory wherever it stands, as a CUDA graph needs.

    columns: (1, 1), to be set below `stop`, as far as which the row is looked at. It reads, writes
    and leaves; to advance is the cache's other windows'.
    """

    def __init__(self, cache: LoopCache, stop: int) -> None:
        self.cache, self.new, self.rows, self.stop = cache, 1, [0], stop
        self.columns = torch.zeros(1, 1, dtype=torch.long, device=cache.start.device)

    def positions(self) -> Tensor:
        return (self.columns - self.cache.shift[:, None]).clamp(min=0)

    def mask(self) -> Tensor:
        return torch.arange(self.stop, device=self.columns.device) <= self.columns[:, None, :, None]

    def _write(self, store: Tensor, place: int | slice | Tensor, x: Tensor) -> None:
        into = store[place]
        into.index_copy_(into.dim() - 2, self.columns[0], x.expand(*into.shape[:-2], *x.shape[-2:]))

    def _read(self, store: Tensor, place: int | Tensor) -> Tensor:
        return store[place][..., : self.stop, :]

    def _new(self, store: Tensor, place: int) -> Tensor:
        return store[place].index_select(-2, self.columns[0])
