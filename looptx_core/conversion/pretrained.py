"""A plain pretrained decoder as a looped model: all its layers, some of them in the loop.

One loop is the source itself. Without a core to loop the model has one loop, its middle half in
the core. With one, later loops enter the core through `model.injection: bridge`, which adds
nothing until it is trained; or there is a second one in `half_steps`, which needs no training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from looptx_core.checkpoint.card import stated_license
from looptx_core.checkpoint.folder import LoadedModel, read_chat_template, read_tokenizer
from looptx_core.checkpoint.header import read_header, total_elements
from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.checkpoint.weights import load_weights, refuse_pickle, weight_files
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.rope import ROPE_TYPES, RopeScaling
from looptx_core.conversion import gemma3
from looptx_core.conversion.gguf_names import GEMMA, tensor_names, transformers_name
from looptx_core.documents import is_one_of, read_json, short
from looptx_core.errors import DataError, UsageError
from looptx_core.machine.facts import free_ram
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.loop import LoopedTransformer
from looptx_core.schema import typed

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", gemma3.KIND)
"""transformers' `model_type` of the models that can be expressed exactly."""
WITHOUT_PLACE = {
    "gemma": "embeddings that are scaled",
    "gemma2": "layers whose windows alternate, and capped logits",
    "gemma3": "an encoder of other media",
    "gpt2": "learned positions",
    "gpt_neox": "attention beside the feed-forward layer",
    "mixtral": "experts",
    "olmo3": "layers with windows",
    "phi3": "layers whose projections are one matrix",
    "qwen2_moe": "experts",
    "qwen3_moe": "experts",
    "smollm3": "layers without RoPE",
}
"""What other well-known ones have, which a looped model has no place for."""
_NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "mlp_norm",
    },
    "both": gemma3.NORMS,
}
"""transformers' names of the norms, by where they stand."""
_ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_TYPES = {
    "rope_parameters": dict, "rope_scaling": dict, "max_position_embeddings": int,
    "sliding_window": int,
}  # fmt: skip
"""Of settings that are read before the shape is checked as a whole."""
_LOOPS = {"bridge": (1, 4), "half_steps": (2, 2)}
"""By the injection of a core: the loops of a plain call, and the most."""
_TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


@dataclass(frozen=True)
class Looping:
    """Which layers are looped. core: 'A:B' for layers A to B-1, counted from 0; 'auto' for those
    from 0.4 to 0.6 of the depth; None for one loop. max_loops, injection: for a core."""

    core: str | None = None
    max_loops: int | None = None
    injection: Literal["bridge", "half_steps"] = "bridge"

    @property
    def shape(self) -> dict[str, Any]:
        """The keys of the model's shape that say how its layers are looped."""
        if self.core is None:
            return {"loops": 1, "max_loops": 1, "injection": "none"}
        loops, most = _LOOPS[self.injection]
        return {"loops": loops, "max_loops": self.max_loops or most, "injection": self.injection}

    def span(self, layers: int) -> tuple[int, int]:
        """The first layer of the core, and the one after its last.

        Raises `UsageError` for a core outside the layers, an empty one, or one of all layers.
        """
        if self.core is None:
            return layers // 4, layers - layers // 4
        if self.core == "auto":
            first = round(0.4 * layers)
            found = first, max(first + 1, round(0.6 * layers))
        else:
            start, _, stop = self.core.partition(":")
            found = int(start), int(stop)
        if layers == 1:
            raise UsageError(f"`core` {self.core}: the model has a single layer; leave it out")
        if not 0 <= found[0] < found[1] <= layers or found == (0, layers):
            raise UsageError(
                f"`core` {self.core}: the model has {layers} layers, 0 to {layers - 1}; give A:B "
                f"with 0 <= A < B <= {layers}, and not all of them"
            )
        return found


ONE_LOOP = Looping()


def looped_shape(settings: Mapping[str, Any], where: str, looping: Looping) -> ModelConfig:
    """The looped model's shape. settings: those of transformers' config.json.

    Raises `DataError` for a part that a looped model can't express, and what `Looping.span` raises.
    """

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise DataError(f"{where}: {what}, which a looped model has no place for")

    for name, expected in _TYPES.items():
        given = settings.get(name)
        if given is not None and type(given) is not expected:
            raise DataError(f"{where}: {name} is {short(repr(given))}; copy the model again")
    kind = settings["model_type"]
    if kind == gemma3.KIND:
        settings = gemma3.complete(settings, where, need)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    given = settings.get("hidden_act", "silu")
    act = _ACTIVATIONS.get(given) if isinstance(given, str) else None
    need(act is not None, f"hidden_act {short(repr(given))}")
    part = rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    need(part == 1.0, "RoPE on a part of each head")
    need(not settings.get("attention_bias"), "biases on the output of attention")
    need(not settings.get("mlp_bias"), "biases in the feed-forward layers")
    try:
        layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
        first, end = looping.span(layers)
        shape = {
            "vocab_size": settings["vocab_size"],
            "d_model": settings["hidden_size"],
            "n_heads": heads,
            "n_kv_heads": settings.get("num_key_value_heads") or heads,
            "head_dim": settings.get("head_dim") or settings["hidden_size"] // heads,
            "d_ff": settings["intermediate_size"],
            "prelude_layers": first,
            "core_layers": end - first,
            "coda_layers": layers - end,
            **looping.shape,
            "qk_norm": kind in ("qwen3", "olmo2", gemma3.KIND),
            "qk_norm_over": "all" if kind == "olmo2" else "head",
            "norm_position": {"olmo2": "after", gemma3.KIND: "both"}.get(kind, "before"),
            "qkv_bias": kind == "qwen2",
            "activation": act,
            "rope_theta": rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0,
            "scaled_rope": _scaled_rope(rope, need),
            "local_attention": settings["local_attention"] if kind == gemma3.KIND else {},
            "norm_eps": settings.get("rms_norm_eps", 1e-6),
            # Within its window a sliding attention is a full one.
            "max_seq_len": min(settings.get("max_position_embeddings", 2048), _window(settings)),
            "tie_embeddings": settings.get("tie_word_embeddings", False),
        }
    except KeyError as error:
        raise DataError(f"{where}: {error.args[0]} is missing; copy the model again") from error
    return typed(ModelConfig, shape, where)


def _scaled_rope(rope: Mapping[str, Any], need: Callable[[bool, str], None]) -> dict[str, Any]:
    """The section `scaled_rope`. rope: transformers' `rope_parameters` or `rope_scaling`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(is_one_of(kind, ROPE_TYPES), f"scaled RoPE ({short(kind)})")
    names = {"linear": ("factor",), "llama3": [field.name for field in fields(RopeScaling)][1:]}
    return {"rope_type": kind, **{name: rope[name] for name in names.get(kind, ())}}


def _window(settings: Mapping[str, Any]) -> float:
    """How many tokens each layer attends to; inf: all."""
    slides = settings.get("use_sliding_window", settings["model_type"] == "mistral")
    return settings.get("sliding_window") or math.inf if slides else math.inf


def looped_names(config: ModelConfig, loops: int = 1) -> Callable[[str], str | None]:
    """From transformers' names of tensors to the looped model's; None for a tied head.

    loops: how often the core's layers stand in transformers' stack.
    """
    modules = {"self_attn": "attention", **_NORMS[config.norm_position]}
    places = [
        *(f"prelude.{number}" for number in range(config.prelude_layers)),
        *[f"core.{number}" for number in range(config.core_layers)] * loops,
        *(f"coda.{number}" for number in range(config.coda_layers)),
    ]

    def rename(name: str) -> str | None:
        if name in _TOP:
            return None if name == "lm_head.weight" and config.tie_embeddings else _TOP[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)
        if not match or int(match[1]) >= len(places):
            return name  # and is refused as unexpected
        part = re.sub(r"^([qkv])_proj\.bias$", r"\1_bias", match[3])
        return f"{places[int(match[1])]}.{modules.get(match[2], match[2])}.{part}"

    return rename


def plain_names(config: ModelConfig) -> list[str]:
    """transformers' names of the tensors of a plain model."""
    kind = {"after": "olmo2", "both": GEMMA}.get(config.norm_position, "llama")
    names = tensor_names(config, config.effective_layers(1), config.tie_embeddings)
    return [transformers_name(kind, name) for name in names]


def empty_model(config: ModelConfig) -> LoopedTransformer:
    """The model without weights, but for what no source has: the confidence head and the bridge,
    at their beginnings."""
    with init_empty_weights():
        model = LoopedTransformer(config)
    torch.manual_seed(0)
    model.confidence = type(model.confidence)(config)
    model.injection = type(model.injection)(config)
    model.injection.reset()
    return model


def check_fits(elements: int, where: Path) -> None:
    """Raise `DataError` where so many numbers, as float32, are more than the free memory."""
    need, free = 4 * elements, free_ram()
    if need > free:
        raise DataError(
            f"{where}: its {elements:,} weights take {need / 2**30:.1f} GiB as float32, and "
            f"{free / 2**30:.1f} GiB of memory are free; take a smaller model or another machine"
        )


def from_folder(folder: Path, settings: Mapping[str, Any], looping: Looping) -> LoadedModel:
    """A folder of transformers' with a model of `ARCHITECTURES`. settings: its config.json."""
    config = looped_shape(settings, str(folder / "config.json"), looping)
    files = weight_files(folder)
    for file in files:
        refuse_pickle(file)
    check_fits(sum(total_elements(read_header(file)) for file in files), folder)
    model = empty_model(config)
    rename = looped_names(config)
    called = {ours: name for name in plain_names(config) if (ours := rename(name))}
    load_weights(model, folder, rename=rename, called=called)
    if settings["model_type"] == gemma3.KIND:
        gemma3.fold(model, settings)
    for part in (model.confidence, model.injection):
        part.to(model.embedding.weight.dtype)
    tokenizer = read_tokenizer(folder, config)
    return LoadedModel(
        model.eval(),
        config,
        tokenizer,
        ExitSettings(min_loops=config.loops),  # its confidence head is not trained
        {
            "from": f"{settings['model_type']} {folder.resolve().name}",
            "license": stated_license(folder),
        },
        folder,
        read_chat_template(folder),
        SpecialTokens.read(folder, tokenizer),
    )


def is_plain(folder: Path) -> bool:
    """Whether `from_folder` reads it, and not the folder of a looped model."""
    return read_json(folder / "config.json").get("model_type") in ARCHITECTURES


def open_plain(folder: Path) -> nn.Module:
    """The folder's model by transformers' own code, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    ).eval()
