"""A model's FLOPs and parameters, heads included."""

from __future__ import annotations

from dataclasses import dataclass, replace

from looptx_core.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token, two per multiply-add, by part."""

    prelude: int
    """With what a memory costs once a token, its folding."""
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
    seen = min(context, config.memory_window) if config.has_memory else context
    products = attention + 3 * config.d_model * config.d_ff
    first, end = config.prelude_layers, config.prelude_layers + config.core_layers

    def blocks(layers: range) -> int:
        local = [layer for layer in layers if config.local_attention.has(layer)]
        near, far = len(local), len(layers) - len(local)
        columns = near * min(seen, config.local_attention.window) + far * seen
        return int(2 * (len(layers) * products + 2 * columns * heads * width))

    read, fold = _memory_products(config)
    unit = 2 * (2 * config.d_model + 1)  # of the confidence head: hidden, gate, and its output
    return TokenFlops(
        prelude=blocks(range(first)) + config.core_layers * fold,
        loop=blocks(range(first, end)) + config.core_layers * read + _stream_products(config),
        readout=blocks(range(end, end + config.coda_layers))
        + 2 * config.d_model * config.vocab_size,
        confidence=config.confidence_units * unit,
        gain=config.gain_units * unit,
    )


def _memory_products(config: ModelConfig) -> tuple[int, int]:
    """FLOPs of a core layer's memory for one token: of a loop's read, and of its folding."""
    if not config.has_memory:
        return 0, 0
    width, heads = config.head_dim, config.n_kv_heads
    gate = config.n_heads * config.d_model if config.memory == "delta" else 0
    written = 2 * width * width
    if config.memory == "delta":
        written += config.memory_block * width + 4 * width
    folds = config.max_loops if config.memory_per_loop else 1
    return 2 * (config.n_heads * width * width + gate), 2 * folds * heads * written


def _stream_products(config: ModelConfig) -> int:
    """FLOPs of reading and writing a token's streams in a loop: the gates and two weighted sums."""
    if config.injection != "streams":
        return 0
    return 2 * config.state_width * 3 * (config.streams + 1)


def state_bytes(config: ModelConfig, loops: int) -> int:
    """Bytes of what one text's layers hold while generating, in float32 and a slot for each loop.

    Of `max_seq_len` tokens; of a text of any length for a model with a memory.
    """
    columns = config.memory_window if config.has_memory else config.max_seq_len
    heads, width = config.n_kv_heads, config.head_dim
    window = 2 * 4 * columns * config.effective_layers(loops) * heads * width
    if not config.has_memory:
        return window
    norm = width if config.memory == "infini" else 0
    each = 4 * heads * (width * width + norm) + 8  # with the document's number
    return window + config.core_layers * (loops if config.memory_per_loop else 1) * each


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model of this shape, tied ones counted once; allocates no weights."""
    from looptx_core.model.empty_weights import init_empty_weights
    from looptx_core.model.loop import LoopedTransformer

    if config.linear in ("packed", "int8"):  # whose weights are buffers
        config = replace(config, linear="ternary" if config.linear == "packed" else "float")
    with init_empty_weights():
        return sum(p.numel() for p in LoopedTransformer(config).parameters())
