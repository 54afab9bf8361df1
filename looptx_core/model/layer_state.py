"""What a layer remembers of the tokens it has seen: one object for each layer, for all its loops.

`KVState` holds keys and values, with a slot for each loop. Another kind of memory is another
`LayerState`, as those of `looptx_core.model.memory_state`; a model chooses it in
`LoopedTransformer.new_layer_state`, and the engine, batches and exits need no change.

A token that exits after loop t computes no keys and values for the loops after t, but later tokens
that go deeper attend to them. A KV policy says which slot a loop reads and writes, and what an
exit writes for the deeper loops:

- `fill`: every loop has its own slot; an exit copies its last loop's entries into the deeper
  slots (Huginn, arXiv 2502.05171; AdaPonderLM, arXiv 2603.01914).
- `last`: all loops share one slot, which therefore holds each token's last computed loop; within
  a prompt, which is processed loop by loop, each loop still sees its own entries (Ouro's decoding,
  arXiv 2510.25741).

For the first core layer both policies store the keys and values that loop t+1 would have produced:
they follow from the state alone, as in CALM's state propagation (arXiv 2207.07061). `fill` does so
for loops that the row may still run (`LoopCache.deepest`), `last` up to the model's `max_loops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.model.rounding import KINDS

if TYPE_CHECKING:
    from looptx_core.model.attention import VarlenBatch
    from looptx_core.model.cache import CacheView
    from looptx_core.model.memory import Remembered
    from looptx_core.model.rope import Rotary

POLICIES = ("fill", "last")


@dataclass(frozen=True)
class StateSpec:
    """What a layer's state is made from.

    part: prelude, core or coda. batch: rows. capacity: tokens that a row can hold. loops: the
    deepest loop that will run, 1 outside the core. policy: one of `POLICIES`. kind: how numbers are
    stored, one of `looptx_core.model.rounding.KINDS`. dtype: of the activations.
    """

    config: ModelConfig
    part: str
    batch: int
    capacity: int
    loops: int
    policy: str
    kind: str
    dtype: torch.dtype
    device: torch.device | str
    layer: int = 0
    """Of its part, counted from 0."""


class Attended(NamedTuple):
    """What attention reads: keys and values, (rows, kv_heads, seen, head_dim), and the mask.

    mask: (rows or 1, 1, new, seen), or None as in `looptx_core.model.attention.Attend`.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | VarlenBatch | None


class LayerState(ABC):
    """What one layer remembers, for every row of a batch and all its loops.

    The methods' `view` is the current pass: its rows, its new columns and their positions.
    """

    can_roll_back: bool
    """Whether the last tokens can be removed again, as speculation needs."""
    capacity: int | None
    """Tokens that a row can hold; None if there is no limit."""

    @abstractmethod
    def update(
        self,
        view: CacheView,
        loop: int | Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | VarlenBatch | None,
    ) -> Attended:
        """Write new entries, (rows, kv_heads, new, head_dim), and return what attention reads.

        loop: counted from 1; a tensor, (rows,), gives each row its own. mask: the context's, over
        all columns up to the new ones.
        """

    def remembered(self, view: CacheView, loop: int | Tensor) -> Remembered | None:
        """What the new tokens read besides `update`'s result; None where there is nothing."""
        return None

    def fold(  # noqa: B027
        self, rows: Sequence[int], first: int, rotary: Rotary, deepest: Sequence[int]
    ) -> None:
        """Take in what the next tokens of these rows will overwrite, where the state is a window.

        first: the first slot of a block. rotary: of its columns. deepest: the most loops that each
        of the rows runs.
        """

    @abstractmethod
    def needs_backfill(self, loop: int) -> bool:
        """Whether a token that exits after this loop has to write entries for deeper tokens."""

    @abstractmethod
    def backfill(self, view: CacheView, loop: int, entries: tuple[Tensor, Tensor] | None) -> None:
        """Write what later, deeper tokens will attend to; the view's tokens exit after `loop`.

        entries: the keys and values of the next loop, (rows, kv_heads, new, head_dim), if they are
        known; None if copies of the last loop's must serve.
        """

    @abstractmethod
    def reset_row(self, row: int) -> None:
        """Forget a row's tokens, because another text follows."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, (n,), in this order; a row may appear twice."""

    @abstractmethod
    def roll_back(self, row: int, tokens: int) -> None:
        """Remove a row's last tokens. Only called if `can_roll_back`."""

    @abstractmethod
    def wipe(self) -> None:
        """Return to the state of a new one."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one row takes, over all loops."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are allocated; 0 where a kind of state does not say."""
        return 0


class KVState(LayerState):
    """Keys and values: a slot for each loop under `fill`, one for all loops under `last`.

    `keys` and `values` are (depths, batch, kv_heads, capacity, width of an entry). They have the
    activations' type, or are rounded (`looptx_core.model.rounding`) with their scales in
    `key_scales` and `value_scales`.
    """

    can_roll_back = True

    def __init__(self, spec: StateSpec) -> None:
        if spec.policy not in POLICIES:
            raise UsageError(f"kv_policy {spec.policy}: not one of {', '.join(POLICIES)}")
        if spec.kind not in KINDS:
            raise UsageError(f"kv_type {spec.kind}: not one of {', '.join(KINDS)}")
        config = spec.config
        self.policy, self.kind, self.dtype = spec.policy, KINDS[spec.kind], spec.dtype
        self.depths = spec.loops if spec.policy == "fill" else 1
        self._deepest = spec.loops if spec.policy == "fill" else config.max_loops
        shape = (self.depths, spec.batch, config.n_kv_heads, spec.capacity, config.head_dim)
        self.key_scales: Tensor | None
        self.value_scales: Tensor | None
        self.keys, self.key_scales = self.kind.empty(shape, spec.dtype, spec.device)
        self.values, self.value_scales = self.kind.empty(shape, spec.dtype, spec.device)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.keys.shape[3]

    @property
    def is_plain(self) -> bool:
        """Whether the entries are stored without rounding."""
        return self.kind is KINDS["float"]

    def _parts(self) -> Iterator[Tensor]:
        for part in (self.keys, self.key_scales, self.values, self.value_scales):
            if part is not None:
                yield part

    def slot(self, loop: int | Tensor) -> int | Tensor:
        """The slot of a loop that is counted from 1, or the slots of a tensor of loops."""
        if isinstance(loop, Tensor):
            return loop.clamp(max=self.depths) - 1
        return min(loop, self.depths) - 1

    def update(
        self,
        view: CacheView,
        loop: int | Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | VarlenBatch | None,
    ) -> Attended:
        slot = self.slot(loop)
        keys = self._store(view, slot, self.keys, self.key_scales, keys)
        values = self._store(view, slot, self.values, self.value_scales, values)
        return Attended(keys, values, mask)

    def _store(
        self, view: CacheView, slot: int | Tensor, store: Tensor, scales: Tensor | None, x: Tensor
    ) -> Tensor:
        codes, scale = self.kind.round(x)
        view.write(store, slot, codes)
        if scales is None:
            return self.kind.restore(view.read(store, slot), None, self.dtype)
        view.write(scales, slot, scale)
        return self.kind.restore(view.read(store, slot), view.read(scales, slot), self.dtype)

    def entries(self, slot: Tensor, rows: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Stored keys and values, (rows, kv_heads, columns, head_dim); slot: (rows,), of each."""
        at = slot, rows, slice(None), columns
        keys, values = (
            self.kind.restore(store[at], None if scales is None else scales[at], self.dtype)
            for store, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return keys, values

    def needs_backfill(self, loop: int) -> bool:
        return loop < self._deepest

    def backfill(self, view: CacheView, loop: int, entries: tuple[Tensor, Tensor] | None) -> None:
        if entries is None and self.depths == 1:
            return  # the shared slot holds the last loop's entries already
        stores = (self.keys, self.key_scales), (self.values, self.value_scales)
        deeper = slice(min(loop, self.depths - 1), None)
        for number, parts in enumerate(stores):
            made = (None, None) if entries is None else self.kind.round(entries[number])
            for part, new in zip(parts, made):
                if part is not None:
                    last = view.read_new(part, min(loop, self.depths) - 1) if new is None else new
                    view.write(part, deeper, last)

    def reset_row(self, row: int) -> None:
        """Nothing to do: no query attends to columns that its row has not filled."""

    def select_rows(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        if self.key_scales is not None and self.value_scales is not None:
            self.key_scales = self.key_scales[:, rows]
            self.value_scales = self.value_scales[:, rows]

    def roll_back(self, row: int, tokens: int) -> None:
        """Nothing to do: the columns are written again before any query attends to them."""

    def wipe(self) -> None:
        for part in self._parts():
            part.zero_()

    @property
    def bytes_per_token(self) -> int:
        _, batch, _, capacity, _ = self.keys.shape
        return self.nbytes // (batch * capacity)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts())
