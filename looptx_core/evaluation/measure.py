"""One task at one depth: its metric, with what it cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from looptx_core.config.evaluation import Depth
from looptx_core.data.probes import Probe, answer_tokens
from looptx_core.errors import DataError
from looptx_core.evaluation.scoring import Line, Scorer
from looptx_core.evaluation.tally import Tally
from looptx_core.evaluation.task import Task


@dataclass(frozen=True)
class Result:
    """One row of an evaluation."""

    task: str
    loops: Depth
    mean_loops: float
    """Of the tokens that counted."""
    metric: str
    value: float
    stderr: float | None
    flops_per_token: float
    """Forward, of a token that counted, heads and exit checks included."""
    seconds: float


def measure(task: Task, scorer: Scorer, limit: int | None = None) -> Result:
    """Score a task's lines, the first `limit` of them.

    Raises `DataError` for lines that are not of the task.
    """
    lines = task.lines(limit)
    scorer.reset()
    started = time.perf_counter()
    tally = _KINDS[task.kind](task, scorer, lines)
    seconds = time.perf_counter() - started
    return Result(
        task.name, scorer.depth, scorer.mean_loops, task.metric, tally.value, tally.stderr,
        scorer.flops_per_token, seconds,
    )  # fmt: skip


def _probes(task: Task, scorer: Scorer, lines: list[dict[str, Any]]) -> Tally:
    """Whether the most likely token is the answer's, by group; probes of one text are one line."""
    tally, opening = Tally(), list(scorer.engine.opening)
    asked: list[Line] = []
    groups: list[list[tuple[int, str]]] = []
    for text, members in groupby((Probe(**line) for line in lines), key=lambda probe: probe.text):
        encoded = scorer.engine.tokenizer.encode(text, add_special_tokens=False)
        places: dict[int, str] = {}
        for probe in members:
            for place in answer_tokens(probe, encoded):
                places[place + len(opening)] = probe.group
        tokens = [*opening, *encoded.ids]
        places = {place: group for place, group in sorted(places.items()) if place > 0}
        if not places or len(tokens) > scorer.engine.model.config.max_seq_len:
            raise DataError(
                f"{task.data}: {text[:40]!r} has no answer to score, or more tokens than the "
                "model's context holds"
            )
        asked.append(Line(tokens, list(places)))
        groups.append(list(places.items()))
    for own, scores in zip(groups, scorer.score(asked)):
        tally.add(*((group, float(hit), 1.0) for (_, group), hit in zip(own, scores.hits)))
    return tally


def _multiple_choice(task: Task, scorer: Scorer, lines: list[dict[str, Any]]) -> Tally:
    """Whether the right choice is the likeliest of all, after the same context."""
    asked = [
        scorer.line(*scorer.pair(line[task.text], task.delimiter + choice))
        for line in lines
        for choice in line[task.choices]
    ]
    sums = iter([sum(scores.logprobs) for scores in scorer.score(asked)])
    tally = Tally()
    for line in lines:
        found = [next(sums) for _ in line[task.choices]]
        tally.add(("", float(found.index(max(found)) == line[task.target]), 1.0))
    return tally


def _generate_until(task: Task, scorer: Scorer, lines: list[dict[str, Any]]) -> Tally:
    """Whether a greedy continuation is the answer, but for whitespace around it."""
    prompts = [line[task.text] for line in lines]
    tally = Tally()
    for line, made in zip(lines, scorer.complete(prompts, task.max_new_tokens, task.until)):
        tally.add(("", float(made.text.strip() == line[task.target].strip()), 1.0))
    return tally


def _rolling(task: Task, scorer: Scorer, lines: list[dict[str, Any]]) -> Tally:
    """Bits of whole texts by their bytes of UTF-8."""
    windows = [scorer.windows(line[task.target]) for line in lines]
    scores = iter(scorer.score([window for own in windows for window in own]))
    tally = Tally()
    for line, own in zip(lines, windows):
        nats = -sum(sum(next(scores).logprobs) for _ in own)
        tally.add(("", nats / math.log(2), float(len(line[task.target].encode()))))
    return tally


_KINDS = {
    "probes": _probes,
    "multiple_choice": _multiple_choice,
    "generate_until": _generate_until,
    "loglikelihood_rolling": _rolling,
}
