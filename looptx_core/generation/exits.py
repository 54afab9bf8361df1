"""When a token stops looping: the exit rules, each a signal or two against their thresholds.

A signal that `reads_logits` needs the coda and the head at every loop; the others look at
the confidence head alone, so that deciding costs no product with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import EXIT_RULES, ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.model.cache import POLICIES


class Readout(NamedTuple):
    """What a rule may look at after a loop, for the rows that still run."""

    confidence: Tensor
    """(rows,), the calibrated probability that the top token is right."""
    gain: Tensor
    """(rows,), nats that the next loop is predicted to bring."""
    logits: Tensor | None = None
    """(rows, vocab_size), for the rules that read them."""
    previous: Tensor | None = None
    """The last loop's logits, (rows, vocab_size); None at the first loop."""

    def rows(self, index: Tensor) -> Readout:
        """The same for some of the rows."""
        return Readout(
            self.confidence[index],
            self.gain[index],
            None if self.logits is None else self.logits[index],
            None if self.previous is None else self.previous[index],
        )


def calibrated(
    logit: Tensor, gain: Tensor, loop: int, settings: ExitSettings
) -> tuple[Tensor, Tensor]:
    """The confidence head's words after a loop as probability and nats; shapes stay."""
    if settings.gain_slope:
        place = min(loop, len(settings.gain_slope)) - 1
        gain = settings.gain_slope[place] * gain + settings.gain_offset[place]
    return torch.sigmoid(logit / settings.temperature), gain


class Signal(NamedTuple):
    """A number for each row, and on which side of its threshold a token may stop."""

    value: Callable[[Readout], Tensor]
    """(rows,)."""
    at_least: bool = False
    """Stop at the threshold or above; else below it."""
    reads_logits: bool = False

    def stops(self, value: Tensor, threshold: float) -> Tensor:
        """True where a token may stop; shaped as `value`."""
        return value >= threshold if self.at_least else value < threshold


def _divergence(read: Readout) -> Tensor:
    """Huginn's (arXiv 2502.05171): KL from the last loop's distribution to this one's, in nats."""
    assert read.logits is not None
    if read.previous is None:
        return torch.full_like(read.confidence, torch.inf)
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

    def judges(self, loop: int) -> bool:
        """Whether the rule has a say after this loop."""
        return self.rule is not None and self.min_loops <= loop < self.max_loops

    def stops(self, loop: int, read: Readout) -> Tensor:
        """(rows,), True for the rows that leave after this loop, counted from 1."""
        stops = torch.full_like(read.confidence, loop >= self.max_loops, dtype=torch.bool)
        if self.judges(loop):
            for name in self.signals:
                signal = SIGNALS[name]
                stops |= signal.stops(signal.value(read), getattr(self.settings, name))
        return stops

    def cost(self, loops: float) -> tuple[float, float]:
        """Read-outs and judgements that a token of so many loops took; linear in the loops."""
        if self.rule is None:
            return 1, 1
        return loops if self.reads_logits else 1, max(1, loops - self.min_loops + 1)

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


def leaving(exits: Sequence[Exit], loop: int, read: Readout) -> Tensor:
    """(rows,), True where each row's own exit lets it go after this loop."""
    kinds = set(exits)
    if len(kinds) == 1:
        return exits[0].stops(loop, read)
    gone = torch.zeros_like(read.confidence, dtype=torch.bool)
    for kind in kinds:
        rows = [row for row, own in enumerate(exits) if own == kind]
        index = torch.tensor(rows, device=gone.device)
        gone[index] = kind.stops(loop, read.rows(index))
    return gone


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
    if rule not in RULES:
        raise UsageError(f"--exit {rule}: not one of {', '.join(EXIT_RULES)}")
    if policy not in POLICIES:
        raise UsageError(f"--kv-policy {policy}: not one of {', '.join(POLICIES)}")
    settings = replace(settings, rule=rule, kv_policy=policy)
    if options.threshold is not None:
        threshold: dict[str, Any] = {"confidence" if rule == "auto" else rule: options.threshold}
        settings = replace(settings, **threshold)
    if options.loops != "auto":
        if options.loops < 1:
            raise UsageError(f"--loops {options.loops}: a depth is at least 1, or 'auto'")
        return fixed_exit(options.loops, settings)
    deepest = config.max_loops if options.max_loops is None else options.max_loops
    if not 1 <= options.min_loops <= deepest:
        raise UsageError(
            f"--min-loops {options.min_loops} --max-loops {deepest}: "
            "need 1 <= --min-loops <= --max-loops"
        )
    return Exit(options.min_loops, deepest, settings, rule)
