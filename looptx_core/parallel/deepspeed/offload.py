"""What to offload, and where to: the smallest set that makes a run fit.

DeepSpeed moves two things: the optimizer (its moments, the float32 masters and the gradients that
it reads; arXiv 2101.06840), and with it the weights (arXiv 2104.07857). To RAM first, which is
faster, then to a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.machine.facts import Machine
from looptx_core.parallel.memory import MemoryEstimate, ParallelLayout, rank_need

OffloadTarget = Literal["none", "cpu", "nvme"]

# Of each place, what is left to the system, the allocator's gaps and the data.
_USABLE = {"gpu": 0.9, "ram": 0.85, "disk": 0.95}
_SWAP_BUFFERS = 5  # of one update's share each, in RAM, where the optimizer lies on a disk
# The smaller set first; a set to RAM before the same one to disk.
_CHOICES: tuple[tuple[OffloadTarget, OffloadTarget], ...] = (
    ("none", "none"),
    ("cpu", "none"),
    ("nvme", "none"),
    ("cpu", "cpu"),
    ("nvme", "cpu"),
    ("nvme", "nvme"),
)


@dataclass(frozen=True)
class MemoryUse:
    """What lies in one place, in bytes by what it is for, and what the place has for it."""

    place: Literal["gpu", "ram", "disk"]
    by: str
    """'each process' on a GPU, 'each machine' in RAM and on disk."""
    bytes: dict[str, int]
    usable: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass(frozen=True)
class Offload:
    """Where DeepSpeed keeps the optimizer and the weights between their uses, and why."""

    optimizer: OffloadTarget
    parameters: OffloadTarget
    fits: bool
    reasons: tuple[str, ...]
    """One line for each set that was tried, the chosen one last."""
    arithmetic: tuple[MemoryUse, ...]


def plan_offload(
    model: ModelConfig,
    config: RunConfig,
    machine: Machine,
    *,
    spread: ParallelLayout | None = None,
    rows: int | None = None,
    bf16: bool = False,
    asked: str = "auto",
) -> Offload:
    """Choose what an `offload` of auto does, or count what an asked `none`, `cpu` or `nvme` takes.

    A pure function: the same arguments, the same plan. rows: sequences a forward pass on one
    device. Where nothing fits, the largest set is returned with `fits` False.
    """
    spread = spread or ParallelLayout.of(config)
    rows = rows or config.micro_batch_size
    need = rank_need(model, config, spread, rows, bf16, heap=not machine.gpu_memory)
    choices = _allowed(spread, machine, asked)
    reasons: list[str] = []
    for optimizer, parameters in choices:
        holds = _offload_plan(need, optimizer, parameters, spread, machine)
        wrong = [hold for hold in holds if not hold.fits]
        name = _name(optimizer, parameters)
        if not wrong:
            reasons.append(f"{name}: fits")
            return Offload(optimizer, parameters, True, tuple(reasons), holds)
        reasons.append(f"{name}: " + ", ".join(
            f"{_gib(hold.total)} in {hold.place} for {hold.by}, of {_gib(hold.usable)} usable"
            for hold in wrong))  # fmt: skip
    return Offload(optimizer, parameters, False, tuple(reasons), holds)


def _allowed(
    spread: ParallelLayout, machine: Machine, asked: str
) -> list[tuple[OffloadTarget, OffloadTarget]]:
    """The sets to try, in their order."""
    if spread.stage == 0 or asked == "none":
        return [("none", "none")]
    if asked in ("cpu", "nvme"):
        place: OffloadTarget = "cpu" if asked == "cpu" else "nvme"
        return [(place, place if spread.stage == 3 else "none")]
    found = [choice for choice in _CHOICES if spread.stage == 3 or choice[1] == "none"]
    if spread.stage == 2:  # whose optimizer DeepSpeed offloads to RAM alone
        found = [choice for choice in found if "nvme" not in choice]
    if not machine.can_swap:
        found = [choice for choice in found if "nvme" not in choice]
    if not machine.gpu_memory:  # to RAM from RAM frees nothing
        found = [choice for choice in found if "cpu" not in choice]
    return found


def _offload_plan(
    need: MemoryEstimate,
    optimizer: OffloadTarget,
    parameters: OffloadTarget,
    spread: ParallelLayout,
    machine: Machine,
) -> tuple[MemoryUse, ...]:
    """Who lies where. The process's own memory is a GPU's, or RAM without one."""
    own: dict[str, int] = {}
    ram: dict[str, int] = {}
    disk: dict[str, int] = {}
    where = {"none": own, "cpu": ram, "nvme": disk}
    where[parameters]["weights"] = need.weights
    if parameters == "nvme":
        disk["weights"] -= need.unswapped
        ram |= {"weights": need.unswapped, "weights' buffers": need.pool}
    for name, size in (("optimizer", need.moments), ("master weights", need.masters)):
        where[optimizer][name] = size
    # Gradients are made on the device, and lie where the optimizer reads them; of an offloaded one
    # they are summed up in RAM first, where DeepSpeed has a place for all.
    where[optimizer]["gradients"] = need.gradients if optimizer == "none" else need.masters
    if optimizer != "none":
        ram["summed gradients"] = need.gradients
    own |= {"buffers": need.buffers, "activations": need.activations,
            "allocator's gaps": need.gaps}  # fmt: skip
    if optimizer == "none":
        own["not at the same time"] = need.overlap
    (own if optimizer == "none" else ram)["update"] = need.update
    if optimizer == "nvme":
        ram["swap buffers"] = _SWAP_BUFFERS * need.group
    for part in (own, ram, disk):
        for name in [name for name, size in part.items() if not size]:
            del part[name]
    here = spread.local  # one machine's memory and disk serve all its processes
    shared = {name: size * here for name, size in ram.items()}
    holds = []
    if machine.gpu_memory:
        usable = int(min(machine.gpu_memory) * _USABLE["gpu"])
        holds.append(MemoryUse("gpu", "each process", own, usable))
    else:
        for name, size in own.items():
            shared[name] = shared.get(name, 0) + size * here
    if shared:
        holds.append(MemoryUse("ram", "each machine", shared, int(machine.ram * _USABLE["ram"])))
    if disk:
        sizes = {name: size * here for name, size in disk.items()}
        holds.append(MemoryUse("disk", "each machine", sizes, int(machine.disk * _USABLE["disk"])))
    return tuple(holds)


def _name(optimizer: OffloadTarget, parameters: OffloadTarget) -> str:
    if optimizer == "none":
        return "nothing offloaded"
    if parameters == "none":
        return f"optimizer to {optimizer}"
    if optimizer == parameters:
        return f"optimizer and weights to {optimizer}"
    return f"optimizer to {optimizer}, weights to {parameters}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
