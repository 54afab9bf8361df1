"""Log-likelihoods and continuations at a depth: fixed, or by each token's own exit.

A fixed depth is scored by passes over whole lines. With `auto` the tokens are decoded one by one,
with the model's exits and with the cache that they leave: the prompt runs in full but for its last
token, which predicts the first token that counts, and so stops by the rule like the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from looptx_core.config.evaluation import Depth
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import DataError
from looptx_core.generation.engine import Engine, Generation, TextScores
from looptx_core.generation.sampling import check_number
from looptx_core.model.flops import token_flops
from looptx_core.stopping.resolve import resolve_exit

_MOST_LOGITS = 1 << 25  # numbers at once, 128 MiB of them


@dataclass(frozen=True)
class Line:
    """Token ids, and the places among them that count, from 1 on, in increasing order."""

    tokens: Sequence[int]
    counted: Sequence[int]


class Scorer:
    """Scores and continues texts with one model at one depth, and counts what that takes."""

    def __init__(
        self, engine: Engine, depth: Depth, options: GenerationOptions, batch_size: int
    ) -> None:
        self.engine, self.depth, self.batch_size = engine, depth, batch_size
        self.options = replace(options, loops=depth, temperature=0.0)
        self.exit = resolve_exit(engine.exit_settings, self.options, engine.model.config)
        self.cut = 0
        self.reset()

    def reset(self) -> None:
        """Count loops and contexts anew."""
        self._loops = self._context = self._tokens = 0

    @property
    def mean_loops(self) -> float:
        """Of the tokens that counted, since `reset`."""
        return self._loops / self._tokens

    @property
    def flops_per_token(self) -> float:
        """Forward, of a token that counted, at its depth: heads and exit checks included."""
        cost = token_flops(self.engine.model.config, self._context / self._tokens)
        return cost.at(self.mean_loops, *self.exit.passes(self.mean_loops))

    # -- texts to tokens

    def encode(self, text: str) -> list[int]:
        """Ids without what begins a text."""
        return list(self.engine.tokenizer.encode(text, add_special_tokens=False).ids)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, which are never none, and of its continuation.

        As lm-eval cuts them: whitespace at the end of the context belongs to the continuation, and
        the two are encoded as one text.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before = [*self.engine.opening, *self.encode(kept)]
        whole = [*self.engine.opening, *self.encode(kept + continuation)]
        after = whole[len(before) :]
        return before or [self.engine.end], after

    def line(self, context: Sequence[int], continuation: Sequence[int]) -> Line:
        """A line whose continuation counts, without what the model's context has no room for."""
        tokens = [*context, *continuation]
        most = self.engine.model.config.max_seq_len
        first = len(tokens) - len(continuation)
        if (over := len(tokens) - most) > 0:
            self.cut += 1
            tokens, first = tokens[over:], max(1, first - over)
        return Line(tokens, range(first, len(tokens)))

    def windows(self, text: str) -> list[Line]:
        """All of a text, in lines of the model's context, each token counted once.

        Each line begins with the token before its first one, or with the one that begins a text;
        the last has as much before it as there is room for, as lm-eval's windows have.
        """
        begin = self.engine.opening or [self.engine.end]
        tokens = [*begin, *self.encode(text)]
        most = self.engine.model.config.max_seq_len - 1
        found = []
        for start in range(len(begin), len(tokens), most):
            stop = min(start + most, len(tokens))
            left = max(0, stop - most - 1)
            found.append(Line(tokens[left:stop], range(start - left, stop - left)))
        return found

    # -- tokens to figures

    def score(self, lines: Sequence[Line]) -> list[TextScores]:
        """The counted tokens of each line, in order: log-probability, whether it is the most likely
        token, and the depth that predicted it.

        Raises `DataError` for a model whose logits are no numbers.
        """
        if not lines:
            return []
        found = self._decoded(lines) if self.depth == "auto" else self._passes(lines)
        for line, scores in zip(lines, found):
            check_number(sum(scores.logprobs))
            self._count(scores.loops, line.counted)
        return found

    def complete(self, prompts: Sequence[str], most: int, stop: Sequence[str]) -> list[Generation]:
        """Continue prompts greedily, by at most so many tokens."""
        options = replace(self.options, max_new_tokens=most, stop=tuple(stop))
        room = self.engine.model.config.max_seq_len - most
        if room < 1:
            raise DataError(f"answers of {most} tokens leave no room for a prompt in the context")
        given = [[*self.engine.opening, *self.encode(prompt)] for prompt in prompts]
        self.cut += sum(len(ids) > room for ids in given)
        made = self.engine.complete([ids[-room:] for ids in given], options)
        for one in made:
            self._count([step.loops for step in one.tokens], count(one.prompt_tokens))
        return made

    def _count(self, loops: Sequence[int], places: Sequence[int] | Iterator[int]) -> None:
        self._loops += sum(loops)
        self._context += sum(place for place, _ in zip(places, loops))
        self._tokens += len(loops)

    def _decoded(self, lines: Sequence[Line]) -> list[TextScores]:
        prompts = [max(1, line.counted[0] - 1) for line in lines]
        decoded = self.engine.score_texts([line.tokens for line in lines], prompts, self.options)
        found = []
        for line, prompt, scores in zip(lines, prompts, decoded):
            kept = [place - prompt for place in line.counted]
            found.append(
                TextScores(
                    [scores.logprobs[i] for i in kept],
                    [scores.hits[i] for i in kept],
                    [scores.loops[i] for i in kept],
                )
            )
        return found

    @torch.inference_mode()
    def _passes(self, lines: Sequence[Line]) -> list[TextScores]:
        assert self.depth != "auto"
        found: list[TextScores | None] = [None] * len(lines)
        for rows in self._batches(lines):
            longest = max(len(lines[row].tokens) for row in rows)
            tokens = torch.zeros(len(rows), longest, dtype=torch.long)
            counted = torch.zeros(len(rows), longest, dtype=torch.bool)
            for place, row in enumerate(rows):
                ids = torch.tensor(lines[row].tokens)
                tokens[place, : len(ids)] = ids
                counted[place, list(lines[row].counted)] = True
            logs = self._log_probabilities(tokens[:, :-1], counted[:, 1:])
            targets = tokens[counted].to(logs.device)
            known = self.engine.known
            hits = (logs[:, :known].argmax(-1) == targets).tolist()
            chosen = logs.gather(1, targets[:, None])[:, 0].tolist()
            start = 0
            for row in rows:
                own = slice(start, start := start + len(lines[row].counted))
                depths = [self.depth] * len(chosen[own])
                found[row] = TextScores(chosen[own], hits[own], depths)
        return [scores for scores in found if scores is not None]

    def _batches(self, lines: Sequence[Line]) -> Iterator[list[int]]:
        """Rows of like length, as many as the batch and the memory for their logits hold."""
        most = max(1, _MOST_LOGITS // self.engine.model.config.vocab_size)
        batch: list[int] = []
        places = 0
        for row in sorted(range(len(lines)), key=lambda row: len(lines[row].tokens)):
            own = len(lines[row].counted)
            if batch and (len(batch) == self.batch_size or places + own > most):
                yield batch
                batch, places = [], 0
            batch.append(row)
            places += own
        yield batch

    def _log_probabilities(self, inputs: Tensor, counted: Tensor) -> Tensor:
        """(counted, vocab_size), from ids and what counts, both (rows, length)."""
        model = self.engine.model
        device = model.norm.weight.device
        inputs, ctx = inputs.to(device), model.context(inputs.shape[1])
        state = embedding = model.embed(inputs, ctx)
        for _, after in model.iterate(embedding, embedding, ctx, range(1, int(self.depth) + 1)):
            state = after
        hidden = model.coda_hidden(state, ctx)[counted.to(device)]
        return model.head(hidden).float().log_softmax(-1)
