"""When a token stops looping: the exit rules, each a signal or two against their thresholds.

A signal that `reads_logits` needs the coda and the head at every loop; the others look at
the confidence head alone, so that deciding costs no product with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from looptx_core.config.generation import EXIT_RULES, ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.model.cache import POLICIES
from looptx_core.model.rounding import KINDS


class Readout(NamedTuple):
    """What a rule may look at after a loop: of one row, as numbers, or of many."""

    confidence: Tensor | float
    """(...), the calibrated probability that the top token is right."""
    gain: Tensor | float
    """(...), nats that the next loop is predicted to bring."""
    logits: Tensor | None = None
    """(..., vocab_size), for the rules that read them."""
    previous: Tensor | None = None
    """The last loop's logits, (..., vocab_size); None at the first loop."""


Numbers = TypeVar("Numbers", Tensor, float)


def calibrated(
    logit: Numbers, gain: Numbers, change: Numbers, loop: int, settings: ExitSettings
) -> tuple[Numbers, Numbers]:
    """The confidence head's words after a loop as probability and nats; shapes stay.

    change: the state's, `looptx_core.model.confidence.relative_change`.
    """
    if settings.gain_slope:
        place = min(loop, len(settings.gain_slope)) - 1
        slope, power, offset = (
            part[place] for part in (settings.gain_slope, settings.gain_power, settings.gain_offset)
        )
        gain = _exp(offset + slope * gain + power * _log(change))
    return _probability(_odds(logit, settings)), gain


def _odds(logit: Numbers, settings: ExitSettings) -> Numbers:
    """The head's, calibrated."""
    return logit / settings.temperature + settings.confidence_offset


def _exp(x: Numbers) -> Numbers:
    return x.clamp(max=_MOST).exp() if isinstance(x, Tensor) else math.exp(min(x, _MOST))


def _log(x: Numbers) -> Numbers:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def stated(logit: Numbers, sharp: Numbers, settings: ExitSettings) -> Numbers:
    """The probability, told with a token, that the most likely one is right; shapes stay.

    logit: the confidence head's. sharp: `looptx_core.model.confidence.sharpness` of the logits,
    which are read by then. The head has seen what the loops do, the logits how close the others
    are; together they tell hits from misses better than either.
    """
    if not settings.stated:
        return _probability(_odds(logit, settings))
    offset, head, readout = settings.stated
    return _probability(offset + head * logit + readout * sharp)


def _probability(odds: Numbers) -> Numbers:
    if isinstance(odds, Tensor):
        return torch.sigmoid(odds)
    return 1 / (1 + math.exp(-max(odds, _NEVER)))


_MOST = 10.0  # the logarithm of a gain, in nats, that no token has
_NEVER = -500.0  # log-odds of a probability that is 0 and whose inverse is still a float
_LEAST = 1e-15  # a probability that 1 can be told from
_FAR = 1e30  # nothing is beyond it


class Signal(NamedTuple):
    """A number for each row, and on which side of its threshold a token may stop."""

    value: Callable[[Readout], Tensor | float]
    """(...), a number for each row."""
    at_least: bool = False
    """Stop at the threshold or above; else below it."""
    reads_logits: bool = False

    def stops(self, value: Any, threshold: float) -> Any:
        """True where a token may stop; shaped as `value`."""
        return value >= threshold if self.at_least else value < threshold


def _divergence(read: Readout) -> Tensor:
    """Huginn's (arXiv 2502.05171): KL from the last loop's distribution to this one's, in nats."""
    assert read.logits is not None
    if read.previous is None:
        return torch.full_like(read.logits[..., 0], torch.inf)
    now, before = read.logits.log_softmax(-1), read.previous.log_softmax(-1)
    return (now.exp() * (now - before)).sum(-1)


def _entropy(read: Readout) -> Tensor:
    assert read.logits is not None
    logs = read.logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _maxprob(read: Readout) -> Tensor:
    assert read.logits is not None
    return read.logits.softmax(-1).amax(-1)


SIGNALS = {
    "confidence": Signal(lambda read: read.confidence, at_least=True),
    "gain": Signal(lambda read: read.gain),
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
    def first_look(self) -> int:
        """The first loop after which the rule, or the end, is asked for; every later one is too."""
        return self.max_loops if self.rule is None else min(self.min_loops, self.max_loops)

    def next_look(self, loop: int) -> int:
        """The first loop after this one at which something has to be looked at."""
        if self.reads_logits:  # which may compare each loop with the one before
            return loop + 1
        return max(loop + 1, self.first_look)

    def looks(self, before: int, after: int) -> int:
        """How many of the loops from `before` + 1 to `after` end with a look."""
        return max(0, after - max(before, self.first_look - 1))

    def bounds(self) -> tuple[float, float]:
        """The head's log-odds from which on a token may stop, and the nats below which it may.

        Log-odds as they are before calibration, nats after it. A hair too ready to stop, as
        `stops` has the last word.
        """
        odds, nats = _FAR, -_FAR
        if "confidence" in self.signals:
            sure = min(max(self.settings.confidence, _LEAST), 1 - _LEAST)
            odds = math.log(sure / (1 - sure)) - self.settings.confidence_offset
            odds = odds * self.settings.temperature - 1e-4
        if "gain" in self.signals:
            nats = self.settings.gain + 1e-5
        return odds, nats

    def judges(self, loop: int) -> bool:
        """Whether the rule has a say after this loop."""
        return self.rule is not None and self.min_loops <= loop < self.max_loops

    def stops(self, loop: int, read: Readout) -> Any:
        """True where a token leaves after this loop, counted from 1; shaped as the confidence.

        One bool where nothing is read.
        """
        stops: Any = loop >= self.max_loops
        if self.judges(loop):
            for name in self.signals:
                signal = SIGNALS[name]
                stops = stops | signal.stops(signal.value(read), getattr(self.settings, name))
        return stops

    def cost(self, loops: float) -> tuple[float, float, float]:
        """What a token of so many loops needs, linear in the loops: read-outs, and looks at how
        sure it is, one where it stops, and at what one more loop would bring.

        The kernel makes no more of them; torch's moves, for which a look is a call, tell both.
        """
        looks = max(1, loops - self.min_loops + 1)
        return (
            loops if self.reads_logits else 1,
            looks if "confidence" in self.signals else 1,
            looks if "gain" in self.signals else 0,
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


def fixed_exit(loops: int, settings: ExitSettings) -> Exit:
    """Every token runs exactly so many loops."""
    return Exit(loops, loops, settings)


def resolve_exit(settings: ExitSettings, options: GenerationOptions, config: ModelConfig) -> Exit:
    """A request's exit: the model's own settings where the options say nothing.

    Raises `UsageError` for unknown names and depths below 1 or in the wrong order.
    """
    if options.prompt_loops is not None and options.prompt_loops < 1:
        raise UsageError(f"--prompt-loops {options.prompt_loops}: a depth is at least 1")
    rule = options.exit or settings.rule
    policy = options.kv_policy or settings.kv_policy
    kind = options.kv_type or settings.kv_type
    if rule not in RULES:
        raise UsageError(f"--exit {rule}: not one of {', '.join(EXIT_RULES)}")
    if policy not in POLICIES:
        raise UsageError(f"--kv-policy {policy}: not one of {', '.join(POLICIES)}")
    if kind not in KINDS:
        raise UsageError(f"--kv-type {kind}: not one of {', '.join(KINDS)}")
    settings = replace(settings, rule=rule, kv_policy=policy, kv_type=kind)
    if options.threshold is not None:
        threshold: dict[str, Any] = {"confidence" if rule == "auto" else rule: options.threshold}
        settings = replace(settings, **threshold)
    if options.loops != "auto" and options.loops < 1:
        raise UsageError(f"--loops {options.loops}: a depth is at least 1, or 'auto'")
    if options.speculate:
        return _verified(settings, options, config)
    if options.loops != "auto":
        return fixed_exit(options.loops, settings)
    deepest = config.max_loops if options.max_loops is None else options.max_loops
    least = min(settings.min_loops, deepest) if options.min_loops is None else options.min_loops
    if not 1 <= least <= deepest:
        raise UsageError(
            f"--min-loops {least} --max-loops {deepest}: need 1 <= --min-loops <= --max-loops"
        )
    return Exit(least, deepest, settings, rule)


def draft_loops(options: GenerationOptions, full: Exit) -> int:
    """Loops of a draft: the fewest that training read out, where nothing is said."""
    if options.draft_loops is None:
        return max(1, min(full.settings.min_loops, full.max_loops - 1))
    return options.draft_loops


def _verified(settings: ExitSettings, options: GenerationOptions, config: ModelConfig) -> Exit:
    """The depth that verifies drafts: the fixed one asked for, else the deepest allowed."""
    full = options.loops
    if full == "auto":
        full = config.max_loops if options.max_loops is None else options.max_loops
    verified = fixed_exit(full, settings)
    shallow = draft_loops(options, verified)
    if not 1 <= shallow < full:
        raise UsageError(
            f"--draft-loops {shallow}: drafts of 1 to {full - 1} loops go with a depth of {full}"
        )
    if options.kv_policy not in (None, "fill"):
        raise UsageError(
            f"--speculate with --kv-policy {options.kv_policy}: drafts would overwrite what "
            "full depth needs; add --kv-policy fill"
        )
    return replace(verified, settings=replace(settings, kv_policy="fill"))
