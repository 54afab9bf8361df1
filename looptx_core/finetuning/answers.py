"""What a finetuned model answers to held-out prompts, beside the answers that were expected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.data.example import Example
from looptx_core.data.tokenizer import end_id
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import TokenPrompt
from looptx_core.generation.text import TextStream
from looptx_core.machine.device import on_best_device
from looptx_core.media.registry import MEDIA
from looptx_core.model.loop import LoopedTransformer

_MOST_TOKENS = 2048  # of all expected answers together, so that the check stays short
_MOST_RECORDS = 200
_SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """One held-out record. Items of media in the prompt are left out of its text."""

    prompt: str
    expected: str
    given: str
    """Decoded greedily, as deep as the model's exit lets each token go."""

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class HeldOutAnswers:
    """Answers to held-out prompts."""

    records: int
    """Records that were asked, spread over those that have a prompt and an answer."""
    of: int
    """The records that have both."""
    exact: int
    """Answers that equal what was expected, but for white space at the ends."""
    shown: tuple[Answer, ...]
    """Some of them."""

    @property
    def share(self) -> float:
        """Of exact answers."""
        return self.exact / self.records


class _Question(NamedTuple):
    example: Example
    start: int
    """Where the answer's tokens begin."""

    @property
    def answer(self) -> list[int]:
        """Its tokens, with the one that ends it."""
        return list(map(int, self.example.ids[self.start :]))


def answer_held_out(
    model: LoopedTransformer,
    base: LoadedModel,
    exit_settings: ExitSettings,
    examples: Sequence[Example],
) -> HeldOutAnswers | None:
    """Ask a model what it was not trained on. None where no record has a prompt and an answer.

    base: whose tokenizer and tokens these are. examples: those held out; the last answer of a chat
    is asked for, after all that comes before it.
    """
    ends = {end_id(base.tokenizer, base.special.ends), *base.special.ends}
    questions = [question for example in examples if (question := _question(example, ends))]
    if not questions:
        return None
    asked = _spread(questions)

    def ask() -> HeldOutAnswers:
        engine = Engine(model, base.tokenizer, exit_settings, ends=base.special.ends)
        prompts, expected = [], []
        for example, start in asked:
            items = [MEDIA[f.medium].read(f.path, base.config) for f in example.files]
            fitted = example.fitted(items, base.config)
            # Items stand before the answer, so that they alone move its start.
            ids = list(map(int, fitted.ids[: start + len(fitted.ids) - len(example.ids)]))
            prompts.append(TokenPrompt(tuple(ids), tuple(items)))
            expected.append(_text(engine.tokenizer, ids, list(map(int, example.ids[start:-1]))))
        # One token more than expected is enough to see that an answer is another.
        options = [
            GenerationOptions(temperature=0.0, max_new_tokens=len(question.answer))
            for question in asked
        ]
        given = [result.text for result in engine.complete(prompts, options)]
        answers = [
            Answer(_prompt_text(base.tokenizer, prompt.ids), *texts)
            for prompt, *texts in zip(prompts, expected, given)
        ]
        exact = sum(answer.exact for answer in answers)
        return HeldOutAnswers(len(asked), len(questions), exact, _some(answers))

    return on_best_device(model, ask)


def _question(example: Example, ends: Set[int]) -> _Question | None:
    """An example whose last counted tokens are an answer to what stands before them."""
    if not example.counted[-1] or example.counted.all() or example.ids[-1] not in ends:
        return None
    start = int(np.flatnonzero(~example.counted)[-1]) + 1
    return _Question(example, start) if len(example.ids) - start > 1 else None


def _spread(questions: Sequence[_Question]) -> list[_Question]:
    """As many as the limits allow, evenly over all of them."""
    mean = sum(len(question.answer) for question in questions) / len(questions)
    count = max(1, min(len(questions), _MOST_RECORDS, int(_MOST_TOKENS / mean)))
    return [questions[i] for i in np.linspace(0, len(questions) - 1, count).astype(int)]


def _some(answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """A few, evenly spread."""
    count = min(_SHOWN, len(answers))
    return tuple(answers[i] for i in np.linspace(0, len(answers) - 1, count).astype(int))


def _prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """For people: what stands between the tokenizer's own tokens, such as those of a chat's roles
    and the places of items."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items()
               if token.special}  # fmt: skip
    runs = itertools.groupby(ids, special.__contains__)
    return " ".join(tokenizer.decode(list(run)) for is_special, run in runs if not is_special)


def _text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Tokens as text, as they would come after a prompt."""
    stream = TextStream(tokenizer, context=prompt)
    return "".join([*(stream.push(token) for token in ids), stream.finish()])
