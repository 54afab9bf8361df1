"""How a run is spread over processes, memories and disks: Lightning's strategy for its settings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from looptx_core.config.processes import RUN, is_first_here, starter
from looptx_core.config.run import RunConfig
from looptx_core.documents import read_json
from looptx_core.errors import UsageError
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.ranks import BarrierAtTeardown

Report = Callable[[str], object]


@dataclass(frozen=True)
class Placement:
    """Where what ZeRO offloads goes: 'none', 'cpu' or 'nvme'."""

    optimizer: str = "none"
    weights: str = "none"


@dataclass
class Swapped:
    """What a run moved to and from its swap files, over all processes. In bytes."""

    files: int
    size: int
    written: int
    read: int


class _Ddp(BarrierAtTeardown, DDPStrategy):
    """Lightning's, which names the process that was lost."""

    def __init__(self, advice: str, **how: Any) -> None:
        super().__init__(**how)
        self.advice = advice


def choose_strategy(
    model: LoopedTransformer,
    config: RunConfig,
    *,
    folder: Path,
    device: torch.device,
    bf16: bool,
    report: Report,
    advice: str = "",
) -> Strategy | str:
    """For Lightning's Trainer. advice: how to go on, where a process is lost.

    Raises what `check_strategy` raises.
    """
    kind, on_gpu = config.sharding, device.type == "cuda"
    check_strategy(config, folder)
    if kind == "none":
        return "auto"
    report(f"strategy: {kind} over {_processes(config)}, one for each {device.type} device")
    if kind == "ddp":
        return _Ddp(advice, process_group_backend=None if on_gpu else "gloo")
    if kind == "fsdp":
        from looptx_core.parallel.fsdp import FsdpStrategy

        return FsdpStrategy(config.world_size, on_gpu=on_gpu, advice=advice)
    place = _offload_plan(model, config, folder, bf16, report)
    return _zero(model, config, place, folder, on_gpu, report, advice)


def check_strategy(config: RunConfig, folder: Path) -> None:
    """Look at all that a run's strategy needs, before the run has a folder.

    Raises `MissingError` without a DeepSpeed that was tested, `UsageError` for settings that can't
    be: another number of processes than was started, a place that is none to swap to, or a file of
    DeepSpeed's settings that can't be read.
    """
    _check_world(config)
    if config.sharding not in ("zero2", "zero3"):
        return
    from looptx_core.parallel.deepspeed.library import check_version
    from looptx_core.parallel.deepspeed.nvme import check_swap_folder

    check_version()
    if config.offload == "nvme":
        check_swap_folder(Path(config.nvme_path) if config.nvme_path else None, folder)
    check_deepspeed_file(config)


def check_deepspeed_file(config: RunConfig) -> None:
    """Raise `UsageError` for a file of DeepSpeed's settings that can't be used."""
    if config.deepspeed_config:
        _own_settings({}, config.deepspeed_config)


def _check_world(config: RunConfig) -> None:
    by = starter()
    count = os.environ.get({"torchrun": "WORLD_SIZE", "slurm": "SLURM_NTASKS"}.get(by, ""))
    if count is not None and int(count) != config.world_size:
        raise UsageError(
            f"{by} started {count} processes, and `devices` {config.devices} x `nodes` "
            f"{config.nodes} are {config.world_size}; make them agree"
        )


def shards_optimizer(config: RunConfig) -> bool:
    """Whether updates run on cut parameters, which Muon can't."""
    return config.sharding not in ("none", "ddp")


def _zero(
    model: LoopedTransformer,
    config: RunConfig,
    place: Placement,
    folder: Path,
    on_gpu: bool,
    report: Report,
    advice: str,
) -> Strategy:
    from looptx_core.parallel.deepspeed.nvme import SwapFolder
    from looptx_core.parallel.deepspeed.settings import settings
    from looptx_core.parallel.deepspeed.zero import ZeroStrategy

    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    swap = None
    if "nvme" in (place.optimizer, place.weights):
        # Weights, master weights, two moments and gradients of one machine's processes.
        needed = 20 * sum(trained) // config.nodes
        path = Path(config.nvme_path) if config.nvme_path else None
        swap = SwapFolder(path, folder, needed, by_libaio=_has_async_io(report))
        report(f"swap: {swap.folder}, up to {needed / 1e9:.2f} GB on this machine")
    report(f"offload: optimizer {place.optimizer}, weights {place.weights}")
    chosen = settings(
        3 if config.sharding == "zero3" else 2,
        rows=config.micro_batch_size,
        clip=config.clip,
        parameters=sum(trained),
        largest=max(
            p.numel() for part in (model.prelude, model.core, model.coda) for p in part.parameters()
        ),
        looped=sum(p.dim() >= 2 for p in model.core.parameters()),
        world_size=config.world_size,
        on_gpu=on_gpu,
        optimizer_to=place.optimizer,
        weights_to=place.weights,
        swap=swap.folder if swap else None,
    )
    if config.deepspeed_config:
        chosen = _own_settings(chosen, config.deepspeed_config)
    return ZeroStrategy(chosen, on_gpu=on_gpu, swap=swap, advice=advice)


def _offload_plan(
    model: LoopedTransformer, config: RunConfig, folder: Path, bf16: bool, report: Report
) -> Placement:
    """What was asked for, or by default the least offloading with which the run fits."""
    from looptx_core.machine.facts import this_machine
    from looptx_core.parallel.deepspeed.offload import plan_offload

    if config.offload in ("none", "cpu", "nvme"):
        both = config.sharding == "zero3"
        return Placement(config.offload, config.offload if both else "none")
    machine = this_machine(config.nvme_path or folder)
    plan = plan_offload(model.config, config, machine, rows=config.micro_batch_size, bf16=bf16)
    for reason in plan.reasons:
        report(f"offload: {reason}")
    if not plan.fits:
        report(
            "offload: by this estimate the run does not fit; looptx train --dry-run shows "
            "the arithmetic"
        )
    return Placement(plan.optimizer, plan.parameters)


def _has_async_io(report: Report) -> bool:
    """Whether DeepSpeed's op for swapping can be used; compiles it if needed.

    A machine's first process compiles for all. If the op can't be had, a line reports what is
    missing, and that swapping is slower.
    """
    from looptx_core.parallel.deepspeed.ops import (
        build_op,
        inspect_op,
        op_obstacle,
        prefer_own_ninja,
    )

    prefer_own_ninja()
    if obstacle := op_obstacle("async_io"):
        report(f"swap: by plain files and threads, slower than by libaio: {obstacle}")
        return False
    if is_first_here():
        for op in ("pin_memory", "async_io"):
            if inspect_op(op).state != "built":
                build_op(op, report)
    return True


def _own_settings(chosen: dict[str, Any], name: str) -> dict[str, Any]:
    """DeepSpeed's settings with those of a user's file over them."""
    from looptx_core.parallel.deepspeed.settings import override

    found = read_json(Path(name), mend="mend `deepspeed_config`", error=UsageError)
    return override(chosen, found, name)


def _processes(config: RunConfig) -> str:
    count = config.world_size
    text = f"{count} process{'es' if count > 1 else ''}"
    return text + (f" on {config.nodes} machines" if config.nodes > 1 else "")


@contextlib.contextmanager
def own_environment(folder: Path) -> Iterator[None]:
    """Export the run's folder to the processes that it starts, and afterwards restore the
    environment variables that Lightning and DeepSpeed set."""
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK", RUN)
    before = {name: os.environ.get(name) for name in names}
    if starter() in ("", "hand"):
        os.environ[RUN] = str(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class FinalCheckpoint(L.Callback):
    """Saves the last step of a sharded run, from which its model folder is made.

    After training `saved` is the checkpoint, and `swapped` the traffic to the disk, if any.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.saved: Path | None = None
        self.swapped: Swapped | None = None

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        path = self.checkpoints / f"step-{trainer.global_step:07d}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)
        self.saved = path
        strategy: Any = trainer.strategy
        if strategy.swap is None:
            return
        files = strategy.swap.files() if is_first_here() else []
        traffic = strategy.traffic
        sizes = [file.stat().st_size for file in files]
        counts = torch.tensor([len(files), sum(sizes), traffic.written, traffic.read],
                              dtype=torch.int64, device=strategy.root_device)  # fmt: skip
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.swapped = Swapped(*counts.tolist())
