"""Our server beside llama.cpp's: tokens a second of 16 streams, and the wait for the first token.

Both get the same requests over HTTP: token ids at random as prompts, greedy, a fixed number of new
tokens, as streams. Ours runs `small` at two loops, 2 + 4 x 2 + 2 layers; llama-server runs a Llama
of 12 layers with the same widths, heads and vocabulary, and weights of the same type. Weights are
random: what they say is not the matter here. Both servers are up all the time and alternate, so
that a busy moment meets both; read the ratios. The client runs on the same cores.

    python -m benchmarks.serving.peer --llama-server PATH [--threads 2] [--rounds 5] [--check]

--check: one short round, and no record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np

from benchmarks.common.llama_file import write_llama
from benchmarks.common.record import finish, rows_by
from benchmarks.serving.run import LOOPS, small
from benchmarks.serving.server import Server, serving
from looptx_core.checkpoint.folder import load_model

STREAMS, CONTEXT = 16, 512
WEIGHTS = ("float32", "bf16", "int8")
SHORT, LONG = 8, 256
"""Tokens of a prompt: of the streams, and of those whose first token is waited for."""
FEW = 4
"""New tokens after a long prompt."""
FIRST_ID = 32
"""Token ids below may be special."""


class Round(NamedTuple):
    """What 16 requests at once got."""

    tokens: int
    seconds: float
    """Of the clock, from the first request to the last token."""
    cpu: float
    """Of the server's processors."""
    firsts: list[float]
    """Seconds to the first token of each."""


@contextmanager
def llama_server(program: Path, model: Path, threads: int) -> Iterator[Server]:
    """llama.cpp's server with a row for each stream. Raises `AssertionError` if it ends early."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [
        "--model", model, "--host", "127.0.0.1", "--port", port, "--parallel", STREAMS,
        "--cont-batching", "--no-kv-unified", "--ctx-size", STREAMS * CONTEXT,
        "--threads", threads, "--threads-batch", threads,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [program, *map(str, arguments)],
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(program.resolve().parent)},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while not _is_up(address):
                if process.poll() is not None:
                    log.seek(0)
                    raise AssertionError(f"{program} ended:\n{log.read()[-2000:]}")
                assert time.monotonic() < deadline, f"{program} is not ready after two minutes"
                time.sleep(0.2)
            yield Server(process, address)
        finally:
            process.terminate()
            process.wait(60)


def _is_up(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health").status_code == 200
    except httpx2.HTTPError:
        return False


async def ask(
    address: str, prompts: list[list[int]], body: dict[str, Any]
) -> tuple[int, list[float]]:
    """(tokens, seconds to the first token of each) of requests that arrive at once."""
    path = f"{address}/v1/completions"

    async def one(client: httpx2.AsyncClient, prompt: list[int]) -> tuple[int, float]:
        tokens, began, first = 0, time.perf_counter(), 0.0
        async with client.stream("POST", path, json={**body, "prompt": prompt}) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - began
                    if usage := json.loads(line[6:]).get("usage"):
                        tokens = usage["completion_tokens"]
        assert tokens == body["max_tokens"], f"{tokens} tokens instead of {body['max_tokens']}"
        return tokens, first

    async with httpx2.AsyncClient(timeout=600) as client:
        found = await asyncio.gather(*[one(client, prompt) for prompt in prompts])
    return sum(tokens for tokens, _ in found), [first for _, first in found]


def measure(server: Server, prompts: list[list[int]], new: int, own: dict[str, Any]) -> Round:
    body = {
        "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **own,
    }  # fmt: skip
    cpu, began = server.use().cpu, time.perf_counter()
    tokens, firsts = asyncio.run(ask(server.address, prompts, body))
    return Round(tokens, time.perf_counter() - began, server.use().cpu - cpu, firsts)


def compare(
    folder: Path, weights: str, program: Path, threads: int, rounds: int, new: int, draw: Any
) -> dict[str, Any]:
    """The figures of both servers with weights of one type."""
    loaded = load_model(folder)
    file = write_llama(
        folder.parent / f"{weights}.gguf", loaded.model.config, weights, loaded.tokenizer
    )
    own = {"looptx": {"loops": LOOPS}, "llama.cpp": {"cache_prompt": False}}
    short: dict[str, list[Round]] = {name: [] for name in own}
    long: dict[str, list[Round]] = {name: [] for name in own}
    with ExitStack() as stack:
        flags = ["--precision", weights, "--max-context", str(CONTEXT)]
        servers = {
            "looptx": stack.enter_context(serving("--model", str(folder), *flags, threads=threads)),
            "llama.cpp": stack.enter_context(llama_server(program, file, threads)),
        }
        for number in range(rounds + 1):
            for length, rows, most in ((SHORT, short, new), (LONG, long, FEW)):
                last = loaded.model.config.vocab_size
                prompts = draw.integers(FIRST_ID, last, (STREAMS, length)).tolist()
                for name, server in servers.items():
                    found = measure(server, prompts, most, own[name])
                    if number:  # the first round warms up
                        rows[name].append(found)
    rates = {name: [own.tokens / own.seconds for own in found] for name, found in short.items()}
    waits = {
        name: float(np.quantile([first for own in found for first in own.firsts], 0.95))
        for name, found in long.items()
    }
    return {
        "tokens_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "ratio": statistics.median(a / b for a, b in zip(rates["looptx"], rates["llama.cpp"])),
        "rates": rates,
        "cpu_ms_a_token": {
            name: 1000 * statistics.median(own.cpu / own.tokens for own in found)
            for name, found in short.items()
        },
        "first_token_p95": waits,
        "first_token_ratio": waits["looptx"] / waits["llama.cpp"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", type=Path, required=True, help="the program")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--check", action="store_true", help="one short round, and no record")
    flags = parser.parse_args()
    rounds, new = (1, 8) if flags.check else (flags.rounds, flags.new)
    draw, report = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        model = small(Path(folder))
        for weights in flags.weights:
            report[weights] = compare(
                model, weights, flags.llama_server, flags.threads, rounds, new, draw
            )
            print(weights, json.dumps(report[weights]))
    return finish(
        "serving.peer", __doc__.splitlines()[0], rows_by(report, "weights"), flags.check,
        streams=STREAMS, new=new, rounds=rounds, threads=flags.threads,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
