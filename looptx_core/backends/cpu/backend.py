"""The model by the compiled kernel, and by torch for what the kernel does not support."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from looptx_core.backends.base import Backend, LoopResult, Pass
from looptx_core.backends.cpu.bindings import KernelModel
from looptx_core.backends.cpu.rounding import RoundedPass
from looptx_core.backends.cpu.structs import KernelCache, KernelRows, StopCondition
from looptx_core.backends.torch_backend import TorchPass
from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import Exit, HeadOutput

_MAX_TOKENS = 32  # of one pass: with more, torch's products for matrices are faster


class CpuBackend(Backend):
    """Passes with media, many tokens or a rounded cache go to torch, with the same results."""

    name = "native"

    def __init__(self, model: LoopedTransformer, precision: str = "float32") -> None:
        super().__init__(model)
        self.precision = precision
        self.kernel = KernelModel(model, precision)
        self._cache: KernelCache | None = None
        self._stop: StopCondition  # for these exits:
        self._exits: Sequence[Exit] = ()

    def begin(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Pass:
        count = len(cache.lengths) if rows is None else len(rows)
        known = not media and count * new <= _MAX_TOKENS
        kernel_cache = self._describe(cache) if known else None
        block = None if cache.ring is None else cache.config.memory_block
        if block is not None:
            cache.folder = self._fold
        if kernel_cache is None:
            # By a row's own tokens, as what it gets must not depend on how many rows there are.
            many = not media and new > _MAX_TOKENS
            kind = RoundedPass if many and self.precision != "float32" else TorchPass
            return kind.of(self.model, cache, rows, new, tokens, media)
        row: list[int] = []
        column: list[int] = []
        for own in range(count) if rows is None else rows:
            assert cache.has_room(cache.lengths[own] + new), "the cache is full"
            assert block is None or cache.lengths[own] % block + new <= block, "one block a pass"
            row += [own] * new
            column += range(cache.lengths[own], cache.lengths[own] + new)
        start, position = [0] * len(row), column
        if cache.padded:  # a padding column attends to itself
            starts = cache.start.tolist()
            start = [min(starts[r], c) for r, c in zip(row, column)]
        if cache.shifted:
            shifts = cache.shift.tolist()
            position = [max(c - shifts[r], 0) for r, c in zip(row, column)]
        return CpuPass(self, KernelRows(kernel_cache, row, column, start, position))

    def _describe(self, cache: LoopCache) -> KernelCache | None:
        """The cache as the kernel's struct; None if the kernel can't read it."""
        if self._cache is None or not self._cache.is_of(cache):
            self._cache = KernelCache.of(cache)
        return self._cache

    def _fold(self, cache: LoopCache, rows: Sequence[int], first: int) -> None:
        """`LoopCache.folder`."""
        kernel_cache = self._describe(cache)
        if kernel_cache is None:
            cache.fold(rows, first)
        else:
            self.kernel.fold(kernel_cache, rows, first, [cache.deepest[row] for row in rows])

    def stop_condition(self, exits: Sequence[Exit]) -> StopCondition:
        """When the kernel has to return to Python; kept while the same rows go on."""
        if len(exits) != len(self._exits) or any(map(operator.is_not, exits, self._exits)):
            self._stop, self._exits = _stop_condition(exits), tuple(exits)
        return self._stop

    @cached_property
    def draft_kernel(self) -> KernelModel:
        """A kernel with int8 weights: reading the head's weights dominates a draft's time."""
        held = "int8" in (self.precision, self.model.config.linear)
        return self.kernel if held else KernelModel(self.model, "int8")


class CpuPass(Pass):
    """See `Pass`; the kernel has one row for each token."""

    def __init__(self, backend: CpuBackend, rows: KernelRows) -> None:
        self.backend, self.kernel, self.rows = backend, backend.kernel, rows

    def embed(self, tokens: Tensor) -> Tensor:
        return self.kernel.embed(tokens.flatten(), self.rows).view(*tokens.shape, -1)

    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        flat = state.flatten(0, 1), embedding.flatten(0, 1)
        return self.kernel.iterate(*flat, _each(loops, state), self.rows, count).view_as(state)

    def until_exit(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], exits: Sequence[Exit]
    ) -> LoopResult:
        if any(own.reads_logits for own in exits):
            return super().until_exit(state, embedding, loops, exits)
        flat = state.flatten(0, 1), embedding.flatten(0, 1)
        stop = self.backend.stop_condition(exits)
        after, count, outputs = self.kernel.until_exit(*flat, loops, self.rows, stop)
        return LoopResult(after.view_as(state), count, [HeadOutput(*each) for each in outputs])

    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        logits = self.kernel.logits(state.flatten(0, 1), self.rows).view(*state.shape[:2], -1)
        return logits[:, -1:] if last else logits

    def draft_logits(self, state: Tensor) -> Tensor:
        kernel = self.backend.draft_kernel
        return kernel.logits(state.flatten(0, 1), self.rows).view(*state.shape[:2], -1)

    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        return self.kernel.confidence(state.flatten(0, 1).contiguous(), _each(loops, state))

    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        flat = state.flatten(0, 1), embedding.flatten(0, 1)
        self.kernel.backfill(*flat, _each(loops, state), self.rows)


def _stop_condition(exits: Sequence[Exit]) -> StopCondition:
    settings = exits[0].settings  # calibration is the model's, so the same for all
    asked = {name for own in exits for name in own.signals}
    return StopCondition(
        first=[own.first_check for own in exits],
        last=[own.max_loops for own in exits],
        thresholds=[own.kernel_thresholds() for own in exits],
        asks=("confidence" in asked, "gain" in asked),
        gains=(settings.gain_slope, settings.gain_power, settings.gain_offset),
    )


def _each(loops: Sequence[int], state: Tensor) -> Sequence[int]:
    """The loop of each token of `state`, (rows, new, d_model); loops: one for all or each row's."""
    rows, new = state.shape[:2]
    spread = list(loops) * (rows // len(loops))
    return spread if new == 1 else [loop for loop in spread for _ in range(new)]
