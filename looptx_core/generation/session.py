"""A text that is read piece by piece, and continued at any time without what that adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import UsageError
from looptx_core.generation.cache_room import fitting_cache
from looptx_core.generation.engine import Engine, evaluation_mode
from looptx_core.generation.request import Generation, Step, next_tokens
from looptx_core.generation.running_batch import RunningBatch, StepOutput
from looptx_core.media.batch import MediaItem, batch_items, to_device


class Session:
    """One row of a cache, which grows by `read`; `answer` leaves it as it was.

    columns: the tokens that it can hold. options: of the depth at which it reads; those of an
    answer may differ in all but `kv_policy` and `kv_type`, and go no deeper.

    Raises `UsageError` for settings out of range, more columns and loops than the memory holds, and
    a model whose layers can't take back what they remember.
    """

    def __init__(self, engine: Engine, columns: int, options: GenerationOptions) -> None:
        self.engine, self.columns, self.options = engine, columns, options
        self.ids: list[int] = []
        """What was read."""
        request = engine.request(0, [engine.end], options)
        self.loops = request.prompt_exit.max_loops
        settings = request.exit.settings
        loops = max(self.loops, request.exit.max_loops)
        self.cache = fitting_cache(engine.model, 1, columns, loops, settings)
        if not self.cache.can_roll_back:
            raise UsageError(
                "this model's layers can't take back what they remember, so no answer can be "
                "forgotten; give each question its whole prompt"
            )

    @property
    def room(self) -> int:
        """The tokens that can still be read or written."""
        return self.columns - len(self.ids)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], items: Sequence[MediaItem] = ()) -> None:
        """Go on by these tokens, and the items of their placeholders.

        Raises `UsageError` where too little room is left.
        """
        if len(ids) > self.room:
            raise UsageError(
                f"{len(ids)} tokens to read, and there is room for {self.room} more; clear it, "
                "or make one with more columns"
            )
        with evaluation_mode(self.engine.model):
            self._pass(ids, items)
        self.ids.extend(ids)

    @torch.inference_mode()
    def answer(
        self, ids: Sequence[int], items: Sequence[MediaItem] = (), **options: object
    ) -> Generation:
        """What follows these tokens, at least one, after what was read. options: changes of the
        session's own. Raises `UsageError` where too little room is left."""
        if len(ids) >= self.room:
            raise UsageError(
                f"{len(ids)} tokens to answer, and there is room for {self.room} more, the answer "
                "included; ask less"
            )
        own = replace(self.options, **options)  # type: ignore[arg-type]
        own = replace(own, max_new_tokens=min(own.max_new_tokens, self.room - len(ids)))
        request = self.engine.request(0, [*self.ids, *ids], own, is_read=True)
        settings = request.exit.settings
        if request.exit.max_loops > self.cache.loops or (
            (settings.kv_policy, settings.kv_type) != (self.cache.policy, self.cache.kind)
        ):
            raise UsageError("an answer goes no deeper than its session, and shares its cache")
        length, shift = self.cache.length, self.cache.shift.clone()
        try:
            with evaluation_mode(self.engine.model):
                output = self._pass(ids, items)
                steps: list[Step] = next_tokens([request], output)
                batch = RunningBatch(self.engine.backend, self.cache, self.engine.counters)
                while steps[-1].finish_reason is None:
                    batch.add([0], [steps[-1].id], [request.exit])
                    (found,) = batch.run()
                    steps += next_tokens([request], found)
        finally:
            self.cache.truncate(self.cache.length - length)
            self.cache.shift = shift
            self.cache.shifted = bool((shift != 0).any())
        return self.engine.generation(
            self.engine.text_of(ids), len(self.ids) + len(ids), own, steps
        )

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget everything."""
        self.ids = []
        self.cache.wipe()

    def _pass(self, ids: Sequence[int], items: Sequence[MediaItem]) -> StepOutput:
        """Run them through the model; returns what the last one predicts."""
        device = self.engine.backend.device
        batch = RunningBatch(self.engine.backend, self.cache, self.engine.counters)
        tokens = torch.tensor([list(ids)], device=device)
        media = to_device(batch_items(items), device)
        return batch.prompt([0], tokens, self.loops, media).last
