"""DeepSpeed as an imported package: which versions, how it is imported, what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch


def prepare_deepspeed(on_gpu: bool) -> None:
    """Import it, with what it says going to standard error, and without needless compiling."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with noise_to_stderr():
        import deepspeed

        if not on_gpu:
            # Its shared-memory collectives would be compiled before the first of gloo's.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def noise_to_stderr() -> Iterator[None]:
    """DeepSpeed and its compilers print to standard output, which is for results."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        kept = None
        with contextlib.suppress(OSError, ValueError):
            kept = os.dup(1)
            os.dup2(2, 1)
        try:
            yield
        finally:
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)


def restore_torch() -> None:
    """Take back the linear function that ZeRO-3 put in torch's place, for all modules."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if linear is not None:
        torch.nn.functional.linear = linear
