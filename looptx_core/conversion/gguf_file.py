"""A GGUF file, llama.cpp's format, as a looped model (extra `gguf`).

The file's description becomes that of transformers' config.json and its tensors get the names
there, dequantised to float32; the rest is `pretrained`'s.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from looptx_core.checkpoint.card import license_of
from looptx_core.checkpoint.folder import LoadedModel, check_vocabulary
from looptx_core.checkpoint.weights import check_finite, tensors_of
from looptx_core.config.generation import ExitSettings
from looptx_core.config.rope import RopeScaling
from looptx_core.conversion import gemma3
from looptx_core.conversion.gguf_names import (
    ARCHITECTURES,
    FREQUENCIES,
    GEMMA,
    LOOPED,
    from_neighbours,
    tensor_names,
    transformers_name,
    turned_part,
)
from looptx_core.conversion.gguf_tokenizer import read_gguf_tokenizer
from looptx_core.conversion.pretrained import (
    Looping,
    check_fits,
    empty_model,
    looped_names,
    looped_shape,
)
from looptx_core.documents import short, some
from looptx_core.errors import DataError, UsageError
from looptx_core.model.rope import rotary_frequencies
from looptx_core.model.vocabulary import tie_head
from looptx_core.model.weights import INIT_STD
from looptx_core.words import counted

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""The number types that are read."""
_COPY_AGAIN = "copy or download the file again"
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError)
_BIAS = re.compile(r"blk\.\d+\.attn_[qkv]\.bias")
_MOST_LOOPS = 512  # llama.cpp's limit on layers times loops


class _Reader(GGUFReader):
    """The package's reader; a file that ends too early is a `ValueError`, not less data."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it is cut short")
        return super()._get(offset, dtype, count, override_order)


class GGUF:
    """What a GGUF file holds, with its tensors still in the file.

    settings: as in transformers' config.json. loops: how often all of its layers are run. Raises
    `DataError` for a file that is damaged, or of an architecture or a type that is not read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            lacks = "a folder, and not a GGUF file" if file.is_dir() else "no such file"
            raise DataError(f"{file}: {lacks}; check `from_gguf`")
        try:
            reader = _Reader(file)
            self.values = {name: _value(field) for name, field in reader.fields.items()}
        except _DAMAGE as error:
            reason = str(error.args[0] if error.args else error).splitlines()[0]
            raise DataError(f"{file}: not a whole GGUF file ({reason}); {_COPY_AGAIN}") from error
        if reader.byte_order != "I":
            raise DataError(f"{file}: of the other byte order; convert it for this machine")
        self.architecture = str(self.values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise DataError(
                f"{file}: its architecture is {short(self.architecture)}; `from_gguf` reads "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.stored = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in self.stored.items():
            if (kind := tensor.tensor_type.name) not in TYPES:
                raise DataError(
                    f"{file}: {short(name)} is of type {kind}; {', '.join(TYPES)} are read, so "
                    "quantise the model to one of these"
                )
        self.settings = self._settings()
        self.loops = self._loops()
        skips = self.values.get(f"{LOOPED}.skip_loop_final_norm") is True
        self.norm_between = self.loops > 1 and not skips

    @property
    def types(self) -> list[str]:
        """The number types of its matrices, that of most weights first."""
        counts: Counter[str] = Counter()
        for tensor in self.stored.values():
            counts[tensor.tensor_type.name] += tensor.n_elements if len(tensor.shape) > 1 else 0
        return [name for name, count in counts.most_common() if count]

    @property
    def weights(self) -> list[str]:
        """The names of what is learned."""
        return [name for name in self.stored if name != FREQUENCIES]

    @property
    def elements(self) -> int:
        return sum(int(tensor.n_elements) for tensor in self.stored.values())

    def _settings(self) -> dict[str, Any]:
        def get(name: str, default: Any = None, kind: type[int | float] = int) -> Any:
            key = f"{self.architecture}.{name}"
            found = self.values.get(key, default)
            if found is None:
                raise DataError(f"{self.file}: {key} is missing; {_COPY_AGAIN}")
            if type(found) is not kind or not found > 0:
                raise DataError(f"{self.file}: {key} is {short(found)}; {_COPY_AGAIN}")
            return found

        def refuse(what: str) -> None:
            raise DataError(f"{self.file}: {what}, which a looped model has no place for")

        def has(name: str) -> bool:
            return self.values.get(f"{self.architecture}.{name}") not in (None, 0, "none")

        heads, width = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length", max(1, width // heads))
        rope: dict[str, Any] = {"rope_type": "default"}
        if FREQUENCIES in self.stored:
            rope = self._llama3(get("rope.freq_base", 10_000.0, float), head_dim)
        else:
            older = has("rope.scale_linear") and not has("rope.scaling.factor")
            factor = "rope.scale_linear" if older else "rope.scaling.factor"
            # As in llama.cpp: a factor without a kind is linear, and none or 0 scales nothing.
            kind = self.values.get(f"{self.architecture}.rope.scaling.type", "linear")
            if kind == "linear":
                if has(factor):
                    rope = {"rope_type": kind, "factor": get(factor, kind=float)}
            elif kind != "none":
                rope = {"rope_type": kind}  # and is refused
        if get("rope.dimension_count", head_dim) != head_dim:
            refuse("RoPE on a part of each head")
        if get("attention.value_length", head_dim) != head_dim:
            refuse("values of another width than keys")
        if has("expert_count"):
            refuse("experts")
        if has("attention.sliding_window") and self.architecture != GEMMA:
            refuse("a window")
        for name in self.stored:
            if name.endswith(".bias") and not (
                self.architecture == "qwen2" and _BIAS.fullmatch(name)
            ):
                refuse(f"biases ({short(name)})")
        embedding = self.stored.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            lacks = "it has no token_embd.weight"
            if embedding is not None:
                axes = counted(len(embedding.shape), "axis", "axes")
                lacks = f"its token_embd.weight has {axes}, not 2"
            raise DataError(f"{self.file}: {lacks}; {_COPY_AGAIN}")
        found = {
            "model_type": "llama" if self.architecture == LOOPED else self.architecture,
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": width,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", kind=float),
            "rope_parameters": rope | {"rope_theta": get("rope.freq_base", 10_000.0, float)},
            "tie_word_embeddings": "output.weight" not in self.stored,
        }
        if self.architecture == GEMMA:
            return found | gemma3.of_gguf(self.values, found, str(self.file))
        return found

    def _loops(self) -> int:
        if self.architecture != LOOPED:
            return 1
        key = f"{LOOPED}.num_loops"
        loops = self.values.get(key, 1)
        if type(loops) is not int or not 1 <= loops <= _MOST_LOOPS:
            raise DataError(f"{self.file}: {key} is {short(loops)}; {_COPY_AGAIN}")
        return loops

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3's scaled RoPE, of which a file has but what each frequency is divided by."""
        divisors = self._read(FREQUENCIES)
        factor = float(divisors.max())
        plain = rotary_frequencies(head_dim, theta)
        for original in (8192, 4096, 2048, 16384, 32768):
            scaling = RopeScaling("llama3", factor, original_max_position_embeddings=original)
            expected = plain / rotary_frequencies(head_dim, theta, scaling)
            if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-4):
                return asdict(scaling)
        raise DataError(
            f"{self.file}: scaled RoPE with {FREQUENCIES} that are not Llama 3's, which a looped "
            "model has no place for"
        )

    def _read(self, name: str) -> Tensor:
        """A tensor in float32, as the file holds it."""
        found: ReaderTensor = self.stored[name]
        values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), np.float32))
        check_finite(values, name, self.file)
        return values

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, as transformers holds it."""
        values = self._read(name)
        part = turned_part(self.architecture, name)
        if part is None:
            added = self.architecture == GEMMA and name.endswith("norm.weight")
            return values - 1 if added else values
        key = "num_attention_heads" if part == "q" else "num_key_value_heads"
        return from_neighbours(values, self.settings[key])

    def in_transformers(self) -> torch.nn.Module:
        """The model by transformers' own code, with the same weights in float32."""
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(self.settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32
            )
        # RoPE's frequencies are no weight: they are computed anew.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        embedding = model.model.embed_tokens
        if hasattr(embedding, "scalar_embed_scale"):  # and Gemma's scale
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
        weights = {
            transformers_name(self.architecture, name): self.tensor(name) for name in self.weights
        }
        if self.settings["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, assign=True)
        return model.eval()


def from_gguf(gguf: GGUF, looping: Looping) -> LoadedModel:
    """The looped model.

    Raises:
        DataError: what a looped model has no place for, tensors that do not fit or are missing, or
            a tokenizer that can't be built.
        UsageError: a core that does not fit, or one for a file whose layers are looped already.
    """
    file = gguf.file
    if gguf.loops > 1 and looping.core is not None:
        raise UsageError(f"{file}: a looped model already; `core` is for plain ones")
    config = looped_shape(gguf.settings, str(file), looping)
    if gguf.loops > 1:
        config = replace(config, prelude_layers=0, core_layers=gguf.settings["num_hidden_layers"],
                         coda_layers=0, loops=gguf.loops, max_loops=gguf.loops,
                         injection="norm" if gguf.norm_between else "none")  # fmt: skip
    check_fits(gguf.elements, file)
    tokenizer, special, template = read_gguf_tokenizer(gguf.values, str(file))
    check_vocabulary(tokenizer, config, str(file))
    model, rename = empty_model(config), looped_names(config)
    expected = tensors_of(model, None)
    names: dict[str, str] = {}
    for name in gguf.weights:
        tensor = gguf.stored[name]
        ours = rename(transformers_name(gguf.architecture, name))
        if ours not in expected:
            raise DataError(f"{file}: unexpected {short(name)}; a looped model has no place for it")
        shape = [int(size) for size in reversed(tensor.shape)]
        if shape != list(expected[ours].shape):
            raise DataError(
                f"{file}: {short(name)} is {shape}, and its description asks for "
                f"{list(expected[ours].shape)}; {_COPY_AGAIN}"
            )
        names[ours] = name
    every = tensor_names(config, config.effective_layers(1), config.tie_embeddings)
    if missing := [name for name in every if name not in gguf.stored]:
        raise DataError(f"{file}: its tensors lack {some(missing)}; {_COPY_AGAIN}")
    weights = {ours: gguf.tensor(name) for ours, name in names.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if gguf.architecture == GEMMA:
        gemma3.fold(model, gguf.settings)
    tie_head(model)
    if config.injection == "norm":  # the file has one norm, and a table that was scaled
        model.injection.state_norm.weight.data.copy_(model.norm.weight)
        model.injection.gain.data.fill_(INIT_STD)
    facts = {
        "from": f"{gguf.architecture} {file.name} ({', '.join(gguf.types)})",
        "license": license_of(gguf.values.get("general.license")),
    }
    return LoadedModel(
        model.eval(),
        config,
        tokenizer,
        ExitSettings(min_loops=config.loops),  # its confidence head is not trained
        facts,
        file,
        template,
        special,
    )


def _value(field: ReaderField) -> Any:
    found = field.contents()
    if field.types == [GGUFValueType.FLOAT32]:
        return float(str(np.float32(found)))  # 1e-05, not 9.999999747378752e-06
    return found
