"""Does reading cost the same for each token, and the same room, however long the text is?

A model of `nano`'s width with fresh weights reads random ids through the engine's own prompt. Rates
are tokens a second of CPU time, so that they hold on a shared machine; the peak is of the whole
process, and grows only if something is kept. With `--passkeys`, a file that
`benchmarks.memory.run --models` kept, the model that learned passkeys reads a key and as much
filler, twice, with another first digit: by how much do the log-probabilities of the digit change
where it is asked for?

    python -m benchmarks.memory.reading [--kinds delta infini] [--lengths 1024 8192 60000]
        [--passkeys FOLDER/delta-sentence-0-200.safetensors] [--check]

Two minutes on one core, with 1,048,576 tokens twenty more. `--check` reads little and leaves no
record.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor

from benchmarks.common.record import write
from benchmarks.memory.run import DIGITS, SPAN, Task, build, parser
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


def change(model: LoopedTransformer, task: Task, length: int) -> float:
    """How much the log-probabilities of a key's first digit change with what the text began with.

    The text is the key's first digit, its other digits, filler, and the question.
    """
    logs = []
    for first in (3, 7):
        digits = np.array([[first, *range(DIGITS - 1)]])
        told, asked = task.phrases(np.zeros(1, np.int64), digits)
        filler = task.filler(np.random.default_rng(0), 1, length - SPAN - 1)
        text = np.concatenate([told[:, 1:], filler, asked[:, :2]], axis=1)
        found, _, _ = read(model, torch.from_numpy(text).long(), model.config.loops)
        logs.append(found)
    return float((logs[0] - logs[1]).abs().max())


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--kinds", nargs="+", default=["delta", "infini"])
    given.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192, 60_000])
    given.add_argument("--loops", type=int, default=2)
    given.add_argument("--passkeys", help="The model that learned passkeys with delta.")
    given.add_argument("--check", action="store_true", help="Read little, and no record.")
    args = given.parse_args()
    lengths = [256, 1024] if args.check else args.lengths
    learned, task = None, Task("sentence")
    if args.passkeys:
        learned = build("delta", 0, task, parser().parse_args([])).eval()
        load_model(learned, args.passkeys)
    rows = []
    for kind in args.kinds:
        torch.manual_seed(0)
        model = LoopedTransformer(ModelConfig(
            vocab_size=4096, d_ff=512, prelude_layers=0, core_layers=1, coda_layers=0,
            memory=kind, memory_window=128, memory_block=64,
        )).eval()  # fmt: skip
        read(model, torch.zeros(1, 256, dtype=torch.long), args.loops)  # torch warms up
        for length in lengths:
            ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
            _, seconds, size = read(model, ids, args.loops)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            changes = None
            if learned is not None and kind == "delta":
                changes = change(learned, task, length)
            rows.append({
                "kind": kind, "tokens": length, "loops": args.loops, "state_bytes": size,
                "tokens_per_cpu_second": round(length / seconds), "peak_bytes": peak,
                "first_id_changes": changes,
            })  # fmt: skip
            print(rows[-1], flush=True)
    if not args.check:
        write("memory.reading", "reading texts of growing length with a memory", rows,
              settings={"loops": args.loops})  # fmt: skip


if __name__ == "__main__":
    main()
