"""What --dry-run prints: what a command would do and take."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from looptx_cli.console import stdout, with_flags
from looptx_cli.runs import SCHEMA_VERSION
from looptx_core.words import counted

if TYPE_CHECKING:
    from looptx_core.conversion.plan import ConversionPlan
    from looptx_core.finetuning.plan import FinetunePlan
    from looptx_core.parallel.plan import Plan
    from looptx_core.training.step_time import TimeEstimate


def print_document(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")


def say(line: str = "") -> None:
    """A line of the result, which the terminal wraps."""
    stdout().print(line, soft_wrap=True)


def say_size(name: str, size: int, more: str = "") -> None:
    """A row of a table of sizes, in bytes."""
    told = f"{size / 2**30:8.3f} GiB" if size >= 2**26 else f"{size / 2**20:8.3f} MiB"
    say(f"{name:>24}: {told}{more}")


def say_time(time: TimeEstimate | None) -> None:
    """How long it would take, and how that is known."""
    if time is None:
        say("time: not estimated where several processes share the work")
        return
    step = duration(time.seconds_per_step)
    how = (
        f"two steps timed here took {step} each"
        if time.timed
        else f"by its FLOPs a step takes some {step}, and none was tried"
    )
    say(
        f"time: about {duration(time.seconds)} for {counted(time.steps, 'step')}, an estimate: "
        f"{how}; evaluations and saves come on top"
    )


def duration(seconds: float) -> str:
    """A time for people, in the unit that fits."""
    for unit, length in (("years", 31557600), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{_rounded(seconds / length)} {unit}"
    return f"{_rounded(seconds)} seconds"


def _rounded(value: float) -> str:
    """Two figures that count."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def show_training(plan: Plan, time: TimeEstimate | None, as_json: bool) -> None:
    """Of `looptx train`."""
    if as_json:
        print_document({
            **plan.to_dict(),
            "advice": with_flags(plan.advice),
            "seconds_per_step": time and time.seconds_per_step,
            "seconds": time and time.seconds,
        })  # fmt: skip
        return
    say(f"{plan.parameters:,} parameters")
    for loops, flops in plan.flops_per_token.items():
        say(f"{counted(loops, 'loop'):>8}: {flops:.3g} FLOPs a token forward, read out once")
    told = f", {plan.cache:,} bytes, a text of any length" if plan.reads_on else " a full context"
    say_size("KV cache, generating", plan.cache, told)
    spread = plan.spread
    count = counted(spread.world, "process", "processes")
    cut = "nothing cut" if spread.kind in ("none", "ddp") else spread.kind
    say(
        f"\nEach of {count}, {cut}, {plan.precision}, "
        f"{counted(plan.rows, 'sequence')} a pass, nothing offloaded:"
    )
    for part, size in plan.bytes.items():
        say_size(part, size)
    say_size("at the peak", plan.total)
    say()
    for line in plan.offload.reasons:
        say(f"- {line}")
    for hold in plan.offload.arithmetic:
        parts = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in hold.bytes.items())
        of = f" of {hold.usable / 2**30:.3f} usable = {parts}"
        say_size(f"{hold.place}, {hold.by}", hold.total, of)
    names = ", ".join(plan.machine.gpu_names) or "no GPU"
    disk = f"{plan.machine.disk / 2**30:.0f} GiB of disk free"
    say_size("RAM here", plan.machine.ram, f"; {names}; {disk}")
    say(with_flags(plan.verdict))
    say_time(time)


def show_finetuning(plan: FinetunePlan, as_json: bool) -> None:
    """Of `looptx finetune`."""
    if as_json:
        print_document(plan.to_dict())
        return
    share = plan.trainable / plan.parameters
    say(
        f"{plan.method}: {plan.trainable:,} of {plan.parameters:,} parameters trained "
        f"({share:.1%}), and the confidence head"
    )
    say(
        f"{counted(plan.examples, 'example')} to train on, {plan.held_out:,} held out; "
        f"{plan.epochs:.3g} epochs, {counted(plan.steps, 'step')}"
    )
    for part, size in plan.need.to_dict().items():
        say_size(part, size)
    say_size("at the peak", plan.need.total)
    say_time(plan.time)


def show_conversion(plan: ConversionPlan, as_json: bool) -> None:
    """Of `looptx convert`."""
    if as_json:
        print_document(plan.to_dict())
        return
    for number, step in enumerate(plan.does, 1):
        say(f"{number}. {with_flags(step)}")
    say(
        f"{plan.parameters:,} parameters; {plan.bytes_before:,} bytes are read, and the weights "
        f"that are written take {plan.bytes_after:,}"
    )
    if plan.time is not None:
        say_time(plan.time)
