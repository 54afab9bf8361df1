"""Does reading cost the same for each token, and the same room, however long the text is?

A model of `nano`'s shape with fresh weights reads random ids through the engine's own prompt. Rates
are tokens a second of CPU time, so that they hold on a shared machine; the peak is of the whole
process, and grows only if something is kept. A second reading with another first id tells whether
the memory still knows it: by how much the log-probabilities of the next token change at most.

    python -m benchmarks.memory.reading [--kinds delta infini] [--lengths 1024 8192 60000]
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from benchmarks.common.record import write
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.config.model import ModelConfig
from looptx_core.generation.running_batch import RunningBatch
from looptx_core.model.loop import LoopedTransformer


@torch.inference_mode()
def read(model: LoopedTransformer, ids: Tensor, loops: int) -> tuple[Tensor, float, int]:
    """The next token's log-probabilities, seconds of CPU time, and bytes of the state."""
    cache = model.new_cache(1, ids.shape[1], loops)
    began = time.process_time()
    output = RunningBatch(TorchBackend(model), cache).prompt([0], ids, loops).last
    return output.logits[0].log_softmax(-1), time.process_time() - began, cache.nbytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="+", default=["delta", "infini"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192, 60_000])
    parser.add_argument("--loops", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        torch.manual_seed(0)
        model = LoopedTransformer(ModelConfig(
            vocab_size=4096, d_ff=512, prelude_layers=0, core_layers=1, coda_layers=0,
            memory=kind, memory_window=128, memory_block=64,
        )).eval()  # fmt: skip
        read(model, torch.zeros(1, 256, dtype=torch.long), args.loops)  # torch warms up
        for length in args.lengths:
            ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
            logs, seconds, size = read(model, ids, args.loops)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            ids[0, 0] = (ids[0, 0] + 1) % 4096
            other, _, _ = read(model, ids, args.loops)
            rows.append({
                "kind": kind, "tokens": length, "loops": args.loops, "state_bytes": size,
                "tokens_per_cpu_second": round(length / seconds), "peak_bytes": peak,
                "first_id_changes": float((other - logs).abs().max()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    write("memory.reading", "reading texts of growing length with a memory", rows,
          settings={"loops": args.loops})  # fmt: skip


if __name__ == "__main__":
    main()
