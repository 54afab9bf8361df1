"""What HTTP costs: the server's processor time for a token, beside the engine's own.

16 requests of a few tokens are continued at once, over HTTP as 16 streams, and by the engine's
scheduler in process. `small` has random weights and two loops at full depth; the bundled model is
so small that HTTP weighs most there. The client's time does not count, as it runs elsewhere.

    python -m benchmarks.serving.run [--new 64] [--rounds 3] [--threads 1] [--skip-small]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks.common.clock import BUNDLED
from benchmarks.common.record import rows_by, write
from benchmarks.serving.server import serving
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

STREAMS, LOOPS = 16, 2
PROMPTS = [f"Call me {number}" for number in range(STREAMS)]


def small(folder: Path) -> Path:
    """A model of the preset's shape, saved."""
    tokenizer = load_model(BUNDLED).tokenizer
    shape = get_preset("small")["model"]
    config = replace(ModelConfig(**shape), vocab_size=tokenizer.get_vocab_size(), max_loops=LOOPS)
    torch.manual_seed(0)
    save_model(
        folder / "small", LoopedTransformer(config), tokenizer,
        exit_settings=ExitSettings(), facts={},
    )  # fmt: skip
    return folder / "small"


def by_engine(engine: Engine, new: int) -> float:
    """Processor seconds for a token."""
    options = GenerationOptions(temperature=0, max_new_tokens=new, ignore_eos=True, loops=LOOPS)
    began = time.process_time()
    with torch.inference_mode(), engine.lasting(STREAMS, 256) as scheduler:
        for number, prompt in enumerate(PROMPTS):
            scheduler.add(engine.request(number, prompt, options))
        while len(scheduler):
            scheduler.step()
    return (time.process_time() - began) / (STREAMS * new)


async def streams(address: str, new: int) -> tuple[int, list[float]]:
    """(tokens, seconds to the first token of each stream)."""
    body = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "loops": LOOPS, "stream": True}

    async def one(client: httpx2.AsyncClient, prompt: str) -> tuple[int, float]:
        tokens, began, first = 0, time.perf_counter(), 0.0
        path = f"{address}/v1/completions"
        async with client.stream("POST", path, json={**body, "prompt": prompt}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - began
                    tokens += 1
        return tokens, first

    async with httpx2.AsyncClient(timeout=600) as client:
        found = await asyncio.gather(*[one(client, prompt) for prompt in PROMPTS])
    return sum(tokens for tokens, _ in found), [first for _, first in found]


def compare(folder: Path, new: int, rounds: int, threads: int) -> dict[str, Any]:
    loaded = load_model(folder)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, batch_size=STREAMS)
    alone, served, firsts = [], [], []
    with serving("--model", str(folder), "--max-context", "256", threads=threads) as server:
        for number in range(rounds + 1):
            own = by_engine(engine, new)
            before = server.use().cpu
            tokens, first = asyncio.run(streams(server.address, new))
            if number:
                alone.append(own)
                served.append((server.use().cpu - before) / tokens)
                firsts += first
    engine_ms, server_ms = (1000 * statistics.median(each) for each in (alone, served))
    return {
        "kernel": engine.kernel,
        "tokens": STREAMS * new,
        "engine_ms_a_token": engine_ms,
        "server_ms_a_token": server_ms,
        "http_share_of_engine": server_ms / engine_ms - 1,
        "first_token_ms_median": 1000 * statistics.median(firsts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-small", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    results = {"bundled": compare(BUNDLED, flags.new, flags.rounds, flags.threads)}
    if not flags.skip_small:
        with tempfile.TemporaryDirectory() as folder:
            made = small(Path(folder))
            results["small"] = compare(made, flags.new, flags.rounds, flags.threads)
    peers = ("fastapi", "uvicorn")
    write("serving.run", __doc__.splitlines()[0], rows_by(results, "model"), peers=peers)


if __name__ == "__main__":
    main()
