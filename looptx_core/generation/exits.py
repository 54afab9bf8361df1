"""When a token stops looping: the exit rules, each a small function of a read-out.

A rule with `reads_logits` needs the coda and the head at every loop; the others look at the
confidence head alone, so that deciding costs no product with the vocabulary.
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


class Rule(NamedTuple):
    """`stops(readout, settings)` is (rows,), True where a token may stop."""

    stops: Callable[[Readout, ExitSettings], Tensor]
    reads_logits: bool = False


def _confident(read: Readout, settings: ExitSettings) -> Tensor:
    return read.confidence >= settings.confidence


def _no_gain(read: Readout, settings: ExitSettings) -> Tensor:
    return read.gain < settings.gain


def _auto(read: Readout, settings: ExitSettings) -> Tensor:
    return _confident(read, settings) | _no_gain(read, settings)


def _settled(read: Readout, settings: ExitSettings) -> Tensor:
    """Huginn's rule (arXiv 2502.05171): KL from the last loop's distribution to this one's."""
    assert read.logits is not None
    if read.previous is None:
        return torch.zeros_like(read.confidence, dtype=torch.bool)
    now, before = read.logits.log_softmax(-1), read.previous.log_softmax(-1)
    return (now.exp() * (now - before)).sum(-1) < settings.kl


def _sharp(read: Readout, settings: ExitSettings) -> Tensor:
    assert read.logits is not None
    logs = read.logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) < settings.entropy


def _probable(read: Readout, settings: ExitSettings) -> Tensor:
    assert read.logits is not None
    return read.logits.softmax(-1).amax(-1) >= settings.maxprob


RULES = {
    "auto": Rule(_auto),
    "confidence": Rule(_confident),
    "gain": Rule(_no_gain),
    "kl": Rule(_settled, reads_logits=True),
    "entropy": Rule(_sharp, reads_logits=True),
    "maxprob": Rule(_probable, reads_logits=True),
}


@dataclass(frozen=True)
class Exit:
    """How deep a token goes: between two depths, by a rule; a fixed depth has no rule."""

    min_loops: int
    max_loops: int
    settings: ExitSettings
    rule: str | None = None

    @property
    def reads_logits(self) -> bool:
        return self.rule is not None and RULES[self.rule].reads_logits

    def judges(self, loop: int) -> bool:
        """Whether the rule has a say after this loop."""
        return self.rule is not None and self.min_loops <= loop < self.max_loops

    def stops(self, loop: int, read: Readout) -> Tensor:
        """(rows,), True for the rows that leave after this loop, counted from 1."""
        if self.rule is not None and self.judges(loop):
            return RULES[self.rule].stops(read, self.settings)
        return torch.full_like(read.confidence, loop >= self.max_loops, dtype=torch.bool)

    def cost(self, loops: int) -> tuple[int, int]:
        """Read-outs and judgements that a token of so many loops took."""
        if self.rule is None:
            return 1, 1
        return loops if self.reads_logits else 1, max(1, loops - self.min_loops + 1)

    def describe(self) -> dict[str, Any]:
        """For reports: the rule, its thresholds and bounds."""
        if self.rule is None:
            return {"rule": "fixed", "loops": self.max_loops}
        names = ("confidence", "gain") if self.rule == "auto" else (self.rule,)
        return {
            "rule": self.rule,
            **{name: getattr(self.settings, name) for name in names},
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
