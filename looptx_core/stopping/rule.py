"""When a token stops looping: the exit rules, each a signal or two against their thresholds.

`Exit.stops` is the only place that decides. It takes numbers of one row or tensors of many; the
engine, the frontier of `inspect-loops` and its traces ask it, and kernels get thresholds derived
from it (`Exit.kernel_thresholds`). A signal that `reads_logits` needs the coda and the head at
every loop; the others look at the confidence head alone, so that deciding costs no product with
the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.stopping.calibration import calibrated

_MIN_PROBABILITY = 1e-15  # a probability that 1 can be told from
_FAR = 1e30  # nothing is beyond it


class HeadOutput(NamedTuple):
    """The confidence head's output for a row after a loop, before calibration."""

    logit: float
    """Log-odds that the top token is right."""
    gain: float
    """What the next loop is predicted to bring."""
    change: float
    """`looptx_core.model.confidence.relative_change` of the loop."""


class ExitSignals(NamedTuple):
    """What a rule may look at after a loop: of one row, as numbers, or of many."""

    confidence: Tensor | float
    """(...), the calibrated probability that the top token is right."""
    gain: Tensor | float
    """(...), nats that the next loop is predicted to bring."""
    logits: Tensor | None = None
    """(..., vocab_size), for the rules that read them."""
    previous: Tensor | None = None
    """The last loop's logits, (..., vocab_size); None at the first loop."""


class Signal(NamedTuple):
    """A number for each row, and on which side of its threshold a token may stop."""

    value: Callable[[ExitSignals], Tensor | float]
    """(...), a number for each row."""
    at_least: bool = False
    """Stop at the threshold or above; else below it."""
    reads_logits: bool = False

    def stops(self, value: Any, threshold: float) -> Any:
        """True where a token may stop; shaped as `value`."""
        return value >= threshold if self.at_least else value < threshold


def _divergence(signals: ExitSignals) -> Tensor:
    """Huginn's (arXiv 2502.05171): KL from the last loop's distribution to this one's, in nats."""
    assert signals.logits is not None
    if signals.previous is None:
        return torch.full_like(signals.logits[..., 0], torch.inf)
    now, before = signals.logits.log_softmax(-1), signals.previous.log_softmax(-1)
    return (now.exp() * (now - before)).sum(-1)


def _entropy(signals: ExitSignals) -> Tensor:
    assert signals.logits is not None
    logs = signals.logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _maxprob(signals: ExitSignals) -> Tensor:
    assert signals.logits is not None
    return signals.logits.softmax(-1).amax(-1)


SIGNALS = {
    "confidence": Signal(lambda signals: signals.confidence, at_least=True),
    "gain": Signal(lambda signals: signals.gain),
    "kl": Signal(_divergence, reads_logits=True),
    "entropy": Signal(_entropy, reads_logits=True),
    "maxprob": Signal(_maxprob, at_least=True, reads_logits=True),
}
"""By the name of their threshold in `ExitSettings`."""

RULES = {"auto": ("confidence", "gain"), **{name: (name,) for name in SIGNALS}}
"""The signals of a rule; any of them lets a token stop."""


@dataclass(frozen=True)
class Exit:
    """How deep a token goes: between two depths, by a rule; a fixed depth has no rule."""

    min_loops: int
    max_loops: int
    settings: ExitSettings
    rule: str | None = None

    @property
    def reads_logits(self) -> bool:
        return any(SIGNALS[name].reads_logits for name in self.signals)

    @property
    def signals(self) -> tuple[str, ...]:
        """What the rule looks at; nothing at a fixed depth."""
        return () if self.rule is None else RULES[self.rule]

    @property
    def first_check(self) -> int:
        """First loop after which the exit is checked; it is checked after every later loop."""
        return self.max_loops if self.rule is None else min(self.min_loops, self.max_loops)

    def next_check(self, loop: int) -> int:
        """The first loop after this one at which something has to be computed for the rule."""
        if self.reads_logits:  # which may compare each loop with the one before
            return loop + 1
        return max(loop + 1, self.first_check)

    def checks(self, before: int, after: int) -> int:
        """How many of the loops from `before` + 1 to `after` end with an exit check."""
        return max(0, after - max(before, self.first_check - 1))

    def kernel_thresholds(self) -> tuple[float, float]:
        """(log-odds from which on a token may stop, nats below which it may), for kernels.

        Log-odds as the head gives them, before calibration; nats after it. Slightly permissive:
        `stops` checks again, exactly.
        """
        odds, nats = _FAR, -_FAR
        if "confidence" in self.signals:
            sure = min(max(self.settings.confidence, _MIN_PROBABILITY), 1 - _MIN_PROBABILITY)
            odds = math.log(sure / (1 - sure)) - self.settings.confidence_offset
            odds = odds * self.settings.temperature - 1e-4
        if "gain" in self.signals:
            nats = self.settings.gain + 1e-5
        return odds, nats

    def signals_of(
        self,
        output: HeadOutput,
        loop: int,
        logits: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> ExitSignals:
        """One row's signals after a loop."""
        return ExitSignals(*calibrated(*output, loop, self.settings), logits, previous)

    def stops(self, loop: int, signals: ExitSignals) -> Any:
        """True where a token exits after this loop, counted from 1; shaped as the confidence.

        One bool where the rule looks at nothing.
        """
        stops: Any = loop >= self.max_loops
        if self.rule is not None and self.min_loops <= loop < self.max_loops:
            values = {name: SIGNALS[name].value(signals) for name in self.signals}
            stops = stops | self.may_stop(values)
        return stops

    def may_stop(self, values: Mapping[str, Any]) -> Any:
        """True where one of the rule's signals is on the stopping side of its threshold.

        values: by the signal's name, of any shape; bounds on the depth aside.
        """
        stops: Any = False
        for name in self.signals:
            stops = stops | SIGNALS[name].stops(values[name], getattr(self.settings, name))
        return stops

    def depths(self, values: Mapping[str, Tensor]) -> Tensor:
        """The loop after which each token exits, (tokens,), where all loops were run.

        values: each signal's, (loops, tokens).
        """
        some = next(iter(values.values()))[: self.max_loops]
        stops = torch.zeros_like(some, dtype=torch.bool)
        return exit_depths(
            stops | self.may_stop({name: part[: self.max_loops] for name, part in values.items()}),
            self.min_loops,
        )

    def passes(self, loops: float) -> tuple[float, float, float]:
        """(readouts, confidence evaluations, gain evaluations) of a token of so many loops.

        Linear in the loops. The compiled kernel needs no more; torch evaluates both outputs of the
        head at once.
        """
        checks = max(1, loops - self.min_loops + 1)
        return (
            loops if self.reads_logits else 1,
            checks if "confidence" in self.signals else 1,
            checks if "gain" in self.signals else 0,
        )

    def describe(self) -> dict[str, Any]:
        """For reports: the rule, its thresholds and bounds."""
        if self.rule is None:
            return {"rule": "fixed", "loops": self.max_loops}
        return {
            "rule": self.rule,
            **{name: getattr(self.settings, name) for name in self.signals},
            "min_loops": self.min_loops,
            "max_loops": self.max_loops,
            "kv_policy": self.settings.kv_policy,
        }


def exit_depths(stops: Tensor, min_loops: int = 1) -> Tensor:
    """The loop after which each token exits, (tokens,), from 1; the last where nothing stops it.

    stops: (loops, tokens), True where a token may stop.
    """
    stops = stops.clone()
    stops[: min_loops - 1] = False
    stops[-1] = True
    return stops.int().argmax(0) + 1


def fixed_exit(loops: int, settings: ExitSettings) -> Exit:
    """Every token runs exactly so many loops."""
    return Exit(loops, loops, settings)
