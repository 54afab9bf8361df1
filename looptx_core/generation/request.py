"""Requests and their results: a prompt in, a `Step` for each token, a `Generation` at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.guidance import Unprompted
from looptx_core.generation.outputs import Output, open_item
from looptx_core.generation.running_batch import StepOutput
from looptx_core.generation.sampling import chances, check_number, sample
from looptx_core.generation.text import TextStream
from looptx_core.media.batch import MediaItem
from looptx_core.media.writer import Writer
from looptx_core.model.confidence import top_log_odds
from looptx_core.stopping.calibration import reported_confidence
from looptx_core.stopping.rule import Exit

T = TypeVar("T")


@dataclass(frozen=True)
class MediaPrompt:
    """A text with items of media, at its markers or, without any, before it; see `data.content`."""

    text: str
    media: tuple[MediaItem, ...] = ()
    write: str | None = None
    """The medium of an item that the model has to write next; None: the model decides."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer, for a model that was finetuned on chats.

    messages: each has `role` and `content`, as in `data.chat`. media: the first message's.
    """

    messages: tuple[Mapping[str, str], ...]
    media: tuple[MediaItem, ...] = ()


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, with the items of media that stand at their placeholders."""

    ids: tuple[int, ...]
    media: tuple[MediaItem, ...] = ()
    is_chat: bool = False
    """Whether what follows is an answer, which does not continue the prompt's text."""


Prompt = str | Sequence[int] | MediaPrompt | ChatPrompt | TokenPrompt


class Step(NamedTuple):
    """One generated token."""

    request: int
    """Index of the prompt that it continues."""
    id: int
    text: str
    """The text that has become certain; '' within a character or a possible stop string."""
    loops: int
    """Loops that ran at the position that predicted it."""
    confidence: float
    """The calibrated probability that the top token was right; see `reported_confidence`."""
    logprob: float
    """Log-probability of the token in nats, at temperature 1 and before any filter."""
    seconds: float
    """Time since the pass of its prompt began."""
    finish_reason: str | None = None
    """Of a request's last token: length, stop (a stop string) or end (of the document); error where
    the request failed by itself, and then this is no token."""
    output: Output | None = None
    """The item of a medium that this token finishes, if any."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens, as many as the request asked for."""


class Score(NamedTuple):
    """A token of a prompt, as full depth predicted it."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """As of a `Step`."""


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
    def outputs(self) -> list[Output]:
        """The items of media that were written, in order."""
        return [step.output for step in self.tokens if step.output is not None]

    @property
    def media(self) -> list[dict[str, Any]]:
        """The items of media that were written, each with its codes' loops and confidence."""
        found = []
        for place, step in enumerate(self.tokens):
            if (output := step.output) is not None:
                own = self.tokens[place + 1 - len(output.ids) : place + 1]
                own = [token for token in own if token.id in output.codes]
                found.append(
                    {
                        "kind": output.medium,
                        "file": None,
                        "codes": [token.id for token in own],
                        "loops": [token.loops for token in own],
                        "confidence": [token.confidence for token in own],
                        "seconds": output.seconds,
                        "elapsed": output.elapsed,
                    }
                )
        return found

    @property
    def tokens_per_second(self) -> float:
        """Of this request, counting the time of its prompt too."""
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


class ForcedScores(NamedTuple):
    """Given texts of one length, scored as if they were being generated."""

    loss: Tensor
    """Nats, (batch, tokens after the prompt)."""
    hit: Tensor
    """1 where the most likely token is the text's, else 0, of the same shape."""
    loops: Tensor
    """Loops that ran to predict each token, of the same shape."""
    seconds: float
    """Time without the prompt's pass."""
    bytes_per_token: int
    """Size of the cache for one row."""


class TextScores(NamedTuple):
    """One text's tokens after its prompt, scored as if they were being generated."""

    logprobs: list[float]
    """Nats."""
    hits: list[bool]
    """Whether the most likely token is the text's."""
    loops: list[int]
    """Loops that ran to predict each token."""


@dataclass(eq=False)
class Request:
    """A prompt that is being continued: its settings, its random generator and its tokens."""

    index: int
    options: GenerationOptions
    exit: Exit
    prompt_exit: Exit
    text: TextStream
    seen: list[int]
    limit: int
    """The length at which it stops, in tokens, with the prompt."""
    ends: frozenset[int]
    """The tokens that end a text."""
    prompt_tokens: int
    """Tokens of its prompt."""
    known: int
    """Size of the tokenizer's vocabulary; the model's may be padded to a round number."""
    media: tuple[MediaItem, ...] = ()
    writers: Mapping[str, Writer] = field(default_factory=dict)
    """The writers of the media that the model writes."""
    writes_one: bool = False
    """Whether it ends with the item that it writes."""
    unprompted: Unprompted | None = None
    """With guidance: what writes the same item after no prompt."""
    barred: Sequence[int] = ()
    """Ids that are never drawn."""
    forced_tokens: Sequence[int] = ()
    """Tokens to take instead of drawing any."""
    likeliest: list[int] = field(default_factory=list)
    """With forced tokens: the token that was most likely, for each."""
    top_logprobs: int = 0
    """How many of the most likely tokens to record with each."""
    score_prompt: bool = False
    """Whether to score the prompt's own tokens."""
    prompt_scores: list[Score] = field(default_factory=list)
    """Of the prompt's tokens but the first, which nothing predicts."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    began: float = field(default_factory=time.perf_counter)
    done: bool = False
    ends_alone: bool = False
    """Whether an error in its own work ends this request only, instead of all that run."""
    error: Exception | None = None
    """What ended it, then."""

    def attempt(self, work: Callable[[], T], instead: T) -> T:
        """What the work gives; `instead` where it fails, or failed before, and the request ends
        alone."""
        if self.error is None:
            try:
                return work()
            except Exception as error:  # of any kind, as the others have to go on
                if not self.ends_alone:
                    raise
                self.error = error
        return instead

    def failure(self) -> Step:
        """The last step of a request that ended by its own error."""
        self.done = True
        seconds = time.perf_counter() - self.began
        return Step(self.index, -1, "", 0, 0.0, 0.0, seconds, "error")

    def sample(self, logits: Tensor, best: int) -> int:
        """Draw the next token from logits (vocab_size,). best: the most likely token."""
        if self.forced_tokens:
            self.likeliest.append(best)
            return self.forced_tokens[len(self.seen) - self.limit]
        greedy = self.options.temperature == 0 and self.options.repetition_penalty == 1.0
        if greedy and not open_item(self.writers, self.seen):
            return best
        possible, seen = self._possible(logits, self.seen)
        return sample(possible, self.options, seen, self.generator)

    def chances(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        """Each token's probability to be drawn after `seen`, from logits (vocab_size,).

        (known,), or (vocab_size,) within an item of a medium.
        """
        possible, so_far = self._possible(logits, seen)
        return chances(possible, self.options, so_far)

    def _possible(self, logits: Tensor, seen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The logits of the tokens that may follow `seen`, text or the codes of an open item, and
        the ids that a penalty on repetitions looks at: codes may be repeated."""
        if item := open_item(self.writers, seen):
            if self.unprompted is not None and len(seen) - len(item.written) == self.prompt_tokens:
                without = at_least_float(self.unprompted.logits(item.written))
                logits = without + self.options.guidance * (logits - without)
            return item.restrict(logits), torch.zeros(0, dtype=torch.long, device=logits.device)
        text = [token for token in seen if token < self.known]
        possible = _without([self], logits[None])[0]
        return possible[: self.known], torch.tensor(text, device=logits.device)

    def take(self, token: int) -> tuple[str, Output | None, str | None]:
        """Append a token: returns its text, the item that it finishes, and the finish reason.

        The last two are None for most tokens. A token within an item has no text and ends no
        document.
        """
        item = open_item(self.writers, self.seen)
        self.seen.append(token)
        text = "" if item else self.text.push(token)
        finished = item and item.finish(token, self.options)
        reason = None
        if token in self.ends and not item and not self.options.ignore_eos:
            reason = "end"
        elif len(self.seen) == self.limit:
            reason = "length"
        elif finished and self.writes_one:
            reason = "end"
        if reason:
            text += self.text.finish()
        reason = "stop" if self.text.stopped else reason
        self.done = reason is not None
        return text, finished, reason


def next_tokens(requests: Sequence[Request], output: StepOutput) -> list[Step]:
    """Draw each request's next token from its row of `output`, and record it."""
    logits = at_least_float(output.logits)
    best = _without(requests, logits)[:, : requests[0].known].argmax(-1).tolist()
    ids = [
        request.attempt(partial(request.sample, row, top), top)
        for request, row, top in zip(requests, logits, best)
    ]
    return record(requests, ids, output)


def _without(requests: Sequence[Request], logits: Tensor) -> Tensor:
    """Each request's logits, (rows, vocab_size), with minus infinity for what it never draws."""
    barred = [(row, token) for row, request in enumerate(requests) for token in request.barred]
    if not barred:
        return logits
    rows, tokens = torch.tensor(barred, device=logits.device).unbind(1)
    return logits.index_put((rows, tokens), logits.new_tensor(float("-inf")))


def record(requests: Sequence[Request], ids: Sequence[int], output: StepOutput) -> list[Step]:
    """Append to each request its next token from `ids`. `output` has a row for each request.

    Raises `DataError` for logits that are no numbers.
    """
    logits = at_least_float(output.logits)
    # Not logsumexp: for one row it wakes torch's threads, which then slow the kernel down.
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    logs = logits.log_softmax(-1)
    logprobs = logs.gather(1, chosen)[:, 0].tolist()
    columns = (ids, output.loops, output.log_odds, top_log_odds(logs).tolist(), logprobs, logs)
    steps = [
        request.attempt(partial(_step, request, *row), None)
        for request, *row in zip(requests, *columns)
    ]
    return [step or request.failure() for request, step in zip(requests, steps)]


def _step(
    request: Request,
    token: int,
    loops: int,
    log_odds: float,
    top_logit: float,
    logprob: float,
    logs: Tensor,
) -> Step:
    """Append a token to a request. logs: (vocab_size,), the log-probabilities it was drawn from."""
    check_number(logprob)
    tops = _likeliest(logs, request)
    text, finished, reason = request.take(token)
    confidence = reported_confidence(log_odds, top_logit, request.exit.settings)
    figures = (loops, confidence, logprob, time.perf_counter() - request.began)
    return Step(request.index, token, text, *figures, reason, finished, tops)


def score_prompts(requests: Sequence[Request], logits: Tensor, start: int) -> None:
    """Record the scores of a piece of prompts, for the requests that want them.

    logits: (rows, length, vocab_size), after the tokens from `start` on.
    """
    for request, own in zip(requests, logits):
        following = request.seen[start + 1 : start + 1 + len(own)]
        if request.score_prompt and following:
            logs = at_least_float(own[: len(following)]).log_softmax(-1)
            chosen = torch.tensor(following, device=logs.device)[:, None]
            for row, logprob in zip(logs, logs.gather(1, chosen)[:, 0].tolist()):
                request.prompt_scores.append(Score(logprob, _likeliest(row, request)))


def _likeliest(logs: Tensor, request: Request) -> tuple[tuple[int, float], ...]:
    """The most likely tokens that the request asked for. logs: (vocab_size,)."""
    if not request.top_logprobs:
        return ()
    found = logs[: request.known].topk(min(request.top_logprobs, request.known))
    return tuple(zip(found.indices.tolist(), found.values.tolist()))


def at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()
