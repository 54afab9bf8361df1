"""A Llama of random weights as a GGUF file, for llama.cpp to be measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig

KINDS = {"float32": "F32", "bf16": "BF16", "int8": "Q8_0", "ternary": "TQ2_0"}
"""What llama.cpp calls our types of weights."""


def write_llama(
    file: Path, config: ModelConfig, weights: str, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a Llama of a looped model's widths and effective depth.

    weights: one of `KINDS`. tokenizer: of byte-level BPE; absent: the file has none, so that
    only token ids can be given to it.
    """
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[KINDS[weights]]
    layers, rng = config.effective_layers(config.loops), np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, tokenizer)

    def matrix(name: str, rows: int, width: int, own: Any = kind) -> None:
        values = (rng.standard_normal((rows, width)) * 0.02).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)

    def vector(name: str, width: int) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    # Beside ternary layers its converter leaves the embedding in 16 bits.
    outer = gguf.GGMLQuantizationType.F16 if weights == "ternary" else kind
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrix("token_embd.weight", config.vocab_size, config.d_model, outer)
    vector("output_norm.weight", config.d_model)
    for i in range(layers):
        vector(f"blk.{i}.attn_norm.weight", config.d_model)
        vector(f"blk.{i}.ffn_norm.weight", config.d_model)
        matrix(f"blk.{i}.attn_q.weight", q, config.d_model)
        matrix(f"blk.{i}.attn_k.weight", kv, config.d_model)
        matrix(f"blk.{i}.attn_v.weight", kv, config.d_model)
        matrix(f"blk.{i}.attn_output.weight", config.d_model, q)
        matrix(f"blk.{i}.ffn_gate.weight", config.d_ff, config.d_model)
        matrix(f"blk.{i}.ffn_up.weight", config.d_ff, config.d_model)
        matrix(f"blk.{i}.ffn_down.weight", config.d_model, config.d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    import gguf

    document = json.loads(tokenizer.to_str())
    special = {token["id"] for token in document["added_tokens"] if token["special"]}
    size = tokenizer.get_vocab_size()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.id_to_token(token) for token in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if token in special else kinds.NORMAL for token in range(size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_eos_token_id(min(special))
    writer.add_add_bos_token(False)
