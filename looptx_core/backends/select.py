"""Which back end to generate with: compiled on a CPU, recorded on a GPU, or torch as it is."""

from __future__ import annotations

from looptx_core.backends import cuda_graphs
from looptx_core.backends.base import Backend
from looptx_core.backends.cpu.backend import CpuBackend
from looptx_core.backends.cpu.bindings import unsupported_reason
from looptx_core.backends.cpu.rounding import rounded_copy
from looptx_core.backends.cpu.structs import PRECISIONS, load_kernel
from looptx_core.backends.cuda_graphs import CudaGraphBackend
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.errors import MissingError, UsageError
from looptx_core.model.loop import LoopedTransformer

KERNELS = ("auto", "native", "graph", "torch")


def select_backend(
    model: LoopedTransformer, kernel: str = "auto", precision: str = "float32"
) -> tuple[Backend, str]:
    """The back end to generate with, and in a line why.

    kernel: auto, native (compiled, on a CPU), graph (recorded, on a CUDA GPU) or torch. precision:
    how the compiled kernel holds the model's weights, float32, bf16 or int8; torch's part of the
    work is then done by a copy of the model that is rounded to the same values.
    Raises `UsageError` for unknown names, `MissingError` where what was asked for can't be had.
    """
    if kernel not in KERNELS:
        raise UsageError(f"`kernel` {kernel}: not one of {', '.join(KERNELS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"`precision` {precision}: not one of {', '.join(PRECISIONS)}")
    rounded = precision != "float32"
    if kernel in ("graph", "torch") and rounded:
        raise UsageError(f"`precision` {precision} needs the compiled kernel; leave out `kernel`")
    if kernel == "torch":
        return TorchBackend(model), "torch, asked for"
    on_gpu = model.norm.weight.device.type == "cuda"
    if kernel == "graph" or (kernel == "auto" and on_gpu and not rounded):
        why = cuda_graphs.unsupported_reason(model)
        if why is None:
            return CudaGraphBackend(model), "CUDA graphs, where one prompt is continued at a time"
        if kernel == "graph":
            raise MissingError(f"CUDA graphs can't be recorded: {why}; leave out `kernel`")
        return TorchBackend(model), f"torch, {why}"
    why = unsupported_reason(model)
    if why is None:
        try:
            load_kernel()  # before a copy is made in vain
            backend = CpuBackend(rounded_copy(model, precision), precision)
            return backend, f"native, weights in {precision}"
        except MissingError as error:
            why = str(error)
    if kernel == "native" or rounded:
        way = "leave out `precision`" if precision == "int8" else "use `kernel` torch"
        raise MissingError(f"the compiled kernel can't run here: {why}; {way}")
    return TorchBackend(model), f"torch, {why}"
