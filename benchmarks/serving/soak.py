"""A soak: 2,000 requests, of which a third is cancelled at random, and what is left of them.

Streams and whole answers, greedy and drawn, at several depths, 24 at once on 8 rows. Those that are
not cancelled must get what the first of their kind got. Afterwards no request may run or wait, no
thread and no file may be left, and the memory may have grown by 2 % at most since the first 400.

    python -m benchmarks.serving.soak [--count 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import httpx2

from benchmarks.common.record import write
from benchmarks.serving.server import Server, serving

AT_ONCE, WARM = 24, 400
KINDS: list[dict[str, Any]] = [
    {"prompt": "Call me", "max_tokens": 24, "temperature": 0},
    {"prompt": "map bf da ee fe cd hh gh aa:", "max_tokens": 16, "exit": "gain", "temperature": 0},
    {"prompt": "never mind how long precisely. " * 30, "max_tokens": 12, "loops": 3, "seed": 7},
    {"prompt": "Some years ago", "max_tokens": 40, "max_loops": 4, "seed": 5, "top_p": 0.9},
    {"prompt": "whale", "max_tokens": 20, "speculate": 3, "seed": 2},
    {"prompt": "the sea", "n": 2, "max_tokens": 16, "min_loops": 2, "seed": 1, "logprobs": 2},
]


async def ask(client: httpx2.AsyncClient, address: str, body: dict[str, Any]) -> list[str]:
    """The text of each choice."""
    texts = [""] * body.get("n", 1)
    path = f"{address}/v1/completions"
    if not body["stream"]:
        answer = await client.post(path, json=body)
        answer.raise_for_status()
        return [choice["text"] for choice in answer.json()["choices"]]
    async with client.stream("POST", path, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
    return texts


async def soak(server: Server, count: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    expected: dict[int, list[str]] = {}
    found = {"done": 0, "cancelled": 0, "failed": 0, "different": 0}
    places = asyncio.Semaphore(AT_ONCE)

    async def one(client: httpx2.AsyncClient) -> None:
        kind, stream = draw.randrange(len(KINDS)), draw.random() < 0.5
        leaves = draw.uniform(0, 0.4) if draw.random() < 1 / 3 else None
        async with places:
            task = asyncio.ensure_future(
                ask(client, server.address, {**KINDS[kind], "stream": stream})
            )
            try:
                texts = await asyncio.wait_for(task, leaves)
            except TimeoutError:
                found["cancelled"] += 1
                return
            except httpx2.HTTPError:
                found["failed"] += 1
                return
        found["done"] += 1
        found["different"] += texts != expected.setdefault(kind, texts)

    limits = httpx2.Limits(max_connections=AT_ONCE)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*[one(client) for _ in range(min(WARM, count))])
        before = server.use()
        await asyncio.gather(*[one(client) for _ in range(count - min(WARM, count))])
    await asyncio.sleep(6)  # uvicorn's time for connections without a request
    after = server.use()
    async with httpx2.AsyncClient() as client:
        lines = (await client.get(f"{server.address}/metrics")).text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {
        **found,
        "running": float(figures["looptx_num_requests_running"]),
        "waiting": float(figures["looptx_num_requests_waiting"]),
        "cache_filled": float(figures["looptx_kv_cache_usage_perc"]),
        "tokens": float(figures["looptx_generation_tokens_total"]),
        "memory_growth": after.resident / before.resident - 1,
        "threads_more": after.threads - before.threads,
        "files_more": after.files - before.files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    began = time.perf_counter()
    with serving("--max-batch", "8", "--max-queue", "200", "--max-context", "512") as server:
        row = asyncio.run(soak(server, flags.count, flags.seed))
    row["seconds"] = time.perf_counter() - began
    print(json.dumps(row, indent=1))
    left = ("failed", "different", "running", "waiting", "cache_filled", "threads_more")
    assert not any(row[name] for name in left) and row["files_more"] <= 0, "something is left"
    assert row["memory_growth"] < 0.02, "the memory grew"
    write("serving.soak", __doc__.splitlines()[0], [row], peers=("fastapi", "uvicorn"))


if __name__ == "__main__":
    main()
