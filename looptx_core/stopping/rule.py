"""When a token stops looping: the exit rules, which compare one or two signals to thresholds.

Only `Exit.stops` decides. It takes the numbers of one row or tensors for many. The engine, the
frontier of `inspect-loops` and its traces call it, and kernels get thresholds derived from it
(`Exit.kernel_thresholds`). A signal that `reads_logits` needs the coda and the head at every loop;
the others use the confidence head alone, so that deciding costs no product with the vocabulary.
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

_MIN_PROBABILITY = 1e-15  # 1 minus this still differs from 1 as a float
_UNREACHABLE = 1e30  # a threshold that no signal reaches


class HeadOutput(NamedTuple):
    """The confidence head's output for a row after a loop, before calibration."""

    logit: float
    """Log-odds that the top token is right."""
    gain: float
    """The predicted gain of the next loop."""
    change: float
    """`looptx_core.model.confidence.relative_change` of this loop."""


class ExitSignals(NamedTuple):
    """What a rule may use after a loop: numbers for one row, or tensors for many."""

    confidence: Tensor | float
    """(...), the calibrated probability that the top token is right."""
    gain: Tensor | float
    """(...), nats that the next loop is predicted to gain."""
    logits: Tensor | None = None
    """(..., vocab_size), for rules that read them."""
    previous: Tensor | None = None
    """The logits of the loop before, (..., vocab_size); None at the first loop."""


class Signal(NamedTuple):
    """A number for each row, and the side of its threshold on which a token may stop."""

    value: Callable[[ExitSignals], Tensor | float]
    """(...), a number for each row."""
    at_least: bool = False
    """True: a token may stop at the threshold or above. False: below it."""
    reads_logits: bool = False
    """Whether `value` needs the logits of each loop."""

    def stops(self, value: Any, threshold: float) -> Any:
        """True where a token may stop; shaped as `value`."""
        return value >= threshold if self.at_least else value < threshold


def _divergence(signals: ExitSignals) -> Tensor:
    """KL(this loop's distribution || the one before), in nats, as in Huginn (arXiv 2502.05171)."""
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
"""The signals by name; `ExitSettings` has each one's threshold under the same name."""

RULES = {"auto": ("confidence", "gain"), **{name: (name,) for name in SIGNALS}}
"""The signals of each rule; any one of them lets a token stop."""


@dataclass(frozen=True)
class Exit:
    """How many loops a token runs: `min_loops` to `max_loops`, decided by a rule.

    rule: a key of `RULES`; None for a fixed depth. settings: thresholds and calibration.
    """

    min_loops: int
    max_loops: int
    settings: ExitSettings
    rule: str | None = None

    @property
    def reads_logits(self) -> bool:
        """Whether the rule needs the logits of each loop."""
        return any(SIGNALS[name].reads_logits for name in self.signals)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the rule uses; none at a fixed depth."""
        return () if self.rule is None else RULES[self.rule]

    @property
    def first_check(self) -> int:
        """First loop after which the exit is checked; it is checked after every later loop."""
        return self.max_loops if self.rule is None else min(self.min_loops, self.max_loops)

    def next_check(self, loop: int) -> int:
        """The first loop after this one at which the rule needs something to be computed."""
        if self.reads_logits:  # `kl` compares each loop with the one before
            return loop + 1
        return max(loop + 1, self.first_check)

    def checks(self, before: int, after: int) -> int:
        """How many of the loops from `before` + 1 to `after` end with an exit check."""
        return max(0, after - max(before, self.first_check - 1))

    def kernel_thresholds(self) -> tuple[float, float]:
        """Thresholds for kernels: (log-odds at or above which, nats below which a token may stop).

        The log-odds are the head's output before calibration, the nats are calibrated. Both are
        slightly permissive, because `stops` checks exactly afterwards.
        """
        odds, nats = _UNREACHABLE, -_UNREACHABLE
        if "confidence" in self.signals:
            least = min(max(self.settings.confidence, _MIN_PROBABILITY), 1 - _MIN_PROBABILITY)
            odds = math.log(least / (1 - least)) - self.settings.confidence_offset
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
        """The calibrated signals of one row after a loop."""
        return ExitSignals(*calibrated(*output, loop, self.settings), logits, previous)

    def stops(self, loop: int, signals: ExitSignals) -> Any:
        """True where a token exits after this loop, counted from 1.

        Has the confidence's shape, or is a single bool if no signal decides.
        """
        stops: Any = loop >= self.max_loops
        if self.rule is not None and self.min_loops <= loop < self.max_loops:
            values = {name: SIGNALS[name].value(signals) for name in self.signals}
            stops = stops | self.may_stop(values)
        return stops

    def may_stop(self, values: Mapping[str, Any]) -> Any:
        """True where one of the rule's signals is on the stopping side of its threshold.

        values: each signal's, by its name, of any shape. Does not look at `min_loops` and
        `max_loops`.
        """
        stops: Any = False
        for name in self.signals:
            stops = stops | SIGNALS[name].stops(values[name], getattr(self.settings, name))
        return stops

    def depths(self, values: Mapping[str, Tensor]) -> Tensor:
        """The loop after which each token would exit, (tokens,), from a run of all loops.

        values: each signal's, by its name, (loops, tokens).
        """
        first = next(iter(values.values()))[: self.max_loops]
        stops = torch.zeros_like(first, dtype=torch.bool)
        return exit_depths(
            stops | self.may_stop({name: part[: self.max_loops] for name, part in values.items()}),
            self.min_loops,
        )

    def passes(self, loops: float) -> tuple[float, float, float]:
        """What a token of this many loops costs: (readouts, confidence and gain evaluations).

        The loops may be a mean, hence the floats. The count is the compiled kernel's; torch always
        evaluates both outputs of the confidence head.
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
    """The loop after which each token exits, (tokens,), counted from 1.

    stops: (loops, tokens), True where a token may stop. A token that never may exits after the
    last loop.
    """
    stops = stops.clone()
    stops[: min_loops - 1] = False
    stops[-1] = True
    return stops.int().argmax(0) + 1


def fixed_exit(loops: int, settings: ExitSettings) -> Exit:
    """An exit with which every token runs exactly this many loops."""
    return Exit(loops, loops, settings)
