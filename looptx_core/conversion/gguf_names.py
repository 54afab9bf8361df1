"""What a GGUF file calls the parts of a model, and how it stores queries and keys.

Names go over transformers' in both directions, since readers compare with its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.errors import MissingError

LOOPED = "nanbeige"
"""llama.cpp's architecture of a stack of layers that is run several times."""
GEMMA = "gemma3"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2", LOOPED, GEMMA)
"""Those that are read and written."""
FREQUENCIES = "rope_freqs.weight"
_NEIGHBOURS = ("llama", LOOPED)
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {
    "before": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "after": {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MATRICES = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_LAYER = {**_HEAD_NORMS, **_MATRICES}


def require_gguf(name: str) -> None:
    """Raise `MissingError` where the package is not installed. name: the setting that needs it."""
    try:
        import_module("gguf")
    except ModuleNotFoundError as error:
        raise MissingError(
            f"`{name}` needs the package gguf; pip install 'looptx[gguf]'"
        ) from error


def transformers_name(architecture: str, name: str) -> str:
    """As transformers calls a tensor of a GGUF file; its own name where it has none."""
    position = {"olmo2": "after", GEMMA: "both"}.get(architecture, "before")
    parts = _LAYER | _NORMS[position]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in parts:
        return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"
    return _TOP.get(name, name)


def tensor_names(config: ModelConfig, layers: int, tied: bool) -> Iterator[str]:
    """The tensors of a file with so many layers of this kind. tied: without a head of its own."""
    yield from (name for name in _TOP if not (tied and name == "output.weight"))
    parts = [*_NORMS[config.norm_position], *_MATRICES, *(_HEAD_NORMS if config.qk_norm else ())]
    for layer in range(layers):
        yield from (f"blk.{layer}.{part}.weight" for part in parts)
        if config.qkv_bias:
            yield from (f"blk.{layer}.attn_{part}.bias" for part in "qkv")


def turned_part(architecture: str, name: str) -> str | None:
    """'q' or 'k' for the weights of these that llama.cpp stores in an order of its own.

    For some architectures it rotates neighbouring rows of a head, where transformers and looptx
    rotate rows half a head apart.
    """
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", name)
    return match[1] if match and architecture in _NEIGHBOURS else None


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """(rows, width) with the rows that rotate together half a head apart -> side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def from_neighbours(weight: Tensor, heads: int) -> Tensor:
    """What `to_neighbours` was given."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
