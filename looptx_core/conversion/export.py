"""A fixed depth of a model in a format of others: ONNX or GGUF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from looptx_core.checkpoint.card import unmeasured
from looptx_core.checkpoint.folder import LoadedModel, model_files
from looptx_core.config.conversion import ConvertConfig
from looptx_core.conversion.gguf_names import GEMMA, require_gguf
from looptx_core.conversion.onnx_folder import (
    check_text,
    graph_depth,
    onnx_files,
    require_onnx,
    write_onnx,
)
from looptx_core.conversion.source import PLAIN_BATCH, evaluation_data
from looptx_core.data.datamodule import Batches
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import evaluate_all
from looptx_core.words import counted

Files = Callable[[float, str | None], dict[str, Any]]
"""The files of a model folder, by the loss of what is written, and how it is quantised, where it
is."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "int8": torch.int8}  # fmt: skip


class Measured(Protocol):
    """What was found of a written file, see the formats' own."""

    @property
    def logit_difference(self) -> float: ...

    @property
    def bits_per_weight(self) -> float: ...

    @property
    def memory(self) -> int: ...


def require_packages(config: ConvertConfig) -> None:
    """Raise `MissingError` where what writes a format of others is not installed."""
    if config.to_onnx:
        require_onnx()
    if config.to_gguf:
        require_gguf("to_gguf")


def matrix_type(source: LoadedModel) -> torch.dtype:
    """The number type in which a model's matrices are stored."""
    return torch.int8 if source.config.linear == "int8" else source.model.norm.weight.dtype


def gguf_type(config: ConvertConfig, was: torch.dtype) -> str:
    """GGUF's name of the type in which matrices of the type `was` are written."""
    from looptx_core.conversion.gguf_export import KINDS

    return KINDS[DTYPES[config.dtype] if config.dtype else was]


def export(
    config: ConvertConfig,
    source: LoadedModel,
    model: LoopedTransformer,
    was: torch.dtype,
    out: Path,
    check: Callable[[], object],
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Write a fixed depth for others, after a `check` of its place; its part of the result.

    model: the source's, in float32. was: the number type in which it is stored.
    """
    held_out = evaluation_data(config, source, False, report, rows=PLAIN_BATCH)

    def files(before: float, after: float, quantised: str | None) -> dict[str, Any]:
        """Of a model folder. before, after: losses of the model and of what is written."""
        facts = unmeasured(source.facts)  # it has one depth, and perhaps rounded weights
        if held_out.own or config.data:
            facts |= {"loss": round(after, 4), "loss_before": round(before, 4)}
        facts["converted_from"] = source.name
        if quantised:
            facts["quantised"] = quantised
        _, made = model_files(
            out, model, source.tokenizer, source.exit, facts, chat_template=source.chat_template,
            special=source.special, depth=loops,
        )  # fmt: skip
        made["config.json"]["command"] = "convert"
        return made

    batches = held_out.batches
    loops = _depth(config, source)
    before = evaluate_all(model, batches.val_dataloader(), loops).loss_by_loop[-1]
    check()
    write = _to_onnx if config.to_onnx else _to_gguf
    compared, after, written = write(
        config, source, model, was, out, loops, partial(files, before), batches
    )
    return {
        "judged_by": held_out.name,
        "own": held_out.own,
        "loss_by_loop_before": [before],
        "loss_by_loop": [after],
        "loops": loops,
        "compared": compared,
        "logit_difference": written.logit_difference,
        "bits_per_weight": written.bits_per_weight,
        "memory_after": written.memory,
    }


def _depth(config: ConvertConfig, source: LoadedModel) -> int:
    """The loops to write; refuses what the format has no place for."""
    if config.to_onnx:
        return graph_depth(source, config.loops)
    from looptx_core.conversion.gguf_export import gguf_stack

    return gguf_stack(source, config.loops).loops


def _to_onnx(
    config: ConvertConfig,
    source: LoadedModel,
    model: LoopedTransformer,
    was: torch.dtype,
    out: Path,
    loops: int,
    files: Files,
    batches: Batches,
) -> tuple[str, float, Measured]:
    """What was compared, the loss of what is written, and its measures."""
    int8 = config.dtype == "int8"
    quantised = "int8, by onnxruntime" if int8 else None
    written = write_onnx(
        out, model, loops,
        lambda graph: onnx_files(files(graph.loss, quantised), source, loops),
        int8=int8, tokens=check_text(source), held_out=batches.val_dataloader(),
    )  # fmt: skip
    return f"onnxruntime at {counted(loops, 'loop')} against the model", written.loss, written


def _to_gguf(
    config: ConvertConfig,
    source: LoadedModel,
    model: LoopedTransformer,
    was: torch.dtype,
    out: Path,
    loops: int,
    files: Files,
    batches: Batches,
) -> tuple[str, float, Measured]:
    """As `_to_onnx`."""
    from looptx_core.conversion.gguf_export import (
        KINDS,
        Written,
        gguf_files,
        gguf_stack,
        write_gguf,
    )

    stack = gguf_stack(source, loops)
    kind = gguf_type(config, was)
    after: list[float] = []

    def beside(file: Written) -> dict[str, Any]:
        found = evaluate_all(file.model, batches.val_dataloader(), file.model.config.loops)
        after.append(found.loss_by_loop[-1])
        return gguf_files(files(after[0], kind if kind == "Q8_0" else None), source, stack, kind)

    written = write_gguf(
        out, source, model, stack, beside, kind=kind,
        exact=kind == "F32" or (kind == KINDS[was] != "Q8_0" and stack.architecture != GEMMA),
        tokens=check_text(source),
    )  # fmt: skip
    compared = f"the file, read back, against {counted(loops, 'loop')} of the model"
    return compared, after[0], written
