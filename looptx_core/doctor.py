"""What is here, what each feature would use and why, what is missing and how to get it.

Packages are tried in processes of their own, so that a broken one, or one that crashes, is a line
of the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from looptx_core import __version__
from looptx_core.machine.compiler import compiler, libaio_obstacle, ninja_obstacle
from looptx_core.machine.disk import disk_speed
from looptx_core.machine.facts import Machine, free_ram, is_memory, this_machine
from looptx_core.parallel.deepspeed.library import version_obstacle
from looptx_core.parallel.deepspeed.ops import OPS, TRIAL, Op, inspect_op
from looptx_core.words import counted

SCHEMA_VERSION = 1
_MARK = "looptx-found:"

# Each prints what it found as JSON, after the mark; whatever else it prints is noise.
_TRIALS = {
    "bitsandbytes": """
import bitsandbytes, torch
from bitsandbytes.functional import quantize_4bit, dequantize_4bit
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.randn(64, 64, device=device)
packed, state = quantize_4bit(weight, quant_type="nf4")
error = ((dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
assert error < 0.2, f"nf4 on {device} is off by {error:.2f}"
found = {"version": bitsandbytes.__version__, "detail": f"nf4 works on {device}"}
""",
    "deepspeed": TRIAL,
    "flash_attn": """
import flash_attn
from flash_attn import flash_attn_varlen_func
found = {"version": flash_attn.__version__, "detail": "FlashAttention 2"}
""",
}


@dataclass(frozen=True)
class Check:
    """One thing that is here, or is not."""

    name: str
    state: Literal["ok", "missing", "broken", "note"]
    """note: not needed here, or not as good as it could be."""
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Use:
    """What a feature would use here."""

    feature: str
    ready: bool
    uses: str
    why: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    looptx: str
    machine: Machine
    checks: list[Check]
    ops: list[Op]
    uses: list[Use]

    def to_dict(self) -> dict[str, Any]:
        """With a `schema_version`, as `looptx doctor --json` prints it."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def examine(swap: str = ".") -> Diagnosis:
    """Look at this machine; some seconds. swap: where swap files would go."""
    trials = start_trials(name for name in _TRIALS if importlib.util.find_spec(name))
    machine = this_machine(swap)
    ops = [inspect_op(name) for name in OPS]
    local = [*_system(), *_torch(machine), *_attention(), *_building(), _disk(machine)]
    packages = {name: _package(name, trials.get(name)) for name in _TRIALS}
    checks = [*local, *(check for check in packages.values() if check is not None)]
    return Diagnosis(__version__, machine, checks, ops, _uses(machine, checks, ops))


def start_trials(names: Iterable[str]) -> dict[str, subprocess.Popen[str]]:
    """Begin to import packages, each in a process of its own."""
    ending = f"\nimport json\nprint({_MARK!r} + json.dumps(found))\n"
    return {
        name: subprocess.Popen(
            [sys.executable, "-P", "-c", _TRIALS[name] + ending],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={"DS_ACCELERATOR": "cpu", **os.environ} if _no_gpu() else dict(os.environ),
        )
        for name in names
    }  # fmt: skip


def finish_trial(process: subprocess.Popen[str], seconds: float = 180.0) -> dict[str, Any] | str:
    """What a trial found, or one line on why it found nothing."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"its import did not end in {seconds:.0f} s"
    if process.returncode < 0:
        return f"its import crashed with signal {-process.returncode}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    return (lines or ["its import said nothing"])[-1][:300]


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _package(name: str, trial: subprocess.Popen[str] | None) -> Check | None:
    if trial is None:
        if name == "flash_attn":
            return None  # an extra, which the line on attention speaks of
        return Check(name, "missing", "not installed", f"pip install {name} (Linux)")
    found = finish_trial(trial)
    if isinstance(found, str):
        return Check(name, "broken", found, f"pip install --force-reinstall {name}")
    if name == "deepspeed" and (wrong := version_obstacle()):
        detail, _, mend = wrong.partition("; ")
        return Check(name, "broken", detail, mend)
    return Check(name, "ok", f"{found['version']}, {found['detail']}")


def _system() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Check("cpu", "ok", f"{cores} cores for this process, {platform.machine()}"),
    ]


def _torch(machine: Machine) -> list[Check]:
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    threads = counted(torch.get_num_threads(), "thread")
    checks = [Check("torch", "ok", f"{torch.__version__}, {threads}, {vectors}")]
    if machine.gpu_memory:
        gpus = ", ".join(
            f"{name} with {size / 2**30:.0f} GiB"
            for name, size in zip(machine.gpu_names, machine.gpu_memory)
        )
        checks.append(Check("cuda", "ok", f"{torch.version.cuda}: {gpus}"))
    elif torch.version.cuda is None and torch.version.hip is None:
        checks.append(Check("cuda", "note", "this torch is built for CPUs",
                            "for an NVIDIA GPU install torch from its CUDA index"))  # fmt: skip
    else:
        checks.append(Check("cuda", "note", "torch is built for GPUs and sees none",
                            "nvidia-smi tells whether the driver does"))  # fmt: skip
    checks.append(Check("ram", "ok", f"{machine.ram / 2**30:.1f} GiB, of which "
                                     f"{free_ram() / 2**30:.1f} can be had now"))  # fmt: skip
    return checks


def _attention() -> list[Check]:
    import torch

    from looptx_core.model.attention import choose_backend

    device = torch.device("cpu" if _no_gpu() else "cuda")
    dtype = torch.float32 if _no_gpu() else torch.bfloat16
    chosen = choose_backend("auto", device, dtype)
    return [Check("attention", "ok", f"{chosen.name}: {chosen.reason}")]


def _building() -> list[Check]:
    found, checks = compiler(), []
    if found.obstacle:
        checks.append(Check("c++", "missing", found.obstacle, "Debian: apt install g++"))
    else:
        checks.append(Check("c++", "ok", f"{found.command}, {found.version}, with OpenMP"))
    for name, wrong, mend in (
        ("ninja", ninja_obstacle(), "pip install ninja"),
        ("libaio", libaio_obstacle(), "apt install libaio-dev (Fedora: libaio-devel)"),
    ):
        if wrong:
            checks.append(Check(name, "missing", wrong, mend))
        else:
            checks.append(Check(name, "ok", "found"))
    return checks


def _disk(machine: Machine) -> Check:
    where = f"{machine.disk_path} ({machine.filesystem or 'unknown file system'})"
    free = f"{machine.disk / 2**30:.0f} GiB free"
    if is_memory(machine.filesystem):
        return Check("disk", "note", f"{where} lies in memory, so swapping there frees none",
                     "name a folder on a disk: looptx doctor --path DIR")  # fmt: skip
    try:
        speed = disk_speed(machine.disk_path)
    except OSError as error:
        return Check("disk", "note", f"{where}, {free}; no direct read: {error.strerror}",
                     "name another folder: looptx doctor --path DIR")  # fmt: skip
    rates = f"{speed.read / 1e6:,.0f} MB/s read, {speed.write / 1e6:,.0f} MB/s written"
    return Check("disk", "ok", f"{where}, {free}, {rates} directly")


def _uses(machine: Machine, checks: list[Check], ops: list[Op]) -> list[Use]:
    import torch

    from looptx_core.training.hardware import choose_precision

    state = {check.name: check for check in checks}
    on_gpu = bool(machine.gpu_memory)
    device = torch.device("cuda" if on_gpu else "cpu")
    where = (
        machine.gpu_names[0]
        if on_gpu
        else f"{counted(torch.get_num_threads(), 'thread')} of the CPU"
    )
    precision, why = choose_precision("auto", device)
    uses = [
        Use("train", True, f"{where}, {precision}", why),
        Use("`attention` auto", True, *state["attention"].detail.split(": ", 1)),
        *([] if on_gpu else [_kernels()]),
        _need("`compile`", ["c++"] if not on_gpu else [], state, "torch.compile",
              "its kernels are built here" if not on_gpu else "Triton builds its kernels"),
        Use("`devices`", True, *_devices(machine)),
    ]  # fmt: skip
    engine = "DeepSpeed on the " + ("GPU" if on_gpu else "CPU accelerator")
    uses += [
        _need("`zero3`", ["deepspeed"], state, engine, "weights are cut over the processes"),
        _need("`zero3` `offload` cpu", ["deepspeed"], state,
              f"{engine}, optimizer and weights in RAM",
              f"{machine.ram / 2**30:.0f} GiB of RAM beside "
              + ("the GPU's memory" if on_gpu else "nothing else, so it frees none here")),
    ]  # fmt: skip
    aio = next(op for op in ops if op.name == "async_io")
    built = "" if aio.state == "built" else f"; async_io is {aio.state}: looptx doctor --build"
    by = f"libaio{built}"
    lacking = [state[name] for name in ("libaio", "c++", "ninja") if state[name].state != "ok"]
    if lacking:
        by = f"threads, slower than libaio: {lacking[0].detail}"
    nvme = _need("`zero3` `offload` nvme", ["deepspeed"], state, f"{engine}, swap files by {by}",
                 state["disk"].detail)  # fmt: skip
    if not machine.can_swap:
        nvme = Use(nvme.feature, False, nvme.uses, state["disk"].detail, "`nvme_path` on a disk")
    quantised = _need("finetune `qlora`", ["bitsandbytes"], state, "bitsandbytes, nf4 or int8",
                      "a base in 4 or 8 bits")  # fmt: skip
    return [*uses, nvme, quantised]


def _kernels() -> Use:
    """The fused kernels that training takes on this CPU; tried anew, on `nano`'s shapes."""
    from looptx_core.config.model import ModelConfig
    from looptx_core.config.presets import get_preset
    from looptx_core.config.run import TrainConfig
    from looptx_core.model import fused
    from looptx_core.training.kernel_trial import choose

    said, feature = fused.enable_fused(), "train: fused kernels"
    if not fused.is_prepared():
        return Use(feature, True, "plain torch", said.removeprefix("plain torch: "))
    preset, shape = get_preset("nano"), TrainConfig()
    choice = choose(
        ModelConfig(**preset["model"]), shape.micro_batch_size, shape.seq_len, again=True
    )
    fused.enable_fused(False)
    times = ", ".join(f"{name} {a:.3g} and {b:.3g}" for name, (a, b) in choice.milliseconds.items())
    return Use(feature, True, str(choice), f"`nano`, ms plain and fused: {times}")


def _need(feature: str, names: list[str], state: dict[str, Check], uses: str, why: str) -> Use:
    """A feature that works where all of `names` do."""
    for name in names:
        check = state[name]
        if check.state != "ok":
            return Use(feature, False, uses, f"{name}: {check.detail}", check.mend)
    return Use(feature, True, uses, why)


def _devices(machine: Machine) -> tuple[str, str]:
    if machine.gpu_memory:
        count = len(machine.gpu_memory)
        return "NCCL", f"{count} GPU{'s' if count > 1 else ''} here"
    return "gloo", "processes on the CPU, to try out what is sent to GPUs"
