"""What a run will take, before it starts: parameters, FLOPs, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import MissingError, UsageError
from looptx_core.machine.facts import Machine, this_machine
from looptx_core.model.flops import state_bytes, token_flops
from looptx_core.parallel.deepspeed.offload import Offload, plan_offload
from looptx_core.parallel.memory import MemoryEstimate, ParallelLayout, count, rank_need

_CERTAIN = 1.5  # times what is usable: beyond an estimate's error, and beyond all that is there


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, costs in FLOPs."""

    parameters: int
    flops_per_token: dict[int, float]
    """Forward, by loops, read out once at the end, at half the sequence's length of context."""
    need: MemoryEstimate
    """Of each process, with nothing offloaded."""
    spread: ParallelLayout
    rows: int
    """Sequences a forward pass on one device."""
    precision: str
    offload: Offload
    cache: int
    """Of one sequence of `max_seq_len` tokens at full depth, in generation; not in `total`."""
    reads_on: bool
    """Whether `cache` holds a text of any length, as that of a model with a memory does."""
    machine: Machine
    advice: str

    @property
    def total(self) -> int:
        """Of one process at its peak."""
        return self.need.total

    @property
    def bytes(self) -> dict[str, int]:
        """Of one process, by what they are for; their sum is `total`."""
        return self.need.to_dict()

    @property
    def fits(self) -> bool:
        return self.offload.fits

    @property
    def is_hopeless(self) -> bool:
        """Whether it needs clearly more than this machine has, whatever is offloaded."""
        uses = self.offload.arithmetic
        return not self.fits and any(use.total > _CERTAIN * use.usable for use in uses)

    @property
    def verdict(self) -> str:
        """One line for people: whether it fits, and if not, what would."""
        return "It fits." if self.fits else f"It does not fit. {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """For `looptx train --dry-run --json`."""
        return asdict(self) | {"bytes": self.bytes, "total": self.total, "fits": self.fits}


def plan(model: ModelConfig, config: TrainConfig, machine: Machine | None = None) -> Plan:
    """Count a run's needs, and compare them with a machine: this one by default."""
    machine = machine or this_machine(config.nvme_path or ".")
    spread = ParallelLayout.of(config)
    rows = config.micro_batch_size
    max_loops = config.max_loops or model.max_loops
    cost = token_flops(model, config.seq_len / 2)
    # 'auto' is a probe's choice at the start: bf16 on GPUs, float32 where it is not sure.
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bool(machine.gpu_memory))
    asked = config.offload or "auto"
    offload = plan_offload(
        model, config, machine, spread=spread, rows=rows, bf16=bf16, asked=asked
    )  # fmt: skip
    return Plan(
        parameters=count(model).all,
        flops_per_token={loops: cost.at(loops) for loops in sorted({1, 2, 4, max_loops})},
        need=rank_need(model, config, spread, rows, bf16, heap=not machine.gpu_memory),
        spread=spread,
        rows=rows,
        precision="bf16" if bf16 else "float32",
        offload=offload,
        cache=state_bytes(model, max_loops),
        reads_on=model.has_memory,
        machine=machine,
        advice="" if offload.fits else _advice(model, config, machine, spread, rows, bf16, asked),
    )


def check_memory(model: ModelConfig, config: TrainConfig, machine: Machine | None = None) -> None:
    """Refuse a run that needs clearly more memory than a machine has: this one by default.

    Raises:
        UsageError: other settings would make it fit.
        MissingError: none would.
    """
    found = plan(model, config, machine)
    if not found.is_hopeless:
        return
    uses = [use for use in found.offload.arithmetic if not use.fits]
    what = ", ".join(
        f"{use.total / 2**30:.1f} GiB of {use.place} for {use.by}, and {use.usable / 2**30:.1f} "
        "GiB are usable" for use in uses
    )  # fmt: skip
    error = MissingError if found.advice == _NONE_FITS else UsageError
    raise error(f"the run needs {what}. {found.verdict} `force` tries all the same")


_NONE_FITS = "By this estimate nothing makes it fit here; take a smaller `preset`, or more devices."


def _advice(
    model: ModelConfig, config: TrainConfig, machine: Machine, spread: ParallelLayout, rows: int,
    bf16: bool, asked: str,
) -> str:  # fmt: skip
    """The first settings that would make it fit, tried in the order of what they cost."""
    less = replace(config, grad_checkpointing=True)
    trials = [("`grad_checkpointing`", less, rows)]
    while rows > 1 and config.batch_size % (rows // 2 * spread.world) == 0:
        rows //= 2
        less = replace(less, micro_batch=rows)
        trials.append((f"`grad_checkpointing` `micro_batch` {rows}", less, rows))
    kinds: list[tuple[str, ParallelLayout, str]] = [("", spread, asked)]
    if spread.stage < 3:
        given = config.strategy != "auto"
        place = f" in place of `strategy` {config.strategy}" if given else ""
        kinds.append((f" `zero3` `offload` auto{place}", replace(spread, kind="zero3"), "auto"))
    for more, kind, wish in kinds:
        for settings, trial, these in trials:
            fitting = plan_offload(
                model, trial, machine, spread=kind, rows=these, bf16=bf16, asked=wish
            )
            if fitting.fits:
                return f"Pass {settings}{more}."
    return _NONE_FITS
