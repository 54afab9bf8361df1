"""Losses and exit signals of every counted token after every loop.

All tokens run all loops, as in training. `Engine.score_forced` shows what real exits change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.model.confidence import Confidence
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.calibration import calibrated, reported_confidence
from looptx_core.stopping.rule import SIGNALS, ExitSignals
from looptx_core.training.evaluate import LoopEvaluation, evaluate_batch, evaluate_loops


@dataclass(frozen=True)
class Survey:
    """An evaluation with all signals that exit rules use, each (loops, tokens)."""

    evaluation: LoopEvaluation
    logit_signals: dict[str, Tensor]
    """kl, entropy and maxprob. kl is infinite at the first loop, which has none before it."""

    @property
    def loss(self) -> Tensor:
        """Nats."""
        return self.evaluation.token_loss

    @property
    def hit(self) -> Tensor:
        """1 where the top token is right."""
        return self.evaluation.hit

    @property
    def loops(self) -> int:
        return len(self.loss)

    def reported_confidence(self, settings: ExitSettings) -> Tensor:
        """The confidence reported with a token that stops at a loop, (loops, tokens)."""
        return reported_confidence(self.evaluation.logit, self.evaluation.top_log_odds, settings)

    def signals(self, settings: ExitSettings) -> dict[str, Tensor]:
        """All signals by name, the head's calibrated by these settings, and the state's change."""
        own = self.evaluation
        by_loop = [
            calibrated(*outputs, loop, settings)
            for loop, outputs in enumerate(zip(own.logit, own.gain, own.change), start=1)
        ]
        confidence, gain = (torch.stack(part) for part in zip(*by_loop))
        return {"confidence": confidence, "gain": gain, **self.logit_signals, "change": own.change}


class _Observer:
    """Collects the signals of one batch, loop by loop."""

    def __init__(self) -> None:
        self._loops: list[list[dict[str, Tensor]]] = []
        self._logits: dict[int, Tensor] = {}
        """Of the loop before, by the first token of a slice."""

    def __call__(
        self, loop: int, rows: slice, state: Tensor, logits: Tensor, output: Confidence
    ) -> None:
        signals = ExitSignals(*output, logits, self._logits.get(rows.start))
        values = {
            name: torch.as_tensor(s.value(signals)).cpu()
            for name, s in SIGNALS.items()
            if s.reads_logits
        }
        if loop > len(self._loops):
            self._loops.append([])
        self._loops[loop - 1].append(values)
        self._logits[rows.start] = logits

    @property
    def logit_signals(self) -> dict[str, Tensor]:
        """Each signal, (loops, tokens)."""
        return {
            name: torch.stack([torch.cat([part[name] for part in loop]) for loop in self._loops])
            for name in self._loops[0][0]
        }


def survey_lines(
    model: LoopedTransformer,
    tokens: Tensor,
    loops: int,
    counted: Tensor | None = None,
    documents: Tensor | None = None,
    targets: Tensor | None = None,
) -> Survey:
    """Survey given tokens; arguments and shapes as in `evaluate_loops`."""
    observer = _Observer()
    evaluation = evaluate_loops(model, tokens, loops, counted, documents, observer, targets)
    return Survey(evaluation, observer.logit_signals)


def two_surveys(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]], loops: int
) -> tuple[Survey, Survey]:
    """(survey to calibrate on, survey to report on), each of every other sequence."""
    parts: tuple[list[Survey], list[Survey]] = ([], [])
    for batch in batches:
        for first, part in enumerate(parts):
            half = {name: values[first::2] for name, values in batch.items()}
            if len(half["tokens"]):
                documents = half.get("documents")
                part.append(survey_lines(model, half["tokens"], loops, documents=documents))
    fit, report = (merge_surveys(part) for part in parts)
    return fit, report


def alternate_surveys(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]], loops: int
) -> tuple[Survey, Survey]:
    """(survey to calibrate on, survey to report on), each of every other batch.

    batches: at least two. Their media are read, and targets of weight 0 are left out.
    """
    parts: tuple[list[Survey], list[Survey]] = ([], [])
    for number, batch in enumerate(batches):
        observer = _Observer()
        evaluation = evaluate_batch(model, batch, loops, observer)
        parts[number % 2].append(Survey(evaluation, observer.logit_signals))
    fit, report = (merge_surveys(part) for part in parts)
    return fit, report


def merge_surveys(parts: list[Survey]) -> Survey:
    """One survey of all their tokens."""
    total = parts[0].evaluation
    for part in parts[1:]:
        total = total + part.evaluation
    names = parts[0].logit_signals
    return Survey(
        total, {name: torch.cat([p.logit_signals[name] for p in parts], 1) for name in names}
    )
