"""What a model costs, counted: parameters, FLOPs and bytes, heads included."""

from __future__ import annotations

from dataclasses import dataclass, replace

from looptx_core.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token, two per multiply-add, by part."""

    prelude: int
    loop: int
    readout: int
    """Coda, final norm's product with the vocabulary."""
    confidence: int
    """How sure the token is."""
    gain: int
    """What one more loop would bring; 0 where the confidence's units tell it too."""

    def at(
        self, loops: float, readouts: float = 1, confidences: float = 1, gains: float = 0
    ) -> float:
        """A token of so many loops, read out so many times, with so many looks of the confidence
        head: one at least tells how sure the token is."""
        if not self.gain:
            confidences = max(confidences, gains)
        return (
            self.prelude + loops * self.loop + readouts * self.readout
            + confidences * self.confidence + gains * self.gain
        )  # fmt: skip


def token_flops(config: ModelConfig, context: float) -> TokenFlops:
    """FLOPs of one token that attends to `context` tokens (mean of a causal sequence: T / 2)."""
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
    """Parameters of a model of this shape, tied ones once, without building its tensors."""
    from looptx_core.model.empty_weights import init_empty_weights
    from looptx_core.model.loop import LoopedTransformer

    if config.linear == "packed":  # whose weights are no parameters of torch's
        config = replace(config, linear="ternary")
    with init_empty_weights():
        return sum(p.numel() for p in LoopedTransformer(config).parameters())
