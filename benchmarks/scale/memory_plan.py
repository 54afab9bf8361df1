"""Is `looptx train --dry-run` right about memory? Its estimate against the measured peak.

Each case trains some steps by the very code of `looptx train` in a fresh process, without
validation and saving. The peak is the resident memory's high-water mark over those steps, less what
the process held after its imports and a tiny run (which loads kernels and starts thread pools).

    python -m benchmarks.scale.memory_plan [--cases plain,checkpointing] [--threads 1]
    python -m benchmarks.scale.memory_plan --again      the estimate anew beside the peaks of before
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.record import flat, results_file, rows_so_far, write

MEDIUM = {"vocab_size": 16384, "d_model": 1024, "n_heads": 16, "n_kv_heads": 8, "head_dim": 64,
          "d_ff": 3072, "prelude_layers": 2, "core_layers": 4, "coda_layers": 2}  # fmt: skip
WIDE = {**MEDIUM, "vocab_size": 32768, "d_model": 1536, "n_heads": 24, "n_kv_heads": 8,
        "d_ff": 4608, "prelude_layers": 1, "core_layers": 2, "coda_layers": 1}  # fmt: skip
FIXED = {"steps": 3, "loop_schedule": "fixed", "optimizer": "adamw", "precision": "float32"}

# Model's shape, settings of the run.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (MEDIUM, {**FIXED, "loops": 2, "batch_size": 2, "seq_len": 128}),
    "deep": (MEDIUM, {**FIXED, "loops": 4, "batch_size": 4, "seq_len": 128}),
    "checkpointing": (
        MEDIUM,
        {**FIXED, "loops": 4, "batch_size": 4, "seq_len": 128, "grad_checkpointing": True},
    ),
    "accumulating": (
        MEDIUM, {**FIXED, "loops": 2, "batch_size": 4, "micro_batch": 2, "seq_len": 128}
    ),
    "wide": (WIDE, {**FIXED, "loops": 3, "batch_size": 2, "seq_len": 192}),
    "muon": (WIDE, {**FIXED, "loops": 2, "batch_size": 1, "seq_len": 128, "optimizer": "muon"}),
    # The plan counts the deepest of a thousand batches: with this seed the second is nearly one.
    "by loss": (MEDIUM, {**FIXED, "loop_schedule": "loss", "loops": None, "batch_size": 2,
                         "seq_len": 128, "steps": 6, "seed": 538}),
    "fsdp": (MEDIUM, {**FIXED, "loops": 2, "batch_size": 2, "seq_len": 128, "strategy": "fsdp"}),
    "zero3": (MEDIUM, {**FIXED, "loops": 2, "batch_size": 2, "seq_len": 128, "zero3": True,
                       "offload": "none"}),
    "zero3 deep": (WIDE, {**FIXED, "loops": 3, "batch_size": 2, "seq_len": 192, "zero3": True,
                          "offload": "none"}),
    "zero3 cpu": (MEDIUM, {**FIXED, "loops": 2, "batch_size": 2, "seq_len": 128, "zero3": True,
                           "offload": "cpu"}),
    "zero3 nvme": (MEDIUM, {**FIXED, "loops": 2, "batch_size": 2, "seq_len": 128, "zero3": True,
                            "offload": "nvme"}),
}  # fmt: skip
TINY = {"vocab_size": 1024, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
        "d_ff": 128, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}  # fmt: skip


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since it was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return 1024 * int(found[1])


def child(shape: dict[str, Any], settings: dict[str, Any], threads: int) -> None:
    """Train, and print the peak above the imports."""
    import dataclasses

    import lightning as L
    import torch

    from looptx_core.config.model import ModelConfig
    from looptx_core.config.run import TrainConfig
    from looptx_core.data.bundled import bundled_shards
    from looptx_core.training.run import train

    torch.set_num_threads(threads)
    shards = bundled_shards(1024)
    config = TrainConfig(**settings)
    before = 0

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step < trainer.max_steps:
                return
            peak = resident("VmHWM") - before
            print(json.dumps({"before": before, "peak": peak}), flush=True)
            os._exit(0)

    # The whole schedule, but one step more, so that the end with its saving is never reached.
    config = dataclasses.replace(config, save_every=10**6, val_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        tiny = dataclasses.replace(config, steps=1, batch_size=2, micro_batch=None, loops=None,
                                   seq_len=16, val_batches=1)  # fmt: skip
        if not settings.get("zero3"):  # its engine can't be made twice in a process
            train(tiny, ModelConfig(**TINY), data=shards, folder=Path(folder) / "tiny")
        else:
            import deepspeed  # noqa: F401
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        stop = Stop()
        train(config, ModelConfig(**shape), data=shards, folder=Path(folder) / "run",
              callbacks=[stop])  # fmt: skip


def measured(name: str, threads: int) -> dict[str, Any]:
    shape, settings = CASES[name]
    module = ["-m", "benchmarks.scale.memory_plan"]
    command = [sys.executable, *module, "--child", json.dumps([shape, settings, threads])]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return

    from looptx_core.config.model import ModelConfig
    from looptx_core.config.run import TrainConfig
    from looptx_core.parallel.plan import plan

    file = results_file("scale.memory_plan")
    cases = {row["case"]: row for row in rows_so_far(file)}
    for name in [*cases] if args.again else args.cases.split(","):
        shape, settings = CASES[name]
        planned = plan(ModelConfig(**shape), TrainConfig(**settings))
        peak = cases[name]["measured"] if args.again else measured(name, args.threads)["peak"]
        # In RAM, of what the plan places: all of it where nothing is offloaded.
        memory = next(hold for hold in planned.offload.arithmetic if hold.place == "ram")
        ratio = memory.total / peak
        cases[name] = {
            "case": name,
            "parameters": planned.parameters,
            "planned": memory.total,
            **flat({"parts": memory.bytes, "settings": settings}),
            "measured": peak,
            "ratio": round(ratio, 3),
        }
        print(f"{name:>14}: planned {memory.total / 1e9:.3f} GB, measured "
              f"{peak / 1e9:.3f} GB, ratio {ratio:.3f}", flush=True)  # fmt: skip
        write("scale.memory_plan", __doc__.splitlines()[0], cases.values(), threads=args.threads)


if __name__ == "__main__":
    main()
