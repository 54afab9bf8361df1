"""What ZeRO-3 sends in a step, by loop count: two processes over loopback, bytes counted.

`held` is looptx's way: the looped weights, once gathered, stay to the end of the step. `released`
is DeepSpeed's own. Read-ahead and the keeping of small weights are off, which at this size would
cover the whole model. Units: multiples of the weights' size, P.

    python -m benchmarks.scale.zero_communication
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.record import write

MODEL = {
    "vocab_size": 400, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 768,
    "prelude_layers": 1, "core_layers": 2, "coda_layers": 1,
}  # fmt: skip
STEPS = 5
CASES = [
    *({"loop_schedule": "fixed", "loops": loops} for loops in (1, 4, 8)),
    {"loop_schedule": "fixed", "loops": 4, "grad_checkpointing": True},
    {"loop_schedule": "sampled", "mean_loops": 3.0},
]


def measure(shards: Path, out: Path) -> list[dict[str, Any]]:
    """In each of the two processes: a short run for each case, held and released."""
    import lightning as L
    import torch
    from torch import distributed

    from looptx_core.config.model import ModelConfig
    from looptx_core.config.run import TrainConfig
    from looptx_core.model.loop import LoopedTransformer
    from looptx_core.training import zero
    from looptx_core.training.run import train

    counts = {"gathered": 0, "reduced": 0}
    gather, reduce = distributed.all_gather_into_tensor, distributed.reduce_scatter_tensor

    def count(name: str, tensor: Any) -> None:
        counts[name] += tensor.numel() * tensor.element_size()

    def counted_gather(*args: Any, **kwargs: Any) -> Any:
        count("gathered", kwargs["output_tensor"] if "output_tensor" in kwargs else args[0])
        return gather(*args, **kwargs)

    def counted_reduce(*args: Any, **kwargs: Any) -> Any:
        source = next((kwargs[k] for k in ("input", "input_tensor") if k in kwargs), None)
        count("reduced", args[1] if source is None else source)
        return reduce(*args, **kwargs)

    distributed.all_gather_into_tensor = counted_gather
    distributed.reduce_scatter_tensor = counted_reduce

    class BySteps(L.Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, Any]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            counts.update(gathered=0, reduced=0)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            loops = float(trainer.callback_metrics["mean_loops"])
            self.steps.append({**counts, "loops": loops})

    small = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    (out / "small.json").write_text(json.dumps({"zero_optimization": small}))
    size = 4 * sum(p.numel() for p in LoopedTransformer(ModelConfig(**MODEL)).parameters())
    core = 4 * sum(p.numel() for p in LoopedTransformer(ModelConfig(**MODEL)).core.parameters())
    rows = []
    for number, case in enumerate(CASES):
        for held in (True, False):
            zero.ZeroStrategy.holds_core = property(lambda self, held=held: held)  # type: ignore
            seen = BySteps()
            settings = {
                "steps": STEPS, "seq_len": 32, "batch_size": 4, "nodes": 2, "zero3": True,
                "val_every": STEPS, "val_batches": 1, "save_every": STEPS, "lr": 1e-3,
                "precision": "float32", "optimizer": "adamw",
                "deepspeed_config": str(out / "small.json"), **case,
            }  # fmt: skip
            folder = out / f"{number}-{held}"
            folder.mkdir(exist_ok=True)
            train(TrainConfig(**settings), ModelConfig(**MODEL), data=shards, folder=folder,
                  callbacks=[seen])  # fmt: skip
            last = seen.steps[2:]  # DeepSpeed learns the order of modules in the first two
            rows.append({
                **case, "held": held, "weights_bytes": size, "core_share": round(core / size, 3),
                "loops": [round(step["loops"], 2) for step in last],
                "gathered": [round(step["gathered"] / size, 3) for step in last],
                "reduced": [round(step["reduced"] / size, 3) for step in last],
            })  # fmt: skip
    torch.distributed.barrier()
    return rows


def main() -> None:
    if len(sys.argv) == 3:
        rows = measure(Path(sys.argv[1]), Path(sys.argv[2]))
        if os.environ["RANK"] == "0":
            Path(sys.argv[2], "rows.json").write_text(json.dumps(rows))
        return
    from looptx_core.data.corpus import bundled_text
    from looptx_core.data.shard_writer import tokenize_corpus

    with tempfile.TemporaryDirectory() as top:
        text = Path(top) / "text.txt"
        text.write_text(bundled_text().read_text("utf-8")[:200_000], "utf-8")
        tokenize_corpus([str(text)], Path(top) / "shards", vocab_size=400, val_fraction=0.2)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            **os.environ, "TORCHELASTIC_RUN_ID": "benchmark", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "GROUP_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "benchmarks.scale.zero_communication",
            f"{top}/shards",
            top,
        ]
        ranks = [
            subprocess.Popen(command, env={**shared, "RANK": str(n), "GROUP_RANK": str(n)})
            for n in range(2)
        ]
        assert [process.wait() for process in ranks] == [0, 0]
        rows = json.loads(Path(top, "rows.json").read_text())
    for row in rows:
        print(row)
    write("scale.zero_communication", __doc__.splitlines()[0], rows, threads=1)


if __name__ == "__main__":
    main()
