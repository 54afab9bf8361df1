"""The engine: prompts in, a record for each token out.

    for step in Engine(model, tokenizer, exit_settings).generate(["Call me"]):
        print(step.text, step.loops, step.confidence)

A token's record tells of the position that predicted it: how many loops ran there, and how sure
the confidence head was. The prompt runs at full depth; then each new position loops until its
request's exit lets it go, while the rows of a batch that left stay out of the core.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.data.pictures import Picture, check_markers, together
from looptx_core.data.tokenizer import IMAGE, end_id
from looptx_core.errors import UsageError
from looptx_core.generation.exits import (
    Exit,
    Readout,
    calibrated,
    fixed_exit,
    leaving,
    resolve_exit,
)
from looptx_core.generation.sampling import check, draw
from looptx_core.generation.text import TextStream
from looptx_core.model.block import Surroundings
from looptx_core.model.cache import POLICIES, LoopCache
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.vision import Pictures


@dataclass(frozen=True)
class PicturePrompt:
    """A text with pictures: one for each `<|image|>` in it, or all before it where it has none."""

    text: str
    pictures: tuple[Picture, ...]


Prompt = str | Sequence[int] | PicturePrompt


class Step(NamedTuple):
    """One generated token."""

    request: int
    """Index of the prompt that it continues."""
    id: int
    text: str
    """The text that it makes certain; '' within a character or a possible stop string."""
    loops: int
    """The depth at the position that predicted it."""
    confidence: float
    """The calibrated probability, there, that the top-1 token is right."""
    logprob: float
    """The model's own, at temperature 1 and before any filter, in nats."""
    seconds: float
    """Since its batch began, prompt included."""
    finish_reason: str | None = None
    """With a request's last token: length, stop (a stop string) or end (the document's)."""


@dataclass(frozen=True)
class Generation:
    """A finished request."""

    prompt: str
    text: str
    tokens: list[Step]
    prompt_tokens: int
    finish_reason: str
    exit: Exit
    model: str

    @property
    def mean_loops(self) -> float:
        return sum(step.loops for step in self.tokens) / len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Of this request, the prompt's time included."""
        return len(self.tokens) / self.tokens[-1].seconds

    def to_dict(self) -> dict[str, Any]:
        """The document that `looptx generate --json` prints for a prompt."""
        shown = ("id", "text", "loops", "confidence", "logprob")
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": [{name: getattr(step, name) for name in shown} for step in self.tokens],
            "mean_loops": self.mean_loops,
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "exit": self.exit.describe(),
            "model": self.model,
        }


class Followed(NamedTuple):
    """Given texts, walked as if they were being generated."""

    loss: Tensor
    """Nats, (batch, tokens after the prompt)."""
    loops: Tensor
    """The depth that predicted each of them, of the same shape."""
    seconds: float
    """Without the prompt's pass."""
    bytes_per_token: int
    """Of the cache, for one row."""


@dataclass
class _Request:
    """A prompt on its way: its settings, its own random generator, what it has seen."""

    index: int
    options: GenerationOptions
    exit: Exit
    prompt_exit: Exit
    text: TextStream
    generator: torch.Generator
    seen: list[int]
    limit: int
    """Tokens to stop at, prompt included."""
    pictures: tuple[Picture, ...] = ()


class _Prediction(NamedTuple):
    """After a pass, of each row's last position."""

    logits: Tensor  # (batch, vocab_size)
    loops: list[int]
    confidence: Tensor  # (batch,)


class Engine:
    """Generates with one model; `exit_settings` are the model's own, stored beside it.

    Puts the model into evaluation mode and joins its projections. `batch_size`: the most
    prompts that run at once.
    """

    def __init__(
        self,
        model: LoopedTransformer,
        tokenizer: Tokenizer,
        exit_settings: ExitSettings | None = None,
        *,
        name: str = "model",
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        model.join()
        self.exit_settings = exit_settings or ExitSettings()
        self.batch_size = batch_size
        self.end = end_id(tokenizer)
        # A model may have more rows than there are tokens, to fill up to a round number.
        self._known = tokenizer.get_vocab_size()

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    ) -> Iterator[Step]:
        """Continue prompts, given as texts or as token ids; yields tokens as they are drawn.

        options: one for all, or one for each prompt. Tokens of different requests interleave.
        Raises `UsageError`, at the call, for settings that can't be followed and for a prompt
        that leaves no room in the model's context.
        """
        each = _for_each(prompts, options)
        return self._generate([self._request(i, *pair) for i, pair in enumerate(each)])

    def complete(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        watch: Callable[[Step], object] | None = None,
    ) -> list[Generation]:
        """`generate`, collected by request; `watch` sees each token at once."""
        tokens: list[list[Step]] = [[] for _ in prompts]
        for step in self.generate(prompts, options):
            tokens[step.request].append(step)
            if watch:
                watch(step)
        return [
            Generation(
                prompt=self.text_of(prompt),
                text="".join(step.text for step in steps),
                tokens=steps,
                prompt_tokens=len(self._encode(prompt)),
                finish_reason=steps[-1].finish_reason or "length",
                exit=resolve_exit(self.exit_settings, option, self.model.config),
                model=self.name,
            )
            for (prompt, option), steps in zip(_for_each(prompts, options), tokens)
        ]

    @torch.inference_mode()
    def follow(self, tokens: Tensor, prompt: int, options: GenerationOptions) -> Followed:
        """What real decoding would have made of these texts: exits, and a cache that shows them.

        tokens: (batch, length) ids; the first `prompt` columns are the prompt. Only the options
        of depth count.
        """
        own = resolve_exit(self.exit_settings, options, self.model.config)
        exits = [own] * len(tokens)
        cache = self._cache(len(tokens), tokens.shape[1], own.max_loops, own.settings.kv_policy)
        first = fixed_exit(options.prompt_loops or own.max_loops, own.settings)
        found = self._pass(tokens[:, :prompt], [first] * len(tokens), cache)
        cache.advance(prompt)
        losses, loops = [], []
        began = time.perf_counter()
        for column in range(prompt, tokens.shape[1]):
            losses.append(F.cross_entropy(found.logits, tokens[:, column], reduction="none"))
            loops.append(torch.tensor(found.loops))
            if column + 1 < tokens.shape[1]:
                found = self._pass(tokens[:, column : column + 1], exits, cache)
                cache.advance(1)
        return Followed(
            torch.stack(losses, 1),
            torch.stack(loops, 1),
            time.perf_counter() - began,
            cache.bytes_per_token,
        )

    def _cache(self, batch: int, capacity: int, loops: int, policy: str) -> LoopCache:
        weight = self.model.embedding.weight
        return LoopCache(
            self.model.config,
            batch=batch,
            capacity=capacity,
            loops=loops,
            policy=policy,
            dtype=weight.dtype,
            device=weight.device,
        )

    def compute_saved(self, generation: Generation) -> float:
        """Share of the FLOPs of the tokens that full depth would have taken beyond these.

        Heads and judgements count; full depth is the most loops the model is trained for.
        """
        config = self.model.config
        context = generation.prompt_tokens + len(generation.tokens) / 2
        flops = token_flops(config, context)
        full = len(generation.tokens) * flops.at(config.max_loops)
        first, *others = [step.loops for step in generation.tokens]
        # The first token comes from the prompt's pass, where no rule judges.
        spent = flops.at(first, 1, 1)
        spent += sum(flops.at(loops, *generation.exit.cost(loops)) for loops in others)
        return 1 - spent / full

    def text_of(self, prompt: Prompt) -> str:
        """What stands before a continuation."""
        if isinstance(prompt, PicturePrompt):
            return prompt.text
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, PicturePrompt):
            return self._encode_pictures(prompt)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        # A document's start looks like the end of the one before.
        return list(prompt) or [self.end]

    def _encode_pictures(self, prompt: PicturePrompt) -> list[int]:
        if self.model.vision is None:
            raise UsageError("this model reads no pictures; use one that was trained on some")
        text = prompt.text if IMAGE in prompt.text else IMAGE * len(prompt.pictures) + prompt.text
        first, *others = text.split(IMAGE)
        check_markers(len(others), len(prompt.pictures), IMAGE)
        ids = [self.end]  # as a record of training begins
        for picture, words in zip((None, *prompt.pictures), (first, *others)):
            ids += [self.model.config.image_token] * (len(picture.patches) if picture else 0)
            ids += self.tokenizer.encode(words, add_special_tokens=False).ids
        return ids

    def _request(self, index: int, prompt: Prompt, options: GenerationOptions) -> _Request:
        check(options)
        config, tokens = self.model.config, self._encode(prompt)
        if len(tokens) >= config.max_seq_len:
            raise UsageError(
                f"prompt {index + 1} has {len(tokens)} tokens and the model's context holds "
                f"{config.max_seq_len}, new tokens included; shorten the prompt"
            )
        own = resolve_exit(self.exit_settings, options, config)
        return _Request(
            index=index,
            options=options,
            exit=own,
            prompt_exit=fixed_exit(options.prompt_loops or own.max_loops, own.settings),
            text=TextStream(self.tokenizer, options.stop),
            generator=torch.Generator().manual_seed(options.seed),
            seen=tokens,
            limit=min(len(tokens) + options.max_new_tokens, config.max_seq_len),
            pictures=prompt.pictures if isinstance(prompt, PicturePrompt) else (),
        )

    @torch.inference_mode()
    def _generate(self, requests: list[_Request]) -> Iterator[Step]:
        # A cache has one policy, so requests of different ones run after one another.
        for policy in POLICIES:
            group = [r for r in requests if r.exit.settings.kv_policy == policy]
            for first in range(0, len(group), self.batch_size):
                yield from self._run(group[first : first + self.batch_size], policy)

    def _run(self, requests: list[_Request], policy: str) -> Iterator[Step]:
        began = time.perf_counter()
        device = self.model.embedding.weight.device
        longest = max(len(r.seen) for r in requests)
        cache = self._cache(
            len(requests),
            longest + max(r.limit - len(r.seen) for r in requests) - 1,
            max(max(r.exit.max_loops, r.prompt_exit.max_loops) for r in requests),
            policy,
        )
        missing = [longest - len(r.seen) for r in requests]
        cache.pad_left(torch.tensor(missing))
        columns = [[self.end] * n + r.seen for n, r in zip(missing, requests)]
        exits = [r.prompt_exit for r in requests]
        pictures = together([picture for r in requests for picture in r.pictures])
        while True:
            tokens = torch.tensor(columns, device=device)
            found = self._pass(tokens, exits, cache, pictures and pictures.to(device))
            pictures = None
            cache.advance(tokens.shape[1])
            steps = self._choose(requests, found, began)
            yield from steps
            stay = [row for row, step in enumerate(steps) if step.finish_reason is None]
            if not stay:
                return
            if len(stay) < len(requests):
                requests = [requests[row] for row in stay]
                cache.keep(torch.tensor(stay, device=device))
            columns = [[r.seen[-1]] for r in requests]
            exits = [r.exit for r in requests]

    def _choose(self, requests: list[_Request], found: _Prediction, began: float) -> list[Step]:
        """Draw each request's next token."""
        logits = found.logits if found.logits.element_size() >= 4 else found.logits.float()
        ids = []
        for row, request in zip(logits, requests):
            seen = torch.tensor(request.seen, device=row.device)
            ids.append(draw(row[: self._known], request.options, seen, request.generator))
            request.seen.append(ids[-1])
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
        logprobs = (chosen - logits.logsumexp(-1)).tolist()
        seconds = time.perf_counter() - began
        columns = (requests, ids, found.loops, found.confidence.tolist(), logprobs)
        steps = []
        for request, token, loops, confidence, logprob in zip(*columns):
            text, reason = self._read(request, token)
            record = (request.index, token, text, loops, confidence, logprob, seconds, reason)
            steps.append(Step(*record))
        return steps

    def _read(self, request: _Request, token: int) -> tuple[str, str | None]:
        """The token's text, and why it is the last, if it is."""
        text = request.text.push(token)
        reason = None
        if token == self.end and not request.options.ignore_eos:
            reason = "end"
        elif len(request.seen) == request.limit:
            reason = "length"
        if reason:
            text += request.text.finish()
        return text, "stop" if request.text.stopped else reason

    def _pass(
        self,
        tokens: Tensor,
        exits: list[Exit],
        cache: LoopCache,
        pictures: Pictures | None = None,
    ) -> _Prediction:
        """Run the next columns, tokens (batch, new), each row until its exit lets it go."""
        if exits[0].rule is None and exits.count(exits[0]) == len(exits):
            return self._pass_straight(tokens, exits[0].max_loops, cache, pictures)
        return self._pass_adaptive(tokens, exits, cache, pictures)

    def _around(self, tokens: Tensor, cache: LoopCache, pictures: Pictures | None) -> Surroundings:
        layout = self.model.layout(tokens, pictures, cache.start)
        return self.model.surroundings(tokens.shape[1], cache, layout=layout)

    def _pass_straight(
        self, tokens: Tensor, loops: int, cache: LoopCache, pictures: Pictures | None
    ) -> _Prediction:
        """All rows to one depth: nothing to decide, nothing to index."""
        model, around = self.model, self._around(tokens, cache, pictures)
        state = embedding = model.encode(tokens, around, cache, pictures)
        for loop in range(1, loops + 1):
            state = model.step(state, embedding, loop, around, cache)
        if loops < cache.loops:
            cache.leave(torch.arange(len(tokens), device=tokens.device), loops)
        logits = model.head(model.decode(state, around, cache)[:, -1])
        return _Prediction(logits, [loops] * len(tokens), self._confidence(state, loops)[0])

    def _pass_adaptive(
        self, tokens: Tensor, exits: list[Exit], cache: LoopCache, pictures: Pictures | None
    ) -> _Prediction:
        """Each row leaves by its own exit, and the rows that stay go on without it."""
        model, here = self.model, self._around(tokens, cache, pictures)
        around = here
        state = embedding = model.encode(tokens, around, cache, pictures)
        reads_logits = any(own.reads_logits for own in exits)
        batch = len(tokens)
        rows = torch.arange(batch, device=tokens.device)
        everyone = True
        final = torch.empty_like(state)
        final_logits = state.new_empty(batch, model.config.vocab_size)
        confidence = state.new_empty(batch)
        depths = rows.clone()
        logits: Tensor | None = None
        for loop in itertools.count(1):
            index = None if everyone else rows
            state = model.step(state, embedding, loop, here, cache, index)
            previous = logits
            if reads_logits:
                logits = model.head(model.decode(state, here, cache, index)[:, -1])
            if not any(own.judges(loop) or loop >= own.max_loops for own in exits):
                continue
            read = Readout(*self._confidence(state, loop), logits, previous)
            leaves = leaving(exits, loop, read)
            go, stay = leaves.nonzero()[:, 0], (~leaves).nonzero()[:, 0]
            if not len(go):
                continue
            gone = rows[go]
            cache.leave(gone, loop)
            depths[gone], confidence[gone], final[gone] = loop, read.confidence[go], state[go]
            if logits is not None:
                final_logits[gone] = logits[go]
            if not len(stay):
                break
            everyone, rows, exits = False, rows[stay], [exits[row] for row in stay.tolist()]
            state, embedding, here = state[stay], embedding[stay], here.rows(stay)
            logits = None if logits is None else logits[stay]
        if not reads_logits:
            final_logits = model.head(model.decode(final, around, cache)[:, -1])
        return _Prediction(final_logits, depths.tolist(), confidence)

    def _confidence(self, state: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """Confidence and predicted gain at the last column, both calibrated, each (rows,)."""
        judged = self.model.confidence(state[:, -1:], loop)
        return calibrated(judged.logit[:, 0], judged.gain[:, 0], loop, self.exit_settings)


def _for_each(
    prompts: Sequence[Prompt], options: GenerationOptions | Sequence[GenerationOptions] | None
) -> list[tuple[Prompt, GenerationOptions]]:
    if options is None or isinstance(options, GenerationOptions):
        options = [options or GenerationOptions()] * len(prompts)
    assert len(options) == len(prompts), "one options for all, or one for each prompt"
    return list(zip(prompts, options))
