"""Self-speculation against full depth: the bundled model on held-out prose, batch 1.

Ten loops verify what one or two draft. Greedy, so that both sides write the same tokens, which is
checked; and drawn at temperature 0.8, where the shares of accepted drafts differ.

With --wide, for the clock alone: width 512, 1 + 1 x 10 + 1, random weights whose core changes so
little that most drafts stand. Its 25 MB of weights do not fit a core's cache, where the bundled
model's 2 MB do: only what has to be read again for each position is saved.

    python -m benchmarks.speculation.run [--texts 3] [--new 96] [--rounds 3] [--threads 1]
        [--kernel auto]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.clock import BUNDLED, alternate, held_out
from benchmarks.common.record import write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.generation.engine import Engine
from looptx_core.generation.running_batch import WorkCounters
from looptx_core.model.loop import LoopedTransformer

SETTINGS = {"full depth": (0, 1), "3 drafts of 1 loop": (3, 1), "3 drafts of 2 loops": (3, 2),
            "6 drafts of 2 loops": (6, 2), "6 drafts of 3 loops": (6, 3)}  # fmt: skip


def wide(config: ModelConfig) -> LoopedTransformer:
    torch.manual_seed(0)
    shape = dict(d_model=512, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536)
    layers = dict(prelude_layers=1, core_layers=1, coda_layers=1)
    model = LoopedTransformer(replace(config, **shape, **layers))
    with torch.no_grad():
        for name, parameter in model.core.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.3)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", default="auto", help="auto, native or torch.")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    loaded = load_model(flags.model, dtype=torch.float32)
    deepest = loaded.model.config.max_loops
    prompts = held_out(loaded.config.vocab_size, flags.texts, 48, loaded.tokenizer)
    model = wide(loaded.model.config) if flags.wide else loaded.model
    engine = Engine(model, loaded.tokenizer, loaded.exit, kernel=flags.kernel)
    parts = []
    for temperature in (0.0, 0.8):
        work: dict[str, WorkCounters] = {}
        written: dict[str, list[int]] = {}

        def run(name: str, temperature=temperature, work=work, written=written) -> int:
            drafts, shallow = SETTINGS[name]
            options = GenerationOptions(
                loops=deepest, speculate=drafts, draft_loops=shallow, temperature=temperature,
                max_new_tokens=flags.new, ignore_eos=True,
            )  # fmt: skip
            work[name] = engine.counters = WorkCounters()
            found = [engine.complete([prompt], options)[0] for prompt in prompts]
            written[name] = [step.id for one in found for step in one.tokens]
            return len(written[name])

        rates = alternate({n: lambda n=n: run(n) for n in SETTINGS}, flags.rounds)
        for name, rate in rates.items():
            done, tokens = work[name], len(written[name]) - len(prompts)
            row: dict[str, Any] = {
                "temperature": temperature,
                "side": name,
                **rate,
                "ratio": rate["tokens_per_second"] / rates["full depth"]["tokens_per_second"],
                "ratio_cpu": rate["cpu"] / rates["full depth"]["cpu"],
                "core_positions_a_token": done.loops / tokens,
                # A verified column of several positions is one pass of the core.
                "readouts_a_token": done.readouts / tokens,
                "accepted": done.accepted / done.drafted if done.drafted else None,
            }
            if temperature == 0:
                row["same_tokens"] = written[name] == written["full depth"]
            parts.append(row)
    kind = "wide" if flags.wide else "trained" if flags.model != BUNDLED else "bundled"
    settings = {"texts": flags.texts, "new_tokens": flags.new, "rounds": flags.rounds,
                "kernel": engine.kernel}  # fmt: skip
    write("speculation.run", __doc__.splitlines()[0], parts,
          variant=f"{kind} {engine.kernel.split(',')[0]}", settings=settings)  # fmt: skip


if __name__ == "__main__":
    main()
