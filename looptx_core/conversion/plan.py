"""What a conversion would do and write, before it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.checkpoint.weights import tensors_of
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.model import STORED_AS
from looptx_core.conversion.export import DTYPES, gguf_type, matrix_type, require_packages
from looptx_core.conversion.memory import with_memory
from looptx_core.conversion.onnx_folder import graph_depth
from looptx_core.conversion.run import (
    folder_bytes,
    output_folder,
    ternary_training,
)
from looptx_core.conversion.source import BATCH, check_kinds, evaluation_data, read_source
from looptx_core.conversion.ternary import to_ternary
from looptx_core.model.flops import parameter_count
from looptx_core.model.storage import Kind, like, to_float
from looptx_core.outputs import check_output
from looptx_core.training.step_time import TimeEstimate, estimate_time
from looptx_core.training.trial import time_steps
from looptx_core.words import counted

Report = Callable[[str], object]


@dataclass(frozen=True)
class ConversionPlan:
    """What would happen, in words and in bytes."""

    source: str
    out: str
    does: list[str]
    """What is done, a line a step, in order."""
    parameters: int
    bytes_before: int
    """Of the folder or the file that is read."""
    bytes_after: int
    """Of the weights that would be written."""
    time: TimeEstimate | None
    """Of the training through the rounding; None without one."""

    def to_dict(self) -> dict[str, Any]:
        """For `looptx convert --dry-run --json`."""
        found = asdict(self)
        del found["time"]
        return found | {"seconds": self.time and self.time.seconds}


def plan_conversion(
    config: ConvertConfig,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
    report: Report = lambda line: None,
) -> ConversionPlan:
    """Read the source and tell what `convert` would do; arguments and errors as for that.

    Where it would train, two steps are timed.
    """
    require_packages(config)
    source, sources, _ = read_source(config, report)
    out = output_folder(config, source)
    inputs = (*inputs, *config.data, config.model, config.foreign, config.adapter, *sources)
    there = check_output(out, "convert", overwrite=overwrite, inputs=inputs)
    check_kinds(config, source)
    shape = source.config
    was = STORED_AS.get(shape.linear) or f"{_name(source.model.norm.weight.dtype)} weights"
    does = [f"read {source.folder}: {was}, {counted(shape.max_loops, 'loop')} at most"]
    if config.core:
        span = f"{shape.prelude_layers} to {shape.prelude_layers + shape.core_layers - 1}"
        halves = ", with a second loop in half steps" if config.injection == "half_steps" else ""
        does.append(f"loop its layers {span}{halves}")
    if config.adapter:
        does.append(f"put the adapter {config.adapter} into its weights")
    time = None
    if config.to_bitnet and not config.direct and shape.linear != "ternary":
        data = evaluation_data(config, source, True, report, rows=BATCH)
        does.append(
            f"train {counted(config.finetune_steps, 'step')} through ternary rounding on "
            f"{data.name}, for {config.max_minutes:g} minutes at most"
        )
        batches, model = data.batches, to_float(source.model.float())
        model = to_ternary(model, [next(iter(batches.train_dataloader()))])
        settings = ternary_training(config, model, batches)
        time = estimate_time(shape, settings, lambda: time_steps(model, batches, settings))
    elif config.to_bitnet:
        does.append("round the weights to ternary, without training")
    model = source.model
    if config.memory:
        does.append(f"give its layers a memory of the kind {config.memory}, not yet trained")
        floats = to_float(model.float())
        model = with_memory(floats, config.memory, config.memory_window, config.memory_block)
    kind, dtype = _stored(config, source)
    if config.dtype and not config.unrolled:
        does.append(f"store {STORED_AS.get(kind) or f'{_name(dtype)} weights'}")
    if config.to_onnx:
        loops = graph_depth(source, config.loops)
        size = "int8, by onnxruntime" if config.dtype == "int8" else "float32"
        does.append(f"unroll {counted(loops, 'loop')} into an ONNX graph, {size}")
    size_of_gguf = 0
    if config.to_gguf:
        line, size_of_gguf = _gguf(config, source)
        does.append(line)
    if config.to_hf:
        does.append("add the code that transformers needs")
    does.append(f"write {out}" + (f", in place of {there}" if there else ""))
    stored = tensors_of(like(model, kind), dtype)
    return ConversionPlan(
        source=str(source.folder),
        out=str(out),
        does=does,
        parameters=parameter_count(shape),
        bytes_before=folder_bytes(source.folder),
        bytes_after=size_of_gguf or sum(t.numel() * t.element_size() for t in stored.values()),
        time=time,
    )


def _gguf(config: ConvertConfig, source: LoadedModel) -> tuple[str, int]:
    """What a GGUF file would hold, in words, and the bytes of its tensors."""
    from looptx_core.conversion.gguf_export import gguf_stack, stored_bytes

    stack = gguf_stack(source, config.loops)
    kind = gguf_type(config, matrix_type(source))
    line = (
        f"write {counted(stack.loops, 'loop')} as a GGUF file of {counted(stack.layers, 'layer')}, "
        f"architecture {stack.architecture}, type {kind}"
    )
    return line, stored_bytes(stack, like(source.model, "float"), kind)


def _stored(config: ConvertConfig, source: LoadedModel) -> tuple[Kind, torch.dtype]:
    """The kind of the matrices that are written, and the type of all floats."""
    was = source.model.norm.weight.dtype
    if config.dtype == "int8":
        return "int8", torch.float32
    if config.unrolled:
        return "float", torch.float32
    dtype = DTYPES[config.dtype] if config.dtype else was
    if config.to_bitnet or source.config.linear == "packed":
        return "packed", dtype
    return ("ternary" if source.config.linear == "ternary" else "float"), dtype


def _name(dtype: torch.dtype) -> str:
    names = {kind: name for name, kind in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))
