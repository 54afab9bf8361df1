"""How a model generates: when a token stops looping, and how the next one is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from looptx_core.errors import UsageError

EXIT_RULES = ("auto", "confidence", "gain", "kl", "entropy", "maxprob")
ExitRule = Literal["auto", "confidence", "gain", "kl", "entropy", "maxprob"]


@dataclass(frozen=True)
class ExitSettings:
    """A model's own stored exit rule and its thresholds; part of `generation_config.json`."""

    rule: ExitRule = "auto"
    """auto stops when confident or when one more loop is predicted to bring nothing."""
    confidence: float = 0.9
    """Stop at this calibrated probability that the top token is right, or above."""
    gain: float = 0.01
    """Stop when one more loop is predicted to lower the loss by less, in nats."""
    kl: float = 5e-4
    """Stop when KL(this loop's distribution || the last loop's) is below, in nats."""
    entropy: float = 0.5
    """Stop when the distribution's entropy is below, in nats."""
    maxprob: float = 0.9
    """Stop when the most likely token's probability is at least this."""
    min_loops: int = 1
    """No token stops before this loop: training read out none that was earlier."""
    temperature: float = 1.0
    """Calibration of the head's confidence: its log-odds are divided by this (arXiv 1706.04599)."""
    confidence_offset: float = 0.0
    """Calibration of the head's confidence: what its log-odds, divided, are moved by."""
    stated: tuple[float, ...] = ()
    """Calibration of the confidence that is stated with a token, which the exit has no need of: its
    log-odds are stated[0] + stated[1] * the head's + stated[2] * those of the most likely token's
    own probability, as the logits are read by then; none states the head's, see `temperature`."""
    gain_slope: tuple[float, ...] = ()
    """Calibration of the gain: after loop t it is exp(offset[t] + slope[t] * predicted) times the
    state's relative change to the power[t]. Deeper loops take the last; none leaves the prediction
    as it is."""
    gain_power: tuple[float, ...] = ()
    """See `gain_slope`."""
    gain_offset: tuple[float, ...] = ()
    """See `gain_slope`."""
    kv_policy: str = "fill"
    """What an early exit leaves in the deeper cache slots; see `looptx_core.model.cache`."""
    kv_type: str = "float"
    """How the cache holds its numbers: float, int8 or int4; see `looptx_core.model.rounding`."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"exit: temperature must be above 0, not {self.temperature}")
        if self.min_loops < 1:
            raise UsageError(f"exit: min_loops {self.min_loops}: a depth is at least 1")


@dataclass(frozen=True)
class GenerationOptions:
    """One request's settings. `None` means the model's own."""

    max_new_tokens: int = 128
    """The most tokens to generate."""
    loops: int | Literal["auto"] = "auto"
    """A fixed depth, or auto: each token stops by the exit rule."""
    exit: ExitRule | None = None
    """The exit rule; absent: the model's own."""
    threshold: float | None = None
    """The exit rule's threshold; absent: the model's own. With auto it is the confidence's."""
    min_loops: int | None = None
    """No token stops before this loop; absent: the model's own."""
    max_loops: int | None = None
    """No token goes deeper than this; absent: the model's maximum."""
    prompt_loops: int | None = None
    """Depth of the prompt; absent: full depth."""
    kv_policy: str | None = None
    """fill or last; absent: the model's own."""
    kv_type: str | None = None
    """float, int8 or int4; absent: the model's own."""
    speculate: int = 0
    """Draft so many tokens by shallow loops, and verify them at full depth in one pass; 0: none."""
    draft_loops: int | None = None
    """Loops of a draft; absent: the fewest that the model may stop after."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this total probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely one's probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens seen before, multiply the negative ones (CTRL)."""
    seed: int = 0
    """Seed of this request's own random generator."""
    stop: tuple[str, ...] = field(default=())
    """Stop before any of these strings."""
    guidance: float = 1.0
    """How far the codes of a picture follow its text; 1: as the model has them. Each code costs
    twice as much otherwise."""
    draw_steps: int = 8
    """Steps of the diffusion that makes a picture or speech of codes; 1 is blurred and fastest."""
    draw_guidance: float = 1.0
    """How far that diffusion goes from what it sees without codes; 1: no further than with them."""
    ignore_eos: bool = False
    """Go on after the document's end token."""
