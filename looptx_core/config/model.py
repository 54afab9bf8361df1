"""What a looped model is: the numbers that fix its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.media import (
    AudioConfig,
    DrawConfig,
    SpeakConfig,
    VideoConfig,
    WrittenConfig,
)
from looptx_core.config.rope import RopeScaling
from looptx_core.errors import UsageError
from looptx_core.schema import typed

FORMAT_VERSION = 3
"""Of the model folders that are written."""
FIRST_FORMAT = 3
"""The oldest format that is read: earlier ones were in no release."""


InjectionKind = Literal["decay", "bridge", "half_steps", "norm", "streams", "add", "none"]
MOST_PIXELS = 1 << 24
"""Pixels of a picture as a model sees it, its patches together."""
_MOST = {
    **dict.fromkeys(("prelude_layers", "core_layers", "coda_layers", "vision_layers"), 10_000),
    **dict.fromkeys(("d_model", "vision_width", "d_ff", "head_dim", "confidence_width"), 1 << 20),
    **{"vocab_size": 1 << 24, "n_heads": 1 << 16, "max_loops": 1 << 16, "max_seq_len": 1 << 31},
    **{"streams": 64, "gain_width": 1 << 20, "patch_size": 1 << 12, "max_patches": 1 << 20},
    **dict.fromkeys(("memory_window", "memory_block"), 1 << 20),
}
"""What no model comes near, so that a damaged config.json asks for no more memory than there is."""
_MEMORY_KEYS = (
    "memory", "memory_window", "memory_block", "memory_per_loop", "infini_delta",
)  # fmt: skip
SECTIONS: dict[str, type] = {
    "scaled_rope": RopeScaling, "local_attention": LocalAttention, "audio": AudioConfig,
    "video": VideoConfig, "draw": DrawConfig, "speak": SpeakConfig,
}  # fmt: skip
"""The classes of the sections inside a model's configuration, by key."""


STORED_AS = {
    "ternary": "ternary weights, trained through floats",
    "packed": "ternary weights, two bits each",
    "int8": "int8 weights, a scale for each row",
}
"""For people: the kinds of `ModelConfig.linear` that are not plain floats."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a looped transformer: prelude, a core that is iterated, coda.

    Raises `UsageError` for values that fit no model.
    """

    vocab_size: int = 2048
    """Number of token ids, special tokens included."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 2
    """Key and value heads; each serves n_heads / n_kv_heads query heads (GQA, arXiv 2305.13245)."""
    head_dim: int = 32
    """Width of one head; even, for RoPE."""
    d_ff: int = 384
    """Width of the GeGLU layer (arXiv 2002.05202)."""
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    """Of the gate: gelu; gelu_tanh, its approximation by tanh; or silu as in SwiGLU. The last two
    are for weights that were trained so."""
    prelude_layers: int = 1
    """Blocks before the loop, run once."""
    core_layers: int = 2
    """Blocks inside the loop."""
    coda_layers: int = 1
    """Blocks after the loop, run once for each read-out."""
    loops: int = 1
    """Depth of a plain call, `model(ids)`. An untrained model has 1; training stores the deepest
    depth that it trained."""
    max_loops: int = 10
    """The most loops that this model is trained for."""
    confidence_width: int = 0
    """Hidden units of the confidence head that tell how sure a token is; 0: an eighth of d_model,
    16 at least."""
    gain_width: int = 0
    """Its units that tell what one more loop would bring, asked for after every loop; 0: a
    sixteenth of d_model, 8 at least."""
    injection: InjectionKind = "decay"
    """How the prelude's output enters each loop; see `looptx_core.model.injection.Injection`."""
    retain: float = 0.88
    """decay: the share of the state that a loop keeps before any training, between 0 and 1; the
    rest is the embedding's."""
    streams: int = 4
    """streams: how many residual streams one loop hands on to the next."""
    qk_norm: bool = True
    """RMSNorm on queries and keys (arXiv 2302.05442)."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Whether this norm is of each head or of all heads together."""
    norm_position: Literal["before", "after", "both"] = "before"
    """Whether a block's norms stand before attention and feed-forward layer, after them and before
    their sum with the residual stream (OLMo 2, arXiv 2501.00656), or in both places (Gemma 3)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (arXiv 2104.09864)."""
    # Not `rope_scaling`: transformers' configurations, which hold these keys too, translate that.
    scaled_rope: RopeScaling = field(default_factory=RopeScaling)
    """How these frequencies are lowered for long texts."""
    local_attention: LocalAttention = field(default_factory=LocalAttention)
    """Layers that attend within a window, with rotary frequencies of their own."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in Qwen2."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    max_seq_len: int = 2048
    """Longest sequence, prompt and generated tokens together."""
    dropout: float = 0.0
    """Dropout on each residual branch, in training only."""
    tie_embeddings: bool = True
    """One matrix serves as embedding and as output head."""
    linear: Literal["float", "ternary", "packed", "int8"] = "float"
    """The blocks' linear layers: float; ternary, trained through latent float weights; packed, the
    same with two bits a weight, to run; or int8, with the embedding and the head, to run. See
    `looptx_core.model.bitnet` and `looptx_core.model.int8`."""

    memory: Literal["none", "infini", "delta"] = "none"
    """What the core remembers beyond a window of exact attention: nothing, and attention is full;
    Infini-attention (arXiv 2404.07143); or a gated delta rule (arXiv 2412.06464)."""
    memory_window: int = 128
    """Tokens that a layer with a memory attends to exactly, a multiple of memory_block."""
    memory_block: int = 64
    """Tokens that leave this window, and are written into the memory, at once."""
    memory_per_loop: bool = False
    """Each loop has a memory of its own, for ablations; else all loops of a layer share one."""
    infini_delta: bool = False
    """infini: write only what the memory does not return yet, the paper's Linear + Delta."""

    vision_layers: int = 0
    """Blocks of the encoder of pictures; 0: the model reads text only."""
    vision_width: int = 128
    """Width of that encoder, a multiple of head_dim."""
    patch_size: int = 8
    """Height and width of a patch, pixels."""
    max_patches: int = 64
    """A picture is scaled, in its own proportions, to as many patches as fit in this number."""
    image_token: int = 2
    """The token whose place a patch takes."""
    image_attention: Literal["both", "causal"] = "both"
    """Patches of a picture see each other, or only those before."""
    reconstruct: bool = False
    """A head that draws hidden patches back; set by `mask_patches`."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """How the model hears."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """How the model watches."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    """How the model draws."""
    speak: SpeakConfig = field(default_factory=SpeakConfig)
    """How the model speaks."""
    media: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Settings of further media by name; each has a folder in `looptx_core.media`."""

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():  # as a file has them
            given = getattr(self, name)
            if not isinstance(given, section):
                where = f"model configuration: {name}"
                made: Any = typed(section, given, where, mend="mend it", error=UsageError)
                object.__setattr__(self, name, made)

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise UsageError(f"model configuration: {what}")

        for name in ("vocab_size", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff",
                     "core_layers", "loops", "max_loops", "max_seq_len"):  # fmt: skip
            need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("prelude_layers", "coda_layers", "confidence_width", "gain_width"):
            need(getattr(self, name) >= 0, f"{name} must not be negative")
        for name, most in _MOST.items():
            need(getattr(self, name) <= most, f"{name} is at most {most:,}, not "
                                              f"{getattr(self, name):,}")  # fmt: skip
        pixels = self.max_patches * self.patch_size**2
        need(pixels <= MOST_PIXELS, f"max_patches x patch_size^2 is {pixels:,} pixels a picture, "
                                    f"and the limit is {MOST_PIXELS:,}")  # fmt: skip
        need(self.vision_layers == 0 or 0 <= self.image_token < self.vocab_size,
             f"image_token {self.image_token} is no token of {self.vocab_size}")  # fmt: skip
        need(self.norm_eps >= 0 and self.rope_theta > 0, "norm_eps and rope_theta must be above 0")
        need(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
        )
        need(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, not {self.head_dim}")
        need(
            self.loops <= self.max_loops,
            f"loops ({self.loops}) must not exceed max_loops ({self.max_loops})",
        )
        need(
            self.injection in get_args(InjectionKind),
            f"injection must be one of {', '.join(get_args(InjectionKind))}, not "
            f"{self.injection!r}",
        )
        need(
            self.qk_norm_over in ("head", "all"),
            f"qk_norm_over must be head or all, not {self.qk_norm_over!r}",
        )
        need(
            self.norm_position in ("before", "after", "both"),
            f"norm_position must be before, after or both, not {self.norm_position!r}",
        )
        need(
            self.activation in ("gelu", "gelu_tanh", "silu"),
            f"activation must be gelu, gelu_tanh or silu, not {self.activation!r}",
        )
        need(
            self.linear in ("float", "ternary", "packed", "int8"),
            f"linear must be float, ternary, packed or int8, not {self.linear!r}",
        )
        need(self.streams >= 2, f"streams must be at least 2, not {self.streams}")
        need(0.0 < self.retain < 1.0, f"retain must lie between 0 and 1, not {self.retain}")
        for name in ("patch_size", "max_patches", "vision_width"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        need(
            self.vision_layers == 0 or self.vision_width % self.head_dim == 0,
            f"vision_width ({self.vision_width}) must be a multiple of head_dim ({self.head_dim})",
        )
        need(
            self.image_attention in ("both", "causal"),
            f"image_attention must be both or causal, not {self.image_attention!r}",
        )
        need(
            not self.audio.layers
            or (self.audio.width % self.head_dim == 0 and self.audio.token < self.vocab_size),
            f"audio.width ({self.audio.width}) must be a multiple of head_dim ({self.head_dim}), "
            f"and audio.token ({self.audio.token}) a token of {self.vocab_size}",
        )
        need(
            not self.video.frames
            or (self.vision_layers > 0 and self.video.token < self.vocab_size),
            "video.frames needs the encoder of pictures, vision_layers, and video.token a token "
            f"of {self.vocab_size}",
        )
        draw = self.draw
        need(
            not draw.codec or (self.vision_layers > 0 and draw.token < self.vocab_size),
            "draw needs the encoder of pictures, vision_layers, and draw.token a token of "
            f"{self.vocab_size}",
        )
        speak = self.speak
        need(
            not speak.codec or (self.audio.layers > 0 and speak.closes < self.vocab_size),
            "speak needs the encoder of recordings, audio.layers, and speak.closes a token of "
            f"{self.vocab_size}",
        )
        for written in self.written:
            need(
                not written.first_code or written.ids.stop <= self.vocab_size,
                f"{written.codes} codes from {written.first_code} on are no tokens of "
                f"{self.vocab_size}",
            )
        need(
            isinstance(self.media, Mapping)
            and all(isinstance(section, Mapping) for section in self.media.values()),
            "media must hold a section of settings for each medium",
        )
        need(
            self.memory in ("none", "infini", "delta"),
            f"memory must be none, infini or delta, not {self.memory!r}",
        )
        need(self.memory_block >= 1, f"memory_block must be at least 1, not {self.memory_block}")
        need(
            self.memory_window >= 1 and self.memory_window % self.memory_block == 0,
            f"memory_window ({self.memory_window}) must be a multiple of memory_block "
            f"({self.memory_block})",
        )
        need(
            self.memory == "none" or not self.local_attention.window,
            "a memory has a window of its own, so local_attention.window must be 0",
        )
        need(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def written(self) -> tuple[WrittenConfig, ...]:
        """The sections of the media that the model writes as a codec's codes."""
        return tuple(section for section in (self.draw, self.speak) if section.codec)

    @property
    def all_codes(self) -> int:
        """How many tokens are codes of a codec."""
        return sum(section.codes for section in self.written)

    @property
    def has_memory(self) -> bool:
        """Whether the model attends within a window and remembers what left it."""
        return self.memory != "none"

    @property
    def context_limit(self) -> int | None:
        """The most tokens of a text; None for a model with a memory, which reads without end."""
        return None if self.has_memory else self.max_seq_len

    @property
    def confidence_units(self) -> int:
        """Hidden units of the confidence head that tell how sure a token is."""
        return self.confidence_width or max(16, self.d_model // 8)

    @property
    def gain_units(self) -> int:
        """Hidden units of the confidence head that tell the gain."""
        return self.gain_width or max(8, self.d_model // 16)

    @property
    def state_width(self) -> int:
        """Width of what one loop hands on to the next."""
        return self.d_model * (self.streams if self.injection == "streams" else 1)

    def effective_layers(self, loops: int) -> int:
        """Blocks that a token passes at a given number of loops."""
        return self.prelude_layers + loops * self.core_layers + self.coda_layers

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json; media, memory and streams that the model has not have none."""
        found = asdict(self)
        absent = [name for name, part in SECTIONS.items() if getattr(self, name) == part()]
        if self.memory == "none":
            absent += _MEMORY_KEYS
        if self.injection != "streams":
            absent.append("streams")
        for name in (*absent, *(() if self.media else ("media",))):
            del found[name]
        return found

    @classmethod
    def keys(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def fitting_memory(seq_len: int) -> dict[str, int]:
    """The keys of a memory's window and block that suit sequences of this length in training.

    Gates move only if a memory is written and read several times in a sequence: here in
    about eight blocks, of 64 tokens at most, of which the window holds two.
    """
    block = min(64, max(8, 1 << max(1, seq_len // 8).bit_length() - 1))
    return {"model.memory_window": 2 * block, "model.memory_block": block}
