"""Processes of one run: starting the others, agreeing on values, and ending together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor

_POLL = 0.5  # seconds
_GRACE = 3.0  # seconds for a survivor's own message, before it is ended


def has_ranks() -> bool:
    """Whether this is one of a run's processes that communicate."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest value of all ranks. Every rank has to call this."""
    if not has_ranks() or torch.distributed.get_world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether the value is true on any rank. Every rank has to call this."""
    return bool(max_over_ranks(int(value), device))


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks. Every rank has to call this."""
    if not has_ranks():
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine, and ends all when one ends badly.

    advice: how to go on, for the message.
    """

    def __init__(self, *args: Any, advice: str = "") -> None:
        super().__init__(*args)
        self.advice = advice

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.cluster_environment.creates_processes_externally:
            if self.cluster_environment.local_rank() == 0:
                self._call_children_scripts()
                _in_background(_watch_children, self.procs, self.advice)
            else:
                _in_background(_watch_parent, os.getppid(), self.advice)
        return function(*args, **kwargs)


class BarrierAtTeardown:
    """For a Lightning strategy: its processes by `Launcher`. advice: how to go on."""

    advice: str
    _launcher: Any

    def _configure_launcher(self) -> None:
        strategy: Any = self
        self._launcher = Launcher(
            strategy.cluster_environment,
            strategy.num_processes,
            strategy.num_nodes,
            advice=self.advice,
        )


def _watch_children(processes: list[subprocess.Popen[bytes]], advice: str) -> None:
    while any(process.poll() is None for process in processes):
        for number, process in enumerate(processes, start=1):
            if process.returncode:
                time.sleep(_GRACE)
                _end(f"process {number} {_ended(process.returncode)}", advice, processes)
        time.sleep(_POLL)


def _watch_parent(parent: int, advice: str) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    time.sleep(_GRACE)
    _end("the run's first process is gone", advice, [])


def _ended(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _end(reason: str, advice: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """A collective that waits for a process that is gone can't be left but by ending."""
    sys.stderr.write(f"looptx: error: {reason}, so the others stop; {advice}\n")
    sys.stderr.flush()
    for process in processes:
        process.kill()
    os._exit(1)


def _in_background(function: Any, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def lost_peer(error: BaseException) -> bool:
    """Whether this is how a collective ends when another process is gone."""
    text = str(error)
    gloo = "gloo" in text.lower() or "Connection closed by peer" in text
    return isinstance(error, RuntimeError) and (
        gloo or "Connection reset by peer" in text or "NCCL" in text
    )
