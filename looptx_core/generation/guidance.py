"""Guidance of what is drawn: how much more likely a prompt makes each code.

The logits of a code are u + guidance (c - u), with c after the prompt and u after no prompt
(classifier-free guidance, arXiv 2207.12598, on logits as in arXiv 2306.17806). Training writes
some items to an empty text for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from looptx_core.backends.base import Backend
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import UsageError
from looptx_core.generation.cache_room import fitting_cache
from looptx_core.generation.running_batch import RunningBatch
from looptx_core.model.cache import LoopCache
from looptx_core.stopping.rule import Exit


@dataclass
class Unprompted:
    """The same codes as a request's, written after no prompt, on a cache of its own."""

    backend: Backend
    cache: LoopCache
    prompt: Sequence[int]
    exit: Exit
    prompt_exit: Exit
    done: int = 0
    """How many tokens it has read, its prompt's included."""
    batch: RunningBatch = field(init=False)

    def __post_init__(self) -> None:
        self.batch = RunningBatch(self.backend, self.cache)

    @classmethod
    def of(
        cls,
        backend: Backend,
        prompt: Sequence[int],
        options: GenerationOptions,
        exit: Exit,
        prompt_exit: Exit,
    ) -> Unprompted | None:
        """For a request with these settings; None where they ask for no guidance.

        prompt: the empty one, up to what opens the item; without tokens nothing is asked for.
        Raises `UsageError` for settings that exclude guidance.
        """
        if options.guidance == 1 or not prompt:
            return None
        if options.speculate:
            raise UsageError("`guidance` and `speculate` exclude each other; leave one out")
        room = len(prompt) + options.max_new_tokens
        loops = max(exit.max_loops, prompt_exit.max_loops)
        # Of two rows, one of them idle: the graphs of a single row stay with the prompt's cache.
        cache = fitting_cache(backend.model, 2, room, loops, exit.settings)
        return cls(backend, cache, prompt, exit, prompt_exit)

    def logits(self, written: Sequence[int]) -> Tensor:
        """The logits, (vocab_size,), of what follows these codes; called after each code."""
        if not self.done:
            tokens = torch.tensor([list(self.prompt)], device=self.backend.device)
            output = self.batch.prompt([0], tokens, self.prompt_exit.max_loops).last
            self.done = len(self.prompt)
        while (read := self.done - len(self.prompt)) < len(written):
            self.batch.add([0], [written[read]], [self.exit])
            (output,) = self.batch.run()
            self.done += 1
        return output.logits[0]
