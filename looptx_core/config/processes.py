"""Which of a run's processes this is, told by the environment before the run begins."""

from __future__ import annotations

import os
from collections.abc import Mapping

RUN = "LOOPTX_RUN"
"""In the environment of the processes that a run starts: its folder."""
_OWN = ("LOCAL_RANK", "NODE_RANK")


def is_first(env: Mapping[str, str] | None = None) -> bool:
    """Whether this process is its run's first, over all machines; known before the run begins."""
    env = os.environ if env is None else env
    names = {"torchrun": ("RANK",), "slurm": ("SLURM_PROCID",)}
    return not any(int(env.get(key, "0")) for key in names.get(starter(env), _OWN))


def is_first_here(env: Mapping[str, str] | None = None) -> bool:
    """Whether this process is its machine's first."""
    env = os.environ if env is None else env
    return not int(env.get("SLURM_LOCALID" if starter(env) == "slurm" else "LOCAL_RANK", "0"))


def machine(env: Mapping[str, str] | None = None) -> int:
    """The number of this process's machine in its run."""
    env = os.environ if env is None else env
    by = {"torchrun": "GROUP_RANK", "slurm": "SLURM_NODEID"}.get(starter(env), "NODE_RANK")
    return int(env.get(by, "0"))


def starter(env: Mapping[str, str] | None = None) -> str:
    """Who started this process as one of several: 'torchrun', 'slurm', 'hand' (one command a
    machine, by NODE_RANK), 'looptx' or ''."""
    env = os.environ if env is None else env
    if RUN in env:
        return "looptx"
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "LOCAL_RANK" in env):
        return "torchrun"
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return "slurm"
    return "hand" if "NODE_RANK" in env else ""
