"""The KV cache: one slot per layer and loop, preallocated, with a policy for early exits.

A token that leaves after loop t has no keys and values for the loops after t, which later
tokens that go deeper will look for. A policy says which slot a loop reads and writes, and what
an exit leaves behind:

- `fill`: every loop has its own slot; an exit copies its last loop's entry into the deeper
  slots (Huginn, arXiv 2502.05171; AdaPonderLM, arXiv 2603.01914).
- `last`: all loops share one slot, so that it holds each token's last computed loop; a prompt,
  which is processed loop by loop, still sees its own loop (Ouro's decoding, arXiv 2510.25741).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError

POLICIES = ("fill", "last")


class Slot(NamedTuple):
    """One layer's place in the cache for one loop and some of the rows."""

    cache: LoopCache
    place: int
    rows: Tensor | None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new entries (rows, kv_heads, new, head_dim); return all seen so far."""
        return self.cache.extend(self.place, keys, values, self.rows)


class LoopCache:
    """Keys and values of a batch, aligned at the right: a shorter row starts at a later column.

    `keys` and `values`: (slots, batch, kv_heads, capacity, head_dim). Columns below `length`
    are filled; the forward pass writes the columns after it and `advance` makes them count.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        loops: int,
        *,
        policy: str = "fill",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"--kv-policy {policy}: not one of {', '.join(POLICIES)}")
        self.policy, self.loops = policy, loops
        self._prelude, self._core = config.prelude_layers, config.core_layers
        self._depths = loops if policy == "fill" else 1
        slots = self._prelude + config.coda_layers + self._core * self._depths
        shape = (slots, batch, config.n_kv_heads, capacity, config.head_dim)
        # Zeros, since a masked column still enters 0 * value, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.start = torch.zeros(batch, dtype=torch.long, device=device)
        # Columns minus positions, (batch,): padding has no position, a picture fewer than patches.
        self.shift = self.start
        self.length = 0
        self._new = 0
        self._padded = self._shifted = False

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all slots."""
        slots, _, heads, _, width = self.keys.shape
        return 2 * slots * heads * width * self.keys.element_size()

    def pad_left(self, counts: Tensor) -> None:
        """Say how many columns at the left of each row, (batch,), are padding. Before use."""
        assert self.length == 0, "padding is stated before the first token"
        self.start = self.shift = counts.to(self.start.device)
        self._padded = self._shifted = bool((counts > 0).any())

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` columns, (batch, new); padding stands at 0."""
        columns = torch.arange(self.length, self.length + new, device=self.start.device)
        if not self._shifted:
            return columns[None]
        return (columns[None] - self.shift[:, None]).clamp(min=0)

    def place(self, ends: Tensor) -> None:
        """Say at which position, (batch,), the column after the `new` ones of `mask` stands."""
        self.shift = self.length + self._new - ends.to(self.shift.device)
        self._shifted = bool((self.shift != 0).any())

    def mask(self, new: int) -> Tensor | None:
        """Who may look at whom in the next forward pass; None where the default serves."""
        self._new = new
        if not self._padded and (self.length == 0 or new == 1):
            return None
        columns = torch.arange(self.length + new, device=self.start.device)
        queries = columns[self.length :, None]
        causal = (columns <= queries)[None, None]
        own = (columns == queries)[None, None]  # a padding query looks at itself: no empty row
        return (causal & (columns >= self.start[:, None, None, None])) | own

    def prelude(self, layer: int, rows: Tensor | None = None) -> Slot:
        return Slot(self, layer, rows)

    def core(self, layer: int, loop: int, rows: Tensor | None = None) -> Slot:
        """The slot of a core layer at a loop, counted from 1."""
        return Slot(self, self._core_index(layer, loop), rows)

    def coda(self, layer: int, rows: Tensor | None = None) -> Slot:
        return Slot(self, self._prelude + self._core * self._depths + layer, rows)

    def _core_index(self, layer: int, loop: int) -> int:
        depth = min(loop, self._depths) - 1
        return self._prelude + depth * self._core + layer

    def extend(
        self, index: int, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        stop = self.length + keys.shape[2]
        assert stop <= self.capacity, "the cache is full"
        all_keys, all_values = self.keys[index], self.values[index]
        if rows is None:
            all_keys[:, :, self.length : stop] = keys
            all_values[:, :, self.length : stop] = values
            return all_keys[:, :, :stop], all_values[:, :, :stop]
        all_keys[rows, :, self.length : stop] = keys
        all_values[rows, :, self.length : stop] = values
        return all_keys[rows, :, :stop], all_values[rows, :, :stop]

    def leave(self, rows: Tensor, loop: int) -> None:
        """Rows, (n,), end their current token after `loop`: provide for the deeper slots."""
        if self.policy != "fill" or loop >= self.loops:
            return
        new = slice(self.length, self.length + self._new)
        first, last = self._core_index(0, loop), self._core_index(0, loop + 1)
        for store in (self.keys, self.values):
            for layer in range(self._core):
                deeper = range(last + layer, self._prelude + self._core * self._depths, self._core)
                for index in deeper:
                    store[index, rows, :, new] = store[first + layer, rows, :, new]

    def advance(self, new: int) -> None:
        """Count the `new` columns that the last forward pass wrote."""
        self.length += new

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (n,), only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.start, self.shift = self.start[rows], self.shift[rows]
        self._padded = bool((self.start > 0).any())
        self._shifted = bool((self.shift != 0).any())

    def forget(self, columns: int) -> None:
        """Drop the last columns, so that they can be written again."""
        assert 0 <= columns <= self.length
        self.length -= columns
