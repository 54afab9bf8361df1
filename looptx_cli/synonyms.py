"""What people type who know other tools, and what the same is called here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields

from looptx_core.config.model import ModelConfig

COMMANDS = {
    "eval": ("evaluate",),
    "benchmark": ("evaluate",),
    "inspect": ("inspect-loops",),
    "visualize": ("inspect-loops",),
    "infer": ("generate",),
    "inference": ("generate",),
    "predict": ("generate",),
    "run": ("generate",),
    "sample": ("generate",),
    "fit": ("train",),
    "pretrain": ("train",),
    "resume": ("train --resume RUN",),
    "sft": ("finetune",),
    "fine-tune": ("finetune",),
    "lora": ("finetune --lora",),
    "qlora": ("finetune --qlora",),
    "merge": ("convert --merge-adapter --adapter ADAPTER",),
    "quantize": ("convert --to-bitnet",),
    "quantise": ("convert --to-bitnet",),
    "bitnet": ("convert --to-bitnet",),
    "export": ("convert --to-hf",),
    "import": ("convert --from-hf FOLDER",),
    "prepare": ("tokenize",),
    "preprocess": ("tokenize",),
    "tokenise": ("tokenize",),
    "info": ("doctor",),
    "env": ("doctor",),
    "list": ("runs",),
    "ls": ("runs",),
    "diff": ("compare",),
    "grid": ("sweep GRID",),
    "tune": ("sweep GRID",),
    "plot": ("compare",),
    "help": ("--help",),
}
"""What to type after `looptx` for another tool's command; the first that there is, is told."""

FLAGS = {
    "learning-rate": ("--lr",),
    "num-epochs": ("--epochs",),
    "num-train-epochs": ("--epochs",),
    "max-steps": ("--steps",),
    "num-steps": ("--steps",),
    "iters": ("--steps",),
    "max-iters": ("--steps",),
    "warmup-steps": ("--warmup",),
    "warmup-ratio": ("--warmup",),
    "min-learning-rate": ("--min-lr",),
    "wd": ("--weight-decay",),
    "optim": ("--optimizer",),
    "grad-clip": ("--clip",),
    "max-grad-norm": ("--clip",),
    "batch": ("--batch-size",),
    "train-batch-size": ("--batch-size",),
    "per-device-train-batch-size": ("--micro-batch",),
    "micro-batch-size": ("--micro-batch",),
    "gradient-accumulation-steps": ("--micro-batch",),
    "grad-accum": ("--micro-batch",),
    "gradient-checkpointing": ("--grad-checkpointing",),
    "max-seq-len": ("--seq-len",),
    "max-seq-length": ("--seq-len",),
    "block-size": ("--seq-len",),
    "context-length": ("--seq-len",),
    "dtype": ("--precision",),
    "bf16": ("--precision",),
    "fp16": ("--precision",),
    "mixed-precision": ("--precision",),
    "gpus": ("--devices",),
    "num-gpus": ("--devices",),
    "num-workers": ("--workers",),
    "dataset": ("--data",),
    "train-data": ("--data",),
    "input": ("--data", "--prompts-file"),
    "output": ("--out",),
    "output-dir": ("--out",),
    "save-dir": ("--out",),
    "save-steps": ("--save-every",),
    "eval-steps": ("--val-every",),
    "eval-every": ("--val-every",),
    "logging-steps": ("--log-every",),
    "resume-from-checkpoint": ("--resume",),
    "force": ("--overwrite",),
    "init-from": ("--init", "--model"),
    "base-model": ("--model",),
    "model-path": ("--model",),
    "model-name": ("--model",),
    "checkpoint": ("--model",),
    "lora-r": ("--lora-rank",),
    "rank": ("--lora-rank",),
    "lora-target-modules": ("--target-modules",),
    "load-in-4bit": ("--qlora",),
    "val-split": ("--val-fraction",),
    "max-tokens": ("--max-new-tokens",),
    "max-length": ("--max-new-tokens", "--seq-len"),
    "n-predict": ("--max-new-tokens",),
    "temp": ("--temperature",),
    "repeat-penalty": ("--repetition-penalty",),
    "depth": ("--loops",),
    "num-loops": ("--loops",),
    "iterations": ("--loops",),
    "system-prompt": ("--system",),
}
"""The flag here for another tool's; the first that the command has is told."""

SHAPE = {
    "width": "d_model",
    "dim": "d_model",
    "hidden-size": "d_model",
    "n-embd": "d_model",
    "layers": "core_layers",
    "n-layers": "core_layers",
    "n-layer": "core_layers",
    "num-layers": "core_layers",
    "num-hidden-layers": "core_layers",
    "heads": "n_heads",
    "n-head": "n_heads",
    "num-heads": "n_heads",
    "num-attention-heads": "n_heads",
    "num-key-value-heads": "n_kv_heads",
    "kv-heads": "n_kv_heads",
    "intermediate-size": "d_ff",
    "ffn-dim": "d_ff",
    "max-position-embeddings": "max_seq_len",
}
"""The key of a model's shape; the keys' own names are known beside these."""

NOTES = {
    "warmup-steps": "as a share of the steps",
    "gradient-accumulation-steps": "the batch is cut into passes of so many sequences",
    "grad-accum": "the batch is cut into passes of so many sequences",
}
"""What to know where the two are not quite the same."""


def command_hint(word: str, commands: Collection[str]) -> str | None:
    """What to type for a command that looptx does not have; None where nothing is known."""
    for line in COMMANDS.get(word, ()):
        if line.startswith("-") or line.split()[0] in commands:
            return f"looptx {line}"
    return None


def flag_hint(flag: str, command: str, flags: Mapping[str, Collection[str]]) -> str | None:
    """What to type for a flag that a command does not have; None where nothing is known.

    flags: the flags of each command, by its name.
    """
    word = flag.removeprefix("--").replace("_", "-")
    here = flags.get(command, ())
    names = (*FLAGS.get(word, ()), f"--{word}")
    note = f" ({NOTES[word]})" if word in NOTES else ""
    if found := next((name for name in names if name in here), None):
        return f"use {found}{note}"
    if key := _shape_key(word):
        where = "use" if "--set" in here else "a model's shape is set by looptx train, with"
        return f"{where} --set model.{key}=VALUE"
    for name in names:
        if owners := [owner for owner, own in flags.items() if name in own]:
            return f"{name} is a flag of looptx {', '.join(owners)}"
    return None


def _shape_key(word: str) -> str | None:
    name = word.replace("-", "_")
    return SHAPE.get(word) or (name if name in {f.name for f in fields(ModelConfig)} else None)
