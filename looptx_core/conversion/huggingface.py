"""Folders that transformers opens, and back.

The code in such a folder is this package's own, file for file; only the imports among them are
made relative, since transformers looks for them in one flat folder.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looptx_core.checkpoint.folder import MODEL_TYPE, LoadedModel, read_tokenizer
from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.checkpoint.weights import load_weights
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.documents import read_json
from looptx_core.errors import DataError
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.loop import LoopedTransformer
from looptx_core.schema import typed

ENTRY = "looptx_core.conversion.modeling_looptx"
CLASS = "LooptxForCausalLM"
_PREFIX = "model."
_IMPORT = re.compile(r"^(\s*)from (looptx_core(?:\.\w+)+) import", re.MULTILINE)
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
prompt = tokenizer("Call me", return_tensors="pt")
model.generate(**prompt, max_new_tokens=40)           # each token as deep as it needs
model.generate(**prompt, max_new_tokens=40, loops=4)  # a fixed depth
```

Tested with transformers {first} to {last}; it refuses others. `looptx convert --from-hf` makes it
a folder of looptx again."""
_ALL_FILES = """

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:  # transformers before 5.12 copies no local files but those named here
"""
_FENCE = re.compile(r"```\n.*?\n```", re.DOTALL)


def to_huggingface(
    weights: Mapping[str, Tensor], files: Mapping[str, Any], exit_settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model folder's tensors and files, as `model_files` gives them, for transformers."""
    sources = exported_sources()
    tested = re.search(r'^TESTED = \("(.+)", "(.+)"\)$', sources["modeling_looptx.py"], re.M)
    assert tested
    first, last = tested.groups()
    config = {
        **files["config.json"],
        "architectures": [CLASS],
        "auto_map": {
            "AutoConfig": "modeling_looptx.LooptxConfig",
            "AutoModelForCausalLM": f"modeling_looptx.{CLASS}",
        },
        "tested_with_transformers": [first, last],
        "exit": dict(exit_settings),
    }
    generation = {k: v for k, v in files["generation_config.json"].items() if k != "exit"}
    use = _USE.format(first=first, last=last)
    card = _FENCE.sub(lambda _: use, files["README.md"], count=1)
    named = {_PREFIX + name: tensor for name, tensor in weights.items()}
    return named, {
        **files,
        **sources,
        "config.json": config,
        "generation_config.json": generation,
        "README.md": card.replace("library_name: looptx", "library_name: transformers"),
    }


def exported_sources() -> dict[str, str]:
    """The entry file and all of the package that it imports, by the name in the folder."""
    waiting, found = [ENTRY], {}
    while waiting:
        module = waiting.pop()
        name = _flat(module) + ".py"
        if name in found:
            continue
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin
        text = Path(spec.origin).read_text("utf-8")
        # `from looptx_core.model import loop` would find nothing in a flat folder.
        empty = spec.submodule_search_locations and len(ast.parse(text).body) < 2
        assert not empty, f"{module} is a package without names of its own; import from its files"
        waiting += [match[2] for match in _IMPORT.finditer(text)]
        found[name] = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import", text)
    entry = _flat(ENTRY) + ".py"
    named = "".join(f"    from .{name[:-3]} import *  # noqa: F403\n" for name in sorted(found)
                    if name != entry)  # fmt: skip
    found[entry] += _ALL_FILES + named
    return found


def from_huggingface(folder: Path) -> LoadedModel:
    """Read what `to_hf` wrote, as it is or saved again by transformers; or a Llama or Qwen3.

    A Llama or Qwen3 of n layers becomes a model of one loop, its middle half in the core, with
    a confidence head that is yet to be trained.

    Raises `DataError` for other folders, and for what a looped model has no place for.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check `from_hf`")
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind in ("llama", "qwen3"):
        return _from_plain(folder, settings)
    if kind != MODEL_TYPE or settings.get("architectures") != [CLASS]:
        raise DataError(
            f"{folder}: model_type {kind!r}; `from_hf` reads what `to_hf` wrote, llama and qwen3"
        )
    shape = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
    config = typed(ModelConfig, shape, str(folder / "config.json"))
    known = {field.name for field in fields(ExitSettings)}
    rule = {k: v for k, v in (settings.get("exit") or {}).items() if k in known}
    with init_empty_weights():
        model = LoopedTransformer(config)

    def rename(name: str) -> str | None:
        name = name.removeprefix(_PREFIX)
        return None if name == "head.weight" and config.tie_embeddings else name

    load_weights(model, folder, rename=rename)
    tokenizer = read_tokenizer(folder, config)
    return LoadedModel(
        model.eval(),
        config,
        tokenizer,
        typed(ExitSettings, rule, f"{folder / 'config.json'}, exit"),
        settings.get("facts") or {},
        folder,
        special=SpecialTokens.read(folder, tokenizer),
    )


_BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def _from_plain(folder: Path, settings: Mapping[str, Any]) -> LoadedModel:
    """A Llama or Qwen3."""
    file = folder / "config.json"

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise DataError(f"{file}: {what}, which a looped model has no place for")

    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    act = {"silu": "silu", "gelu": "gelu"}.get(settings.get("hidden_act", "silu"))
    need(act is not None, f"hidden_act {settings.get('hidden_act')!r}")
    need(rope.get("rope_type", rope.get("type", "default")) == "default", "scaled RoPE")
    need(not settings.get("attention_bias") and not settings.get("mlp_bias"), "biases")
    need(not settings.get("use_sliding_window"), "a sliding window")
    try:
        layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
        outer = layers // 4
        shape = {
            "vocab_size": settings["vocab_size"],
            "d_model": settings["hidden_size"],
            "n_heads": heads,
            "n_kv_heads": settings.get("num_key_value_heads") or heads,
            "head_dim": settings.get("head_dim") or settings["hidden_size"] // heads,
            "d_ff": settings["intermediate_size"],
            "prelude_layers": outer,
            "core_layers": layers - 2 * outer,
            "coda_layers": outer,
            "loops": 1,
            "max_loops": 1,
            "injection": "none",
            "qk_norm": settings["model_type"] == "qwen3",
            "activation": act,
            "rope_theta": rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0,
            "norm_eps": settings.get("rms_norm_eps", 1e-6),
            "max_seq_len": settings.get("max_position_embeddings", 2048),
            "tie_embeddings": settings.get("tie_word_embeddings", False),
        }
    except KeyError as error:
        raise DataError(f"{file}: {error.args[0]} is missing; copy the model again") from error
    config = typed(ModelConfig, shape, str(file))
    places = [
        f"{part}.{number}"
        for part, count in (
            ("prelude", outer), ("core", layers - 2 * outer), ("coda", outer),
        )
        for number in range(count)
    ]  # fmt: skip

    def rename(name: str) -> str | None:
        if name in _TOP:
            return None if name == "lm_head.weight" and config.tie_embeddings else _TOP[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)
        if not match or int(match[1]) >= layers:
            return name  # and is refused as unexpected
        return f"{places[int(match[1])]}.{_BLOCK.get(match[2], match[2])}.{match[3]}"

    with init_empty_weights():
        model = LoopedTransformer(config)
    torch.manual_seed(0)
    model.confidence = type(model.confidence)(config)
    load_weights(model, folder, rename=rename)
    model.confidence.to(model.embedding.weight.dtype)
    facts = {"from": f"{settings['model_type']} {folder.resolve().name}"}
    tokenizer = read_tokenizer(folder, config)
    special = SpecialTokens.read(folder, tokenizer)
    return LoadedModel(
        model.eval(), config, tokenizer, ExitSettings(), facts, folder, special=special
    )


def _flat(module: str) -> str:
    """'model_block' for looptx_core.model.block; the entry keeps its own name."""
    if module == ENTRY:
        return module.rpartition(".")[2]
    return module.removeprefix("looptx_core.").replace(".", "_")
