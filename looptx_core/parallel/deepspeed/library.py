"""DeepSpeed as an imported package: which versions, how it is imported, what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from looptx_core.errors import MissingError

TESTED = ("0.19.8",)
"""Versions that this folder was tested with. It rests on DeepSpeed's internals, which change from
one version to the next, so that others are refused; pyproject.toml asks for the last of these."""


def version_obstacle() -> str | None:
    """Why DeepSpeed can't be used here, in one line; None: it can. Imports nothing."""
    mend = f"pip install deepspeed=={TESTED[-1]} (Linux only)"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return f"DeepSpeed is not installed; {mend}"
    if found.partition("+")[0] not in TESTED:
        tested = ", ".join(TESTED)
        return f"DeepSpeed {found} is installed, and looptx was tested with {tested} alone; {mend}"
    return None


def check_version() -> None:
    """Raise `MissingError` where DeepSpeed is absent or of a version that was not tested."""
    if obstacle := version_obstacle():
        raise MissingError(obstacle)


def prepare_deepspeed(on_gpu: bool) -> None:
    """Import DeepSpeed: what it prints goes to standard error, and nothing is compiled needlessly.

    Raises `MissingError` for a version that was not tested.
    """
    check_version()
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
    import torch
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if linear is not None:
        torch.nn.functional.linear = linear
