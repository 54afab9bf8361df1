"""Which moves to generate with: compiled on a CPU, recorded on a GPU, or torch's as they are."""

from __future__ import annotations

from looptx_core.errors import MissingError, UsageError
from looptx_core.generation import graph_moves
from looptx_core.generation.graph_moves import GraphMoves
from looptx_core.generation.moves import Moves
from looptx_core.generation.native_moves import NativeMoves
from looptx_core.machine.kernels import load
from looptx_core.model.loop import LoopedTransformer
from looptx_core.native.model import PRECISIONS, obstacle, rounded_copy
from looptx_core.native.source import KERNEL

KERNELS = ("auto", "native", "graph", "torch")


def choose_moves(
    model: LoopedTransformer, kernel: str = "auto", precision: str = "float32"
) -> tuple[Moves, str]:
    """The moves to generate with, and in a line why.

    kernel: auto, native (compiled, on a CPU), graph (recorded, on a CUDA GPU) or torch. precision:
    how the compiled kernel holds the model's weights, float32, bf16 or int8; torch's part of the
    work is then done by a copy of the model that is rounded to the same values.
    Raises `UsageError` for unknown names, `MissingError` where what was asked for can't be had.
    """
    if kernel not in KERNELS:
        raise UsageError(f"--kernel {kernel}: not one of {', '.join(KERNELS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: not one of {', '.join(PRECISIONS)}")
    rounded = precision != "float32"
    if kernel in ("graph", "torch") and rounded:
        raise UsageError(f"--precision {precision} needs the compiled kernel; leave out --kernel")
    if kernel == "torch":
        return Moves(model), "torch, asked for"
    on_gpu = model.norm.weight.device.type == "cuda"
    if kernel == "graph" or (kernel == "auto" and on_gpu and not rounded):
        why = graph_moves.obstacle(model)
        if why is None:
            return GraphMoves(model), "CUDA graphs, where one prompt is continued at a time"
        if kernel == "graph":
            raise MissingError(f"CUDA graphs can't be recorded: {why}; leave out --kernel")
        return Moves(model), f"torch, {why}"
    why = obstacle(model)
    if why is None:
        try:
            load(*KERNEL)  # before a copy is made in vain
            moves = NativeMoves(rounded_copy(model, precision), precision)
            return moves, f"native, weights in {precision}"
        except MissingError as error:
            why = str(error)
    if kernel == "native" or rounded:
        way = "leave out --precision" if precision == "int8" else "use --kernel torch"
        raise MissingError(f"the compiled kernel can't run here: {why}; {way}")
    return Moves(model), f"torch, {why}"
