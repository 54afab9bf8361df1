"""Choosing the back end to generate with: the CPU kernel, CUDA graphs or plain torch."""

from __future__ import annotations

from looptx_core.backends import cuda_graphs
from looptx_core.backends.base import Backend
from looptx_core.backends.cpu.backend import CpuBackend
from looptx_core.backends.cpu.bindings import unsupported_reason
from looptx_core.backends.cpu.rounding import rounded_copy
from looptx_core.backends.cpu.structs import PRECISIONS, load_kernel
from looptx_core.backends.cuda_graphs import CudaGraphBackend
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.config.model import STORED_AS
from looptx_core.errors import MissingError, UsageError
from looptx_core.model.loop import LoopedTransformer

KERNELS = ("auto", "native", "graph", "torch")


def select_backend(
    model: LoopedTransformer, kernel: str = "auto", precision: str = "float32"
) -> tuple[Backend, str]:
    """The back end to generate with, and a line that says why.

    kernel: auto, native (the compiled CPU kernel), graph (CUDA graphs) or torch. precision: the
    type of the compiled kernel's weights, float32, bf16 or int8; what torch computes beside it then
    uses a copy of the model that is rounded to the same values. Raises `UsageError` for unknown
    names, `MissingError` if what was asked for can't run here.
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
            load_kernel()  # may fail, so before the model is copied
            backend = CpuBackend(rounded_copy(model, precision), precision)
            kind = STORED_AS.get(model.config.linear, f"weights in {precision}")
            return backend, f"native, {kind}"
        except MissingError as error:
            why = str(error)
    if kernel == "native" or rounded:
        way = "leave out `precision`" if precision == "int8" else "use `kernel` torch"
        raise MissingError(f"the compiled kernel can't run here: {why}; {way}")
    return TorchBackend(model), f"torch, {why}"
