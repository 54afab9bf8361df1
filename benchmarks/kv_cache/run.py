"""The KV cache: bytes a token by policy and type, the quality each keeps, and a context of 32k.

Quality: nats a token of held-out prose and hop lines in real decoding (`Engine.follow`), by the
bundled model, against the full cache in float32 (`fill`, `float`). Context: the preset `small` with
32,768 tokens in the cache; its prompt is really run with --prompt, which takes minutes, else the
cache is filled with noise and only the tokens after it are run.

    python -m benchmarks.kv_cache.run [--texts 4] [--context 32768] [--prompt]
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch

from benchmarks.common.clock import BUNDLED, held_out, hop_texts
from benchmarks.common.record import flat, write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine
from looptx_core.generation.running_batch import RunningBatch
from looptx_core.model.cache import POLICIES, LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rounding import KINDS
from looptx_core.stopping.rule import fixed_exit

LENGTH, PROMPT = 160, 24


def quality(count: int) -> list[dict[str, Any]]:
    loaded = load_model(BUNDLED)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    config = loaded.model.config
    texts = [("prose", ids, PROMPT) for ids in held_out(config.vocab_size, count, LENGTH)]
    for line in hop_texts(count):
        ids = loaded.tokenizer.encode(line).ids
        texts.append(("hops", ids, len(loaded.tokenizer.encode(line.split(":")[0]).ids) + 1))
    rows: list[dict[str, Any]] = []
    for loops in (config.max_loops, "auto"):
        exact: dict[str, float] = {}
        for policy in POLICIES:
            for kind in KINDS:
                options = GenerationOptions(loops=loops, kv_policy=policy, kv_type=kind)
                row: dict[str, Any] = {"depth": loops, "policy": policy, "type": kind}
                for part in ("prose", "hops"):
                    walked = [
                        engine.score_forced(torch.tensor([ids]), prompt, options)
                        for name, ids, prompt in texts
                        if name == part
                    ]
                    loss = float(torch.cat([w.loss[0] for w in walked]).double().mean())
                    exact.setdefault(part, loss)
                    row[part] = {"nats": loss, "change": loss / exact[part] - 1}
                    row["bytes_per_token"] = walked[0].bytes_per_token
                rows.append(row)
    return rows


def sizes() -> list[dict[str, Any]]:
    """Bytes a token of the preset `small`, by arithmetic of `LoopCache` itself."""
    config = ModelConfig(**get_preset("small")["model"])
    found = []
    for loops in (2, 10):
        for policy in POLICIES:
            for kind in KINDS:
                for dtype in (torch.float32, torch.bfloat16) if kind == "float" else (None,):
                    cache = LoopCache(
                        config, 1, 8, loops, policy=policy, kind=kind, dtype=dtype or torch.float32
                    )
                    size = cache.bytes_per_token
                    found.append(
                        {"loops": loops, "policy": policy,
                         "type": str(dtype)[6:] if dtype else kind, "bytes_per_token": size,
                         "gigabytes_at_32k": round(size * 32768 / 1e9, 3)}
                    )  # fmt: skip
    return found


@torch.inference_mode()
def context(length: int, real: bool, policy: str, kind: str) -> dict[str, Any]:
    new = 4
    config = ModelConfig(**get_preset("small")["model"] | {"max_seq_len": length + new})
    torch.manual_seed(0)
    model = LoopedTransformer(config).eval()
    model.fuse_projections()
    from looptx_core.backends.torch_backend import TorchBackend

    cache = LoopCache(config, 1, length + new, 2, policy=policy, kind=kind)
    batch = RunningBatch(TorchBackend(model), cache)
    began = time.perf_counter()
    if real:
        tokens = torch.randint(3, config.vocab_size, (1, length))
        batch.prompt([0], tokens, 2)
    else:
        view = cache.view(length)
        noise = torch.randn(1, config.n_kv_heads, length, config.head_dim)
        for state in cache.layers:
            for loop in range(1, 3):
                state.update(view, loop, noise, noise, None)
        view.advance()
    prompt = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(new):
        batch.add([0], [5], [fixed_exit(2, ExitSettings())])
        batch.run()
    return {
        "context": cache.length,
        "policy": policy,
        "type": kind,
        "prompt": "run" if real else "noise",
        "prompt_seconds": prompt,
        "seconds_a_token": (time.perf_counter() - began) / new,
        "cache_gigabytes": cache.bytes_per_token * cache.capacity / 1e9,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--prompt", action="store_true")
    flags = parser.parse_args()
    # First, as the peak is the process's.
    long = [context(flags.context, flags.prompt, "last", "int8")]
    parts = {"size": sizes(), "context": long, "quality": quality(flags.texts)}
    rows = [{"part": part, **flat(row)} for part, found in parts.items() for row in found]
    write("kv_cache.run", __doc__.splitlines()[0], rows)


if __name__ == "__main__":
    main()
