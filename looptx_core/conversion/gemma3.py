"""Gemma 3 (arXiv 2503.19786): what its configuration says, and what its weights leave unsaid.

Four parts need no place of their own in a looped model, for they are products or sums with weights:
its RMSNorms add 1 to their weights, its embeddings are scaled by sqrt(width), its head, which is
tied to them, is not, and its scores are divided by sqrt(query_pre_attn_scalar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.documents import short
from looptx_core.errors import DataError
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import RMSNorm

KIND = "gemma3_text"
"""transformers' `model_type`."""
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_WIDTH = 256
_PATTERN = 6
_LAYERS_OF_27B = 62
"""By which llama.cpp knows the only one that divides scores by another width than its heads'."""
_DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": _WIDTH,
    "sliding_window": 4096, "sliding_window_pattern": _PATTERN, "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}  # fmt: skip
"""transformers' own, which its folders leave out."""
Need = Callable[[bool, str], None]
"""Raises a `DataError` that names a part without a place, unless the first argument is true."""


def complete(settings: Mapping[str, Any], where: str, need: Need) -> dict[str, Any]:
    """The settings of a config.json with all that it leaves out, under the names of a Llama's, and
    the section `local_attention`."""
    given = {key: value for key, value in settings.items() if value is not None}
    found = {**_DEFAULTS, **given}
    for name, kinds in (("query_pre_attn_scalar", (int, float)), ("num_hidden_layers", (int,)),
                        ("sliding_window_pattern", (int,))):  # fmt: skip
        if type(found[name]) not in kinds or not 0 < found[name] < 1 << 31:
            raise DataError(f"{where}: {name} is {short(found[name])}; copy the model again")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        need(found.get(name) is None, f"capped logits ({name})")
    need(not found.get("use_bidirectional_attention"), "attention in both directions")
    both = found.get("rope_parameters")
    if isinstance(both, dict) and isinstance(both.get("full_attention"), dict):
        rope, local = both["full_attention"], both.get("sliding_attention") or {}
    else:  # of transformers before 5
        rope, local = found.get("rope_scaling") or {}, {}
    if not isinstance(local, dict):
        raise DataError(f"{where}: sliding_attention is {short(repr(local))}; copy the model again")
    need(local.get("rope_type", "default") == "default", "scaled RoPE in layers with a window")
    every = _every(found, need)
    slides = any((layer + 1) % every if every else True
                 for layer in range(found["num_hidden_layers"]))  # fmt: skip
    return found | {
        "hidden_act": found["hidden_activation"],
        "rope_parameters": {"rope_theta": found["rope_theta"], **rope},
        "local_attention": {
            "window": found["sliding_window"] if slides else 0,
            "every": every,
            "rope_theta": local.get("rope_theta", found["rope_local_base_freq"]),
        },
    }


def _every(settings: Mapping[str, Any], need: Need) -> int:
    """The distance of layers that attend to all; 0 where none does."""
    kinds, layers = settings.get("layer_types"), settings["num_hidden_layers"]
    if kinds is None:
        return int(settings["sliding_window_pattern"])
    what = "layers with windows in an order of no fixed distance (layer_types)"
    need(isinstance(kinds, list) and len(kinds) == layers, what)
    whole = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    every = whole[0] if whole else 0
    expected = ["sliding_attention" if not every or number % every else "full_attention"
                for number in range(1, layers + 1)]  # fmt: skip
    need(kinds == expected, what)
    return every


def of_gguf(values: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a GGUF file says beyond a Llama's, as transformers' config.json has it.

    values: the file's metadata. settings: those that it shares with a Llama. Raises `DataError` for
    a pattern of windows that does not fit the layers.
    """

    def get(name: str, default: Any = None) -> Any:
        return values.get(f"gemma3.{name}", default)

    layers, window = settings["num_hidden_layers"], get("attention.sliding_window")
    key = "attention.sliding_window_pattern"
    slides: Any = get(key, _PATTERN) if window else 1
    if type(slides) is int and slides >= 0:
        slides = [not slides or (layer + 1) % slides > 0 for layer in range(layers)]
    flags = isinstance(slides, list) and all(of in (0, 1) for of in slides)
    if not flags or len(slides) != layers:
        raise DataError(
            f"{where}: gemma3.{key} is {short(repr(slides))}, which is neither a distance nor a "
            f"flag for each of {layers} layers; copy or download the file again"
        )
    return {
        "model_type": KIND,
        "hidden_activation": _DEFAULTS["hidden_activation"],
        "query_pre_attn_scalar": _query_width(
            layers, settings["hidden_size"], settings["num_attention_heads"], settings["head_dim"]
        ),
        "layer_types": ["sliding_attention" if of else "full_attention" for of in slides],
        "rope_parameters": {
            "full_attention": settings["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": get("rope.freq_base_swa", _DEFAULTS["rope_local_base_freq"]),
            },
        },
        "final_logit_softcapping": get("final_logit_softcapping") or None,
        **({"sliding_window": window} if window else {}),
    }


def _query_width(layers: int, width: int, heads: int, head_dim: int) -> int:
    """By the root of which llama.cpp divides the scores."""
    return width // heads if layers == _LAYERS_OF_27B else head_dim


def gguf_values(config: ModelConfig) -> dict[str, Any]:
    """The metadata that `of_gguf` reads, without `gemma3.`, for one loop of a model."""
    local = config.local_attention
    if not local.window:
        return {}
    return {
        "attention.sliding_window": local.window,
        "attention.sliding_window_pattern": local.every,
        "rope.freq_base_swa": float(local.rope_theta),
    }


def unfold(name: str, values: Tensor, config: ModelConfig, layers: int) -> Tensor:
    """What a GGUF file stores for a tensor of a model, into which `fold` put the rest.

    name: the file's. layers: that stand in it. Norms stay as they are, for a file's have the 1.
    """
    scale = math.sqrt(config.d_model)
    width = _query_width(layers, config.d_model, config.n_heads, config.head_dim)
    if name == "token_embd.weight":
        return values / scale
    if name == "output_norm.weight" and config.tie_embeddings:
        return values * scale
    return values * math.sqrt(width / config.head_dim) if "attn_q_norm" in name else values


@torch.no_grad()
def fold(model: LoopedTransformer, settings: Mapping[str, Any]) -> None:
    """Put what the weights leave unsaid into them. settings: as for `complete`.

    In float32, as bfloat16 has too few digits for 1 + weight.
    """
    model.float()
    width: float = settings.get("query_pre_attn_scalar") or _WIDTH
    sharper, scale = math.sqrt(model.config.head_dim / width), math.sqrt(model.config.d_model)
    for blocks in (model.prelude, model.core, model.coda):
        for block in blocks:
            for module in block.modules():
                if isinstance(module, RMSNorm):
                    module.weight.add_(1)
            block.get_submodule("attention.q_norm").get_parameter("weight").mul_(sharper)
    model.norm.weight.add_(1)
    model.embedding.weight.mul_(scale)
    if model.config.tie_embeddings:
        model.norm.weight.div_(scale)
