"""A model as a GGUF file, which llama.cpp and what is built on it open.

llama.cpp runs stacks of plain layers. One loop of a model without injection is such a stack, and
of one with `bridge` or `norm`, too. Several loops of a core without prelude and coda are `LOOPED`,
whose weights stand in the file once, where the injection is `norm` or none. With prelude or coda
the stack is written out, and the core's layers stand in it once for each loop. What is written is
read back before it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.folder import LoadedModel, write_files
from looptx_core.config.model import ModelConfig
from looptx_core.conversion import gemma3
from looptx_core.conversion.gguf_file import GGUF, from_gguf
from looptx_core.conversion.gguf_names import (
    FREQUENCIES,
    GEMMA,
    LOOPED,
    tensor_names,
    to_neighbours,
    transformers_name,
    turned_part,
)
from looptx_core.conversion.gguf_tokenizer import tokenizer_values
from looptx_core.conversion.huggingface import with_use
from looptx_core.conversion.pretrained import ONE_LOOP, looped_names
from looptx_core.conversion.source_check import MOST_DIFFERENCE
from looptx_core.errors import LooptxError, UsageError
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_frequencies
from looptx_core.words import counted, quoted

MODEL_TYPE = "looptx-gguf"
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "Q8_0"}
"""GGUF's number types of the matrices, by those of looptx. Vectors are F32."""
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # columns that share a scale in Q8_0
_MOST_LAYERS = 512  # of llama.cpp
_MOST_F16 = torch.finfo(torch.float16).max
_KNOWN = {
    "vocab_size", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "activation",
    "prelude_layers", "core_layers", "coda_layers", "loops", "max_loops", "confidence_width",
    "gain_width", "injection", "retain", "streams", "qk_norm", "qk_norm_over", "norm_position",
    "rope_theta", "scaled_rope", "local_attention", "qkv_bias", "norm_eps", "max_seq_len",
    "dropout", "tie_embeddings", "linear", "memory", "memory_window", "memory_block",
    "memory_per_loop", "infini_delta",
}  # fmt: skip
"""The parts of a shape that are judged here. Another one is refused where a model has it."""
_USE = """```sh
llama-cli -m {file} -p "Call me" -n 40
printf 'FROM ./%s\\n' {file} > Modelfile && ollama create {name} -f Modelfile
```

Every token runs {loops}.{needs}"""
_NEEDS = " llama.cpp has known such a looped stack (`nanbeige`) since July 2026."


@dataclass(frozen=True)
class Stack:
    """What a file makes of a model."""

    architecture: str
    """llama.cpp's name."""
    layers: int
    """That stand in the file."""
    loops: int
    """Of the model."""
    written: int
    """How often the core's layers stand in the file."""


@dataclass(frozen=True)
class Written:
    """What was read back from a file."""

    model: LoopedTransformer
    logit_difference: float
    """From the model's, relative to the largest."""
    bits_per_weight: float
    """Stored bits of a weight in the blocks' linear layers, scales included."""
    memory: int
    """Bytes of the weights."""


def gguf_stack(source: LoadedModel, loops: int | None) -> Stack:
    """The stack for a number of loops, by default the depth of a plain call.

    Raises `UsageError` for a depth that the model has not, and names what llama.cpp has not.
    """
    config, of = source.config, f"{source.folder}: llama.cpp has no"

    other, onnx = "give another model by `model`", "`to_onnx` writes it"

    def need(ok: bool, what: str, mend: str = other) -> None:
        if not ok:
            raise UsageError(f"{of} {what}; {mend}")

    depth = loops or config.loops
    plain = config.prelude_layers == config.coda_layers == 0
    if depth > config.max_loops:
        raise UsageError(f"`loops` {loops}: {source.folder} runs at most {config.max_loops}")
    if source.model.media:
        plural = " and ".join(medium.plural for medium in source.model.media)
        need(False, f"encoder of {plural} like the one of this model")
    need(not config.has_memory, "place for a memory, which this model has")
    need(config.linear not in ("ternary", "packed"), "ternary weights of this model's kind",
         "take the one it was made from, and `dtype` int8 to make it small")  # fmt: skip
    if config.injection in ("bridge", "half_steps"):
        what = {"bridge": "bridge, by which this model enters later loops",
                "half_steps": "half steps, by which this model has later loops"}  # fmt: skip
        need(depth == 1, what[config.injection],
             "pass `loops` 1 for the first alone, or `to_onnx` for all")  # fmt: skip
    elif config.injection == "norm":
        need(not config.prelude_layers and (depth == 1 or not config.coda_layers),
             "norm between loops beside a prelude or a coda", onnx)  # fmt: skip
    else:
        need(config.injection == "none", f"injection of the kind {config.injection}, by which each "
             "loop of this model reads its input again",
             other if config.injection == "streams" else onnx)  # fmt: skip
    kind = _architecture(config, looped=plain and depth > 1)
    windows = config.local_attention.window > 0
    need(not windows or kind == GEMMA, "layers that attend within this model's windows", onnx)
    need(not windows or depth == 1, "order of windows like that of several loops of this model",
         "pass `loops` 1 for the first alone, or `to_onnx` for all")  # fmt: skip
    need(config.activation == "silu" or kind == GEMMA,
         f"gate with {config.activation} in such a stack, as this model has", onnx)  # fmt: skip
    plain_shape = ModelConfig()
    for part in (field.name for field in fields(ModelConfig) if field.name not in _KNOWN):
        same = getattr(config, part) == getattr(plain_shape, part)
        need(same, f"place for {part}, which this model has")
    layers = config.effective_layers(depth)
    need(layers <= _MOST_LAYERS, f"stack of {layers:,} layers, which are {depth:,} loops of this "
         f"model, and the limit is {_MOST_LAYERS}", "pass fewer `loops`")  # fmt: skip
    need(kind is not None, "layers with this model's norms and biases together", onnx)
    assert kind is not None
    need(config.injection != "norm" or kind == LOOPED or depth == 1,
         f"norm between loops of {kind}'s layers", onnx)  # fmt: skip
    whole = config.n_heads * config.head_dim == config.d_model
    need(whole or kind not in ("qwen2", "olmo2"),
         f"{kind} whose heads together are not as wide as the model", onnx)  # fmt: skip
    need(config.scaled_rope.rope_type != "llama3" or kind in ("llama", LOOPED),
         f"{kind} with Llama 3's scaled RoPE", onnx)  # fmt: skip
    if kind == LOOPED:
        return Stack(kind, config.core_layers, depth, 1)
    return Stack(kind, layers, depth, depth)


def check_gguf(source: LoadedModel, loops: int | None) -> None:
    """Raise `UsageError` for a model that can't be written: by its shape, as `gguf_stack`, or by
    its tokenizer."""
    gguf_stack(source, loops)
    tokenizer_values(source.tokenizer, source.special, source.config.vocab_size, source.folder)


def _architecture(config: ModelConfig, looped: bool) -> str | None:
    """llama.cpp's architecture of layers like these; None where it has none."""
    over = config.qk_norm_over if config.qk_norm else None
    if (config.norm_position, config.activation) == ("both", "gelu_tanh"):
        return GEMMA if over == "head" and not config.qkv_bias else None
    return {
        ("before", None, False): LOOPED if looped else "llama",
        ("before", None, True): "qwen2",
        ("before", "head", False): "qwen3",
        ("after", "all", False): "olmo2",
    }.get((config.norm_position, over, config.qkv_bias))


def _settings(stack: Stack, source: LoadedModel, kind: str) -> dict[str, Any]:
    """The file's metadata by key."""
    config = source.config
    shape: dict[str, Any] = {
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": stack.layers,
        "feed_forward_length": config.d_ff,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.scaled_rope.rope_type == "linear":
        shape |= {"rope.scaling.type": "linear",
                  "rope.scaling.factor": float(config.scaled_rope.factor)}  # fmt: skip
    if stack.architecture == GEMMA:
        shape |= gemma3.gguf_values(config)
    if stack.architecture == LOOPED:
        shape |= {"num_loops": stack.loops, "skip_loop_final_norm": config.injection != "norm"}
    licence = source.facts.get("license")
    return {
        "general.name": source.name,
        **({"general.license": licence} if isinstance(licence, str) else {}),
        "general.file_type": int(LlamaFileType[_FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{stack.architecture}.{name}": value for name, value in shape.items()},
        **tokenizer_values(source.tokenizer, source.special, config.vocab_size, source.folder),
        **({"tokenizer.chat_template": source.chat_template} if source.chat_template else {}),
    }


def stored_tensors(
    stack: Stack, model: LoopedTransformer, kind: str
) -> Iterator[tuple[str, Tensor, GGMLQuantizationType]]:
    """The file's tensors: name, values in the model's type, and the type to store them in."""
    config, state = model.config, model.state_dict()
    tied = config.tie_embeddings and stack.architecture != "olmo2"  # which needs a head
    if config.injection == "norm":
        tied, config = False, replace(config, tie_embeddings=False)
        state["embedding.weight"] = model.embedding.weight * model.injection.embedding_scale
    if config.injection == "norm" and stack.architecture == LOOPED:
        # One norm serves between loops and at the end: the head takes what they differ by.
        between = model.injection.state_norm.weight
        state["head.weight"] = model.head.weight * (model.norm.weight / between)
        state["norm.weight"] = between
    rename = looped_names(config, stack.written)
    if config.scaled_rope.rope_type == "llama3":
        plain, scaled = (
            rotary_frequencies(config.head_dim, config.rope_theta, *scaling)
            for scaling in ((), (config.scaled_rope,))
        )
        yield FREQUENCIES, plain / scaled, GGMLQuantizationType.F32
    heads = {"q": config.n_heads, "k": config.n_kv_heads}
    for name in tensor_names(config, stack.layers, tied):
        values = state[rename(transformers_name(stack.architecture, name)) or "embedding.weight"]
        if part := turned_part(stack.architecture, name):
            values = to_neighbours(values, heads[part])
        if stack.architecture == GEMMA:
            values = gemma3.unfold(name, values, config, stack.layers)
        stored = kind if values.dim() > 1 else "F32"
        if stored == "Q8_0" and values.shape[1] % _BLOCK:
            stored = "F16"
        yield name, values, GGMLQuantizationType[stored]


def stored_bytes(stack: Stack, model: LoopedTransformer, kind: str) -> int:
    """Bytes of the file's tensors; the model may be on the meta device."""
    sizes = gguf.GGML_QUANT_SIZES
    return sum(
        values.numel() // sizes[stored][0] * sizes[stored][1]
        for _, values, stored in stored_tensors(stack, model, kind)
    )


def file_name(source: LoadedModel, kind: str) -> str:
    """As hubs name such files, so that tools find the type in it."""
    return f"{source.name}-{kind}.gguf"


def gguf_files(
    files: Mapping[str, Any], source: LoadedModel, stack: Stack, kind: str
) -> dict[str, Any]:
    """What stands beside the file. files: of a model folder, as `model_files` gives them."""
    use = _USE.format(
        file=quoted(file_name(source, kind)),
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", source.name),  # as ollama takes them
        loops=counted(stack.loops, "loop"),
        needs=_NEEDS if stack.architecture == LOOPED else "",
    )
    config = {**files["config.json"], "model_type": MODEL_TYPE}
    return {"config.json": config, "README.md": with_use(files["README.md"], use, "gguf")}


def write_gguf(
    out: Path,
    source: LoadedModel,
    model: LoopedTransformer,
    stack: Stack,
    files: Callable[[Written], Mapping[str, Any]],
    *,
    kind: str,
    exact: bool,
    tokens: Tensor,
) -> Written:
    """Write a folder with the file, whole or not at all.

    model: the source's, in float32. files: what else stands in the folder, once the file is
    measured. kind: of the matrices. exact: it holds the weights as they are. tokens: (rows,
    length), on which the file is compared with the model.

    Raises:
        UsageError: a tokenizer that GGUF has no name for, or weights beyond the number type.
        LooptxError: an exact file that gives other logits.
    """
    settings = _settings(stack, source, kind)
    found: list[Written] = []

    def write(place: Path) -> None:
        file = place / file_name(source, kind)
        bits, size = _write_file(file, stack, model, settings, kind)
        back = from_gguf(GGUF(file), ONE_LOOP).model
        difference = _logit_difference(back, model, stack.loops, tokens)
        if exact and not difference <= MOST_DIFFERENCE:
            raise LooptxError(
                f"the file's logits, read back, differ by {difference:.1e} of the largest, and "
                f"{MOST_DIFFERENCE:.0e} is the limit; try another version of the package gguf"
            )
        found.append(Written(back, difference, bits, size))
        write_files(place, files(found[0]))

    write_folder(out, write)
    return found[0]


def _write_file(
    file: Path, stack: Stack, model: LoopedTransformer, settings: Mapping[str, Any], kind: str
) -> tuple[float, int]:
    """The bits of a weight in the blocks, and the bytes of all tensors."""
    writer = GGUFWriter(file, stack.architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    for key, value in settings.items():
        add[type(value)](key, value)
    size = in_blocks = weights = 0
    for name, values, stored in stored_tensors(stack, model, kind):
        largest = float(values.detach().abs().max())
        if stored == GGMLQuantizationType.F16 and largest > _MOST_F16:
            raise UsageError(
                f"{name} holds {largest:.3g}, and F16 ends at {_MOST_F16:.0f}; give another `dtype`"
            )
        array = gguf.quantize(np.ascontiguousarray(values.detach().float().numpy()), stored)
        writer.add_tensor(name, array, raw_dtype=stored)
        size += array.nbytes
        if name.startswith("blk.") and values.dim() > 1:
            in_blocks += array.nbytes
            weights += values.numel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 8 * in_blocks / weights, size


@torch.no_grad()
def _logit_difference(
    back: LoopedTransformer, model: LoopedTransformer, loops: int, tokens: Tensor
) -> float:
    """max |what was read back - the model| / max |the model|, of logits."""
    pairs = [(back(row).logits, model(row, loops).logits) for row in tokens.split(1)]
    largest = max(float(ours.abs().max()) for _, ours in pairs)
    return max(float((theirs - ours).abs().max()) for theirs, ours in pairs) / largest
