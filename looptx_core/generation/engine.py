"""The engine: prompts in, a record for each token out.

    for step in Engine(model, tokenizer, exit_settings).generate(["Call me"]):
        print(step.text, step.loops, step.confidence)

A token's record describes the position that predicted it: how many loops ran there, and how sure
the confidence head was. The prompt runs at full depth; each new position then loops until its
request's exit stops it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from looptx_core.backends.select import select_backend
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.data.chat import ChatTemplate
from looptx_core.data.tokenizer import check_ids, end_id, opening_ids, vocabulary_size
from looptx_core.errors import UsageError
from looptx_core.generation.cache_room import fitting_cache
from looptx_core.generation.encoding import PromptEncoder
from looptx_core.generation.guidance import Unprompted
from looptx_core.generation.prompts import check_placeholders
from looptx_core.generation.request import (
    ChatPrompt,
    ForcedScores,
    Generation,
    MediaPrompt,
    Prompt,
    Request,
    Step,
    TextScores,
    TokenPrompt,
)
from looptx_core.generation.running_batch import RunningBatch, WorkCounters
from looptx_core.generation.sampling import check
from looptx_core.generation.scheduler import Scheduler, serve
from looptx_core.generation.text import TextStream
from looptx_core.media.registry import MEDIA, writers
from looptx_core.model.cache import LoopCache
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.resolve import resolve_exit
from looptx_core.stopping.rule import fixed_exit

_CAPACITY_STEP = 256

__all__ = ["ChatPrompt", "Engine", "ForcedScores", "Generation", "MediaPrompt", "Prompt", "Step"]


class Engine:
    """Generates with one model.

    The model is in evaluation mode only while it generates. Its weights keep their values, but
    projections of the same input share storage from then on.

    Args:
        exit_settings: the model's own, stored beside it.
        ends: ids that end a text; by default the token that ends the tokenizer's documents.
        chat_template: of a model with its own way to write chats; by default ours.
        batch_size: how many prompts run at once at most; the others wait until a row is free.
        kernel: see `select_backend`. The attribute `kernel` says what was chosen and why.
        precision: see `select_backend`.

    A prompt that is text begins with the tokens that the tokenizer's post-processor adds. The
    attribute `counters` counts the work done, and a function that is set as `on_prompt` is called
    with the tokens of each pass over a prompt.

    Raises `UsageError` for a `batch_size` below 1 and for an unknown kernel or precision,
    `MissingError` for a kernel that this machine can't run.
    """

    def __init__(
        self,
        model: LoopedTransformer,
        tokenizer: Tokenizer,
        exit_settings: ExitSettings | None = None,
        *,
        ends: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        name: str = "model",
        batch_size: int = 32,
        kernel: str = "auto",
        precision: str = "float32",
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"`batch_size` {batch_size}: at least 1 prompt runs at once")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        model.fuse_projections()
        self.exit_settings = exit_settings or ExitSettings()
        self.batch_size = batch_size
        self.end = end_id(tokenizer, ends)
        self.known = vocabulary_size(tokenizer)
        self.ends, self.opening = tuple(ends), opening_ids(tokenizer)
        self.writers = writers(model.config)
        self.encoder = PromptEncoder(
            model.config, tokenizer, self.end, model.encoders(), chat_template
        )
        with evaluation_mode(model):  # a back end may copy the model
            self.backend, self.kernel = select_backend(model, kernel, precision)
        self.counters = WorkCounters()
        self.on_prompt: Callable[[int], object] | None = None
        self._spare: LoopCache | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    ) -> Iterator[Step]:
        """Continue prompts (texts, token ids, texts with media, chats); yields tokens as drawn.

        options: one for all, or one for each prompt. Tokens of different requests interleave.
        Raises `UsageError`, at the call, for settings out of range and for a prompt that fills the
        model's context.
        """
        each = _for_each(prompts, options)
        return self._generate([self.request(i, *pair) for i, pair in enumerate(each)])

    def complete(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        watch: Callable[[Step], object] | None = None,
    ) -> list[Generation]:
        """`generate`, collected by request. `watch` is called with each token as it is drawn."""
        tokens: list[list[Step]] = [[] for _ in prompts]
        for step in self.generate(prompts, options):
            tokens[step.request].append(step)
            if watch:
                watch(step)
        return [
            self.generation(self.text_of(prompt), self.length(prompt), option, steps)
            for (prompt, option), steps in zip(_for_each(prompts, options), tokens)
        ]

    def generation(
        self, prompt: str, length: int, options: GenerationOptions, steps: list[Step]
    ) -> Generation:
        """A finished request of its tokens. length: the prompt's, in tokens."""
        return Generation(
            prompt=prompt,
            text="".join(step.text for step in steps),
            tokens=steps,
            prompt_tokens=length,
            finish_reason=steps[-1].finish_reason or "length",
            exit=resolve_exit(self.exit_settings, options, self.model.config),
            model=self.name,
        )

    @torch.inference_mode()
    def score_texts(
        self, texts: Sequence[Sequence[int]], prompts: Sequence[int], options: GenerationOptions
    ) -> list[TextScores]:
        """Score given texts by real decoding, with early exits and the cache that these write.

        texts: the ids of each. prompts: how many of each text's first tokens are its prompt, at
        least one and not all. Of the options, only those about depth matter.
        """
        found, _ = self._run_forced(texts, prompts, options, self.batch_size)
        return [scores for scores, _ in found]

    @torch.inference_mode()
    def score_forced(self, tokens: Tensor, prompt: int, options: GenerationOptions) -> ForcedScores:
        """`score_texts` for texts of one length, all in one batch, with the time taken.

        tokens: (batch, length) ids; the first `prompt` columns are the prompt.
        """
        found, bytes_per_token = self._run_forced(
            tokens.tolist(), [prompt] * len(tokens), options, len(tokens)
        )
        seconds = [second for _, times in found for second in times]
        return ForcedScores(
            -torch.tensor([scores.logprobs for scores, _ in found]),
            torch.tensor([scores.hits for scores, _ in found]).float(),
            torch.tensor([scores.loops for scores, _ in found]),
            max(seconds) - min(seconds),
            bytes_per_token,
        )

    def _run_forced(
        self,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[int],
        options: GenerationOptions,
        rows: int,
    ) -> tuple[list[tuple[TextScores, list[float]]], int]:
        """(scores, seconds of each token) of each text, and the cache's bytes per token and row."""
        requests = []
        for index, (text, prompt) in enumerate(zip(texts, prompts)):
            own = replace(
                options, max_new_tokens=len(text) - prompt, ignore_eos=True, stop=(), speculate=0
            )
            requests.append(self.request(index, list(text[:prompt]), own))
            requests[-1].forced_tokens = text[prompt:]
        steps: list[list[Step]] = [[] for _ in requests]
        # Prompts of one length share a pass.
        queue = sorted(requests, key=lambda request: len(request.seen))
        with self._batch(queue, min(len(queue), rows)) as batch:
            for step in serve(batch, queue):
                steps[step.request].append(step)
        found = []
        for request, own_steps in zip(requests, steps):
            hits = [best == id_ for best, id_ in zip(request.likeliest, request.forced_tokens)]
            scores = TextScores(
                [step.logprob for step in own_steps], hits, [step.loops for step in own_steps]
            )
            found.append((scores, [step.seconds for step in own_steps]))
        return found, batch.cache.bytes_per_token

    @contextlib.contextmanager
    def lasting(self, rows: int, context: int) -> Iterator[Scheduler]:
        """A scheduler that requests may join at any time, with the model's own cache.

        rows: requests that run at once. context: tokens of each, its prompt included. To be entered
        and used in one thread, in torch's inference mode.
        """
        own = self.exit_settings
        cache = self.model.new_cache(
            rows, context, self.model.config.max_loops, own.kv_policy, own.kv_type
        )
        with evaluation_mode(self.model):
            yield Scheduler(RunningBatch(self.backend, cache, self.counters))

    @contextlib.contextmanager
    def _batch(self, requests: Sequence[Request], rows: int) -> Iterator[RunningBatch]:
        """A running batch with a cache for this many of the requests at once."""
        needed = max(request.limit for request in requests) - 1
        loops = max(max(r.exit.max_loops, r.prompt_exit.max_loops) for r in requests)
        cache = self._cache(requests[0].exit.settings, rows, needed, loops)
        try:
            with evaluation_mode(self.model):
                batch = RunningBatch(self.backend, cache, self.counters)
                batch.on_prompt = self.on_prompt
                yield batch
        finally:
            if self.backend.reuses_cache and rows == 1:
                self._spare = cache

    def _cache(self, settings: ExitSettings, rows: int, needed: int, loops: int) -> LoopCache:
        """A cache for `needed` columns: a new one, or the spare one if it fits."""
        spare, capacity = self._spare, needed
        if self.backend.reuses_cache and rows == 1:
            self._spare = None
            if spare is not None and spare.has_room(needed):
                own = spare.policy, spare.kind, spare.loops
                if own == (settings.kv_policy, settings.kv_type, loops):
                    spare.wipe()  # masked entries are still multiplied, so they must be finite
                    return spare
            spare = None  # its memory is free for the new one
            # Rounded up, so that the next request is likely to fit.
            capacity = -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
        return fitting_cache(self.model, rows, capacity, loops, settings)

    def compute_saved(self, generation: Generation) -> float:
        """The share of FLOPs that early exits saved, compared with `max_loops` for every token.

        Readouts and evaluations of the confidence head count too.
        """
        config = self.model.config
        context = generation.prompt_tokens + len(generation.tokens) / 2
        flops = token_flops(config, context)
        full = len(generation.tokens) * flops.at(config.max_loops)
        first, *others = [step.loops for step in generation.tokens]
        # The first token comes from the prompt's pass, which checks no exit.
        spent = flops.at(first)
        spent += sum(flops.at(loops, *generation.exit.passes(loops)) for loops in others)
        return 1 - spent / full

    def length(self, prompt: Prompt) -> int:
        """The number of tokens of a prompt."""
        return len(self.encode(prompt))

    def text_of(self, prompt: Prompt) -> str:
        """The text of a prompt, to show before its continuation; a chat's last message."""
        if isinstance(prompt, ChatPrompt):
            return prompt.messages[-1]["content"]
        if isinstance(prompt, MediaPrompt):
            return prompt.text
        if isinstance(prompt, TokenPrompt):
            prompt = prompt.ids
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, with the placeholders of its items; see `PromptEncoder`."""
        return self.encoder.encode(prompt)

    def request(
        self,
        index: int,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        where: str = "",
        is_read: bool = False,
    ) -> Request:
        """A request for a `Scheduler`. Its steps bear the index.

        where: what errors call the prompt; by default its number. is_read: a cache holds the
        prompt already, so that its items are not needed any more.

        Raises `UsageError` for settings out of range and for a prompt that fills the context,
        `DataError` for token ids that the model does not have and for placeholders without items.
        """
        check(options)
        config, read = self.model.config, self.encoder.read(prompt)
        tokens, where = list(read.ids), where or f"prompt {index + 1}"
        check_ids(tokens, config.vocab_size, where)
        if not is_read:
            check_placeholders(tokens, read.media, config, where)
        most = config.context_limit
        if most is not None and len(tokens) >= most:
            raise UsageError(
                f"{where} has {len(tokens)} tokens and the model's context holds "
                f"{most}, new tokens included; shorten the prompt"
            )
        own = resolve_exit(self.exit_settings, options, config)
        if options.speculate and not self.model.new_cache(1, 1, 1).can_roll_back:
            raise UsageError(
                "`speculate`: drafted tokens have to be taken back, and this model's layers can't "
                "take back what they remember; leave out `speculate`"
            )
        write = getattr(prompt, "write", None)
        if write and options.guidance != 1 and not MEDIA[write].unasked:
            raise UsageError(
                f"`guidance` is of what is written to no prompt as well, and {MEDIA[write].plural} "
                "are not; leave it out"
            )
        limit = len(tokens) + options.max_new_tokens
        prompt_exit = fixed_exit(options.prompt_loops or own.max_loops, own.settings)
        empty = [self.end, tokens[-1]] if write else []
        return Request(
            index=index,
            options=options,
            exit=own,
            prompt_exit=prompt_exit,
            unprompted=Unprompted.of(self.backend, empty, options, own, prompt_exit),
            prompt_tokens=len(tokens),
            text=TextStream(self.tokenizer, options.stop, () if read.is_chat else tokens),
            seen=tokens,
            limit=limit if most is None else min(limit, most),
            ends=frozenset(self.ends or (self.end,)),
            known=self.known,
            media=read.media,
            writers=self.writers,
            writes_one=bool(empty),
            generator=torch.Generator().manual_seed(options.seed),
        )

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> Iterator[Step]:
        def kind(request: Request) -> tuple[str, str]:
            return request.exit.settings.kv_policy, request.exit.settings.kv_type

        # One by one, so that each has a cache of one row, which CUDA graphs need.
        for request in [request for request in requests if request.options.speculate]:
            with self._batch([request], 1) as batch:
                yield from serve(batch, [request])
        requests = [request for request in requests if not request.options.speculate]

        # A cache has one policy and number type; requests with others run in batches of their own.
        for _, members in itertools.groupby(sorted(requests, key=kind), kind):
            group = list(members)
            with self._batch(group, min(len(group), self.batch_size)) as batch:
                yield from serve(batch, group)


@contextlib.contextmanager
def evaluation_mode(model: LoopedTransformer) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards each module is in its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _for_each(
    prompts: Sequence[Prompt], options: GenerationOptions | Sequence[GenerationOptions] | None
) -> list[tuple[Prompt, GenerationOptions]]:
    if options is None or isinstance(options, GenerationOptions):
        options = [options or GenerationOptions()] * len(prompts)
    assert len(options) == len(prompts), "one options for all, or one for each prompt"
    return list(zip(prompts, options))
