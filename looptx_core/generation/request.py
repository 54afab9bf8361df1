"""Requests and what becomes of them: prompts in, a record for each token out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.outputs import Output, open_item
from looptx_core.generation.running_batch import StepOutput
from looptx_core.generation.sampling import chances, sample
from looptx_core.generation.text import TextStream
from looptx_core.media.base import Writer
from looptx_core.media.batch import MediaItem
from looptx_core.model.confidence import top_log_odds
from looptx_core.stopping.calibration import reported_confidence
from looptx_core.stopping.rule import Exit


@dataclass(frozen=True)
class MediaPrompt:
    """A text with items of media, placed by their markers, or before it; see `data.content`."""

    text: str
    media: tuple[MediaItem, ...] = ()
    write: str | None = None
    """The medium of an item that the model is to write next; None leaves it to the model."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer, by a model that was finetuned on chats.

    messages: of `role` and `content`, as in `data.chat`. media: of the first message.
    """

    messages: tuple[Mapping[str, str], ...]
    media: tuple[MediaItem, ...] = ()


Prompt = str | Sequence[int] | MediaPrompt | ChatPrompt


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
    """The calibrated probability, there, that the top-1 token is right, by its logits too."""
    logprob: float
    """The model's own, at temperature 1 and before any filter, in nats."""
    seconds: float
    """Since its prompt was begun."""
    finish_reason: str | None = None
    """With a request's last token: length, stop (a stop string) or end (the document's)."""
    output: Output | None = None
    """An item of a medium that this token finishes."""


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


@dataclass
class Request:
    """A prompt on its way: its settings, its own random generator, what it has seen."""

    index: int
    options: GenerationOptions
    exit: Exit
    prompt_exit: Exit
    text: TextStream
    seen: list[int]
    limit: int
    """Tokens to stop at, prompt included."""
    ends: frozenset[int]
    """The tokens that end a text."""
    known: int
    """Tokens that can be drawn: a model may have rows for more, to fill up to a round number."""
    media: tuple[MediaItem, ...] = ()
    writers: Mapping[str, Writer] = field(default_factory=dict)
    """Of the media that the model writes."""
    forced_tokens: Sequence[int] = ()
    """Tokens to take, in place of those that would be drawn."""
    likeliest: list[int] = field(default_factory=list)
    """With forced tokens: the most likely token in the place of each."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    began: float = field(default_factory=time.perf_counter)
    done: bool = False

    def sample(self, logits: Tensor, best: int) -> int:
        """The next token, by logits (vocab_size,); best: the most likely one."""
        if self.forced_tokens:
            self.likeliest.append(best)
            return self.forced_tokens[len(self.seen) - self.limit]
        greedy = self.options.temperature == 0 and self.options.repetition_penalty == 1.0
        if greedy and not open_item(self.writers, self.seen):
            return best
        seen = torch.tensor(self.seen, device=logits.device)
        return sample(self._possible(logits, self.seen), self.options, seen, self.generator)

    def chances(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        """Each token's chance after these, by logits (vocab_size,): (known,), or within an item
        of a medium (vocab_size,)."""
        so_far = torch.tensor(seen, device=logits.device)
        return chances(self._possible(logits, seen), self.options, so_far)

    def _possible(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        """The logits of what may follow these tokens: the text's, or an open item's codes."""
        item = open_item(self.writers, seen)
        return item.restrict(logits) if item else logits[: self.known]

    def take(self, token: int) -> tuple[str, Output | None, str | None]:
        """Go on with this token: its text, the item it finishes, and why it is the last, if it is.

        A token within an item has no text and ends no document.
        """
        item = open_item(self.writers, self.seen)
        self.seen.append(token)
        text = "" if item else self.text.push(token)
        reason = None
        if token in self.ends and not item and not self.options.ignore_eos:
            reason = "end"
        elif len(self.seen) == self.limit:
            reason = "length"
        if reason:
            text += self.text.finish()
        reason = "stop" if self.text.stopped else reason
        self.done = reason is not None
        return text, item and item.finish(token), reason


def next_tokens(requests: Sequence[Request], output: StepOutput) -> list[Step]:
    """Draw each request's next token from what its row predicts."""
    logits = at_least_float(output.logits)
    best = logits[:, : requests[0].known].argmax(-1).tolist()
    ids = [request.sample(*given) for request, *given in zip(requests, logits, best)]
    return record(requests, ids, output)


def record(requests: Sequence[Request], ids: Sequence[int], output: StepOutput) -> list[Step]:
    """Give each request its next token; one of the output's rows for each."""
    logits = at_least_float(output.logits)
    # logsumexp of one row wakes torch's threads, which then spin in the kernel's way.
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    logs = logits.log_softmax(-1)
    logprobs = logs.gather(1, chosen)[:, 0].tolist()
    top_logits = top_log_odds(logs).tolist()
    now = time.perf_counter()
    columns = (requests, ids, output.loops, output.log_odds, top_logits, logprobs)
    steps = []
    for request, token, loops, odds, top_logit, logprob in zip(*columns):
        text, finished, reason = request.take(token)
        sure = reported_confidence(odds, top_logit, request.exit.settings)
        figures = (loops, sure, logprob, now - request.began)
        steps.append(Step(request.index, token, text, *figures, reason, finished))
    return steps


def at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()
