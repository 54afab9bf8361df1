"""A shape, a quick run, and what the tests of finetuning do with them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from looptx_core.config.model import ModelConfig
from looptx_core.model.loop import LoopedTransformer

SHAPE = ModelConfig(
    vocab_size=300, d_model=64, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128, core_layers=1,
    max_loops=3, max_seq_len=256,
)  # fmt: skip
QUICK = {"steps": 6, "seq_len": 64, "batch_size": 4, "lr": 1e-2, "precision": "float32",
         "save_every": 2, "val_every": 6, "val_batches": 1, "log_every": 1}  # fmt: skip


def logits(model: LoopedTransformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, SHAPE.max_loops).logits


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)
