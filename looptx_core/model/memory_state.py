"""What the layers of a model with a memory hold while generating: a window, and in the core more.

The window is a ring: a row's column c stands in slot c modulo `memory_window`
(`looptx_core.model.cache.CacheView`). The block that a new one will overwrite is folded into the
memory as soon as the last column before the new block is filled, by `LoopCache.fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from looptx_core.model.cache import CacheView
from looptx_core.model.layer_state import KVState, StateSpec
from looptx_core.model.memory import LayerMemory, Memory, Remembered, without_rope
from looptx_core.model.rope import Rotary


class WindowState(KVState):
    """Keys and values of the last tokens. What a new token has overwritten can't be taken back."""

    can_roll_back = False
    capacity = None  # type: ignore[assignment]
    bytes_per_token = 0

    def __init__(self, spec: StateSpec) -> None:
        super().__init__(replace(spec, capacity=spec.config.memory_window))


class MemoryState(WindowState):
    """A window of a core layer, and its memory of what came before.

    memory: of all rows, with a dimension before them that has an entry for each slot of the KV
    policy where each loop has its own, else one.
    """

    def __init__(self, spec: StateSpec, part: LayerMemory) -> None:
        super().__init__(spec)
        self.part, self.config = part, spec.config
        count = self.depths if spec.config.memory_per_loop else 1
        self.memory = part.empty(count, spec.batch, dtype=spec.dtype, device=spec.device)

    def remembered(self, view: CacheView, loop: int | Tensor) -> Remembered | None:
        if max(view.first) < self.config.memory_window:
            return None
        slot = self.slot(loop) if self.config.memory_per_loop else 0
        rows = view.pick(isinstance(slot, Tensor))
        memory = Memory(*(part[slot, rows] for part in self.memory))
        return Remembered(memory, (memory.document >= 0)[:, None])

    def fold(self, rows: Sequence[int], first: int, rotary: Rotary, deepest: Sequence[int]) -> None:
        """Take a block of these rows into the memory.

        first: the block's first slot. rotary: of its columns, (rows, block, 1, head_dim). deepest:
        the most loops that each of the rows runs; the slots of deeper ones are not read.
        """
        index = torch.tensor(rows, device=self.keys.device)
        slots = slice(first, first + self.config.memory_block)
        last = self.slot(torch.tensor(deepest, device=index.device))
        assert isinstance(last, Tensor)
        for number in range(len(self.memory.document)):
            depth = last.clamp(max=number) if self.config.memory_per_loop else last
            keys, values = self.entries(depth, index, slots)
            plain = without_rope(keys.transpose(1, 2), rotary).transpose(1, 2)
            before = Memory(*(part[number, index] for part in self.memory))
            for part, new in zip(self.memory, self.part.fold(before, plain, values)):
                part[number, index] = new

    def reset_row(self, row: int) -> None:
        super().reset_row(row)
        self._clear(row)

    def _clear(self, rows: int | slice) -> None:
        for part, empty in zip(self.memory, (0, 0, -1)):
            part[:, rows] = empty

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self.memory = Memory(*(part[:, rows] for part in self.memory))

    def wipe(self) -> None:
        super().wipe()
        self._clear(slice(None))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(part.nbytes for part in self.memory)
