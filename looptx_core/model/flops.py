"""A model's FLOPs and parameters, heads included."""

from __future__ import annotations

from dataclasses import dataclass, replace

from looptx_core.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token, two per multiply-add, by part."""

    prelude: int
    loop: int
    readout: int
    """The coda, and the head's product with the vocabulary."""
    confidence: int
    """The confidence head's log-odds."""
    gain: int
    """The confidence head's predicted gain; 0 if it has no units of its own."""

    def at(
        self, loops: float, readouts: float = 1, confidences: float = 1, gains: float = 0
    ) -> float:
        """FLOPs of a token with this many loops, readouts and evaluations of the confidence head.

        confidences: at least 1, as every token reports its confidence.
        """
        if not self.gain:
            confidences = max(confidences, gains)
        return (
            self.prelude + loops * self.loop + readouts * self.readout
            + confidences * self.confidence + gains * self.gain
        )  # fmt: skip


def token_flops(config: ModelConfig, context: float) -> TokenFlops:
    """FLOPs of one token that attends to `context` tokens, on average half a sequence's length."""
    heads, width = config.n_heads, config.head_dim
    attention = (
        config.d_model * (heads + 2 * config.n_kv_heads) * width + heads * width * config.d_model
    )
    scores = 2 * context * heads * width
    block = int(2 * (attention + 3 * config.d_model * config.d_ff + scores))
    unit = 2 * (2 * config.d_model + 1)  # of the confidence head: hidden, gate, and its output
    return TokenFlops(
        prelude=config.prelude_layers * block,
        loop=config.core_layers * block,
        readout=config.coda_layers * block + 2 * config.d_model * config.vocab_size,
        confidence=config.confidence_units * unit,
        gain=config.gain_units * unit,
    )


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model of this shape, tied ones counted once; allocates no weights."""
    from looptx_core.model.empty_weights import init_empty_weights
    from looptx_core.model.loop import LoopedTransformer

    if config.linear in ("packed", "int8"):  # whose weights are buffers
        config = replace(config, linear="ternary" if config.linear == "packed" else "float")
    with init_empty_weights():
        return sum(p.numel() for p in LoopedTransformer(config).parameters())
