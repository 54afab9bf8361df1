"""The model's moves by the compiled kernel, where it can make them; by torch where it can't."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from looptx_core.generation.exits import Exit
from looptx_core.generation.moves import Moves, Place, Ride
from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rounding import KINDS
from looptx_core.native.model import NativeModel, Watch
from looptx_core.native.model import Place as NativePlace

_MOST_TOKENS = 32  # of one pass: with more, torch's products for matrices are faster


class NativeMoves(Moves):
    """What has media, many tokens or a rounded cache goes to torch, with the same results."""

    def __init__(self, model: LoopedTransformer, precision: str = "float32") -> None:
        super().__init__(model)
        self.precision = precision
        self.native = NativeModel(model, precision)
        self._watch: Watch  # of these exits:
        self._watched: Sequence[Exit] = ()

    def at(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Place:
        count = len(cache.lengths) if rows is None else len(rows)
        plain = cache.kind is KINDS["float"] and cache.dtype == torch.float32
        if media or not plain or count * new > _MOST_TOKENS:
            return super().at(cache, rows, new, tokens, media)
        row: list[int] = []
        column: list[int] = []
        for own in range(count) if rows is None else rows:
            assert cache.lengths[own] + new <= cache.capacity, "the cache is full"
            row += [own] * new
            column += range(cache.lengths[own], cache.lengths[own] + new)
        start, position = [0] * len(row), column
        if cache.padded:  # a padding column looks at itself
            starts = cache.start.tolist()
            start = [min(starts[r], c) for r, c in zip(row, column)]
        if cache.shifted:
            shifts = cache.shift.tolist()
            position = [max(c - shifts[r], 0) for r, c in zip(row, column)]
        return NativePlace(cache, row, column, start, position)

    def encode(self, tokens: Tensor, place: Place, media: Media | None = None) -> Tensor:
        if not isinstance(place, NativePlace):
            return super().encode(tokens, place, media)
        return self.native.encode(tokens.flatten(), place).view(*tokens.shape, -1)

    def step(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        further: int = 0,
    ) -> Tensor:
        if not isinstance(place, NativePlace):
            return super().step(state, embedding, loops, place, further)
        flat = state.flatten(0, 1), embedding.flatten(0, 1)
        return self.native.step(*flat, _each(loops, state), place, further).view_as(state)

    def ride(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        exits: Sequence[Exit],
    ) -> Ride:
        if not isinstance(place, NativePlace) or any(own.reads_logits for own in exits):
            return super().ride(state, embedding, loops, place, exits)
        if len(exits) != len(self._watched) or any(map(operator.is_not, exits, self._watched)):
            # Else the same rows go on.
            self._watch, self._watched = _watch(exits), tuple(exits)
        flat = state.flatten(0, 1), embedding.flatten(0, 1)
        after, passes, judged = self.native.ride(*flat, loops, place, self._watch)
        return Ride(after.view_as(state), passes, judged)

    def decode(self, state: Tensor, place: Place, last: bool = False) -> Tensor:
        if not isinstance(place, NativePlace):
            return super().decode(state, place, last)
        logits = self.native.decode(state.flatten(0, 1), place).view(*state.shape[:2], -1)
        return logits[:, -1:] if last else logits

    def draft(self, state: Tensor, place: Place) -> Tensor:
        if not isinstance(place, NativePlace):
            return super().draft(state, place)
        return self._rough.decode(state.flatten(0, 1), place).view(*state.shape[:2], -1)

    @cached_property
    def _rough(self) -> NativeModel:
        """With 8-bit weights: a draft's read-out takes most of its time, from memory."""
        return self.native if self.precision == "int8" else NativeModel(self.model, "int8")

    def leave(self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place) -> None:
        if not isinstance(place, NativePlace):
            super().leave(state, embedding, loops, place)
        else:
            flat = state.flatten(0, 1), embedding.flatten(0, 1)
            self.native.leave(*flat, _each(loops, state), place)

    def judge(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        return self.native.judge(state.flatten(0, 1).contiguous(), _each(loops, state))


def _watch(exits: Sequence[Exit]) -> Watch:
    settings = exits[0].settings  # calibration is the model's, so the same for all
    asked = {name for own in exits for name in own.signals}
    return Watch(
        first=[own.first_look for own in exits],
        last=[own.max_loops for own in exits],
        bounds=[own.bounds() for own in exits],
        asks=("confidence" in asked, "gain" in asked),
        gains=(settings.gain_slope, settings.gain_power, settings.gain_offset),
    )


def _each(loops: Sequence[int], state: Tensor) -> Sequence[int]:
    """The loop of each token of (rows, new, d_model), of one for all or one for each row."""
    rows, new = state.shape[:2]
    spread = list(loops) * (rows // len(loops))
    return spread if new == 1 else [loop for loop in spread for _ in range(new)]
