"""A server in process for tests: a small model of random weights, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import httpx2 as httpx
import torch

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.serving import ServeConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer
from looptx_core.serving.app import build_app
from looptx_core.serving.service import Service

CONFIG = ModelConfig(
    **dict(vocab_size=280, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48),
    **dict(prelude_layers=1, core_layers=1, coda_layers=1, max_loops=4, max_seq_len=512),
    retain=0.5,
)
SETTINGS = ExitSettings(confidence=0.93, gain=0.1, temperature=2.0)
HOST = "http://127.0.0.1"
GREEDY = {"temperature": 0, "ignore_eos": True}


def small_engine() -> Engine:
    """Tokens of random weights leave at many depths."""
    text = "Call me Ishmael. Some years ago, never mind how long precisely.\n" * 4
    torch.manual_seed(1)
    model = LoopedTransformer(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.startswith("confidence") else 0.5
            parameter.add_(torch.randn_like(parameter) * scale)
        model.confidence.out.bias.zero_()
    return Engine(model, train_tokenizer([text], 280), SETTINGS, name="small")


@contextlib.contextmanager
def service_of(engine: Engine, *, chats: bool = True, **settings):
    service = Service(engine, ServeConfig(**{"max_batch": 4, **settings}), chats=chats)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def client_of(service: Service, **how) -> httpx.AsyncClient:
    """Without a socket: the application is called directly."""
    transport = httpx.ASGITransport(build_app(service))
    return httpx.AsyncClient(transport=transport, base_url=HOST, timeout=60, **how)


@contextlib.contextmanager
def served(service: Service):
    """A real server in a thread; gives its address."""
    from looptx_core.serving.run import Server, listen

    found: list[str] = []
    ready = threading.Event()
    listener = listen("127.0.0.1", 0)
    server = Server(service, lambda address: (found.append(address), ready.set()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(30)
    try:
        yield found[0], server
    finally:
        server.should_exit = True
        thread.join(30)


async def until(condition, seconds: float = 20) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def run(service, ask, **how):
    """What `ask` returns, which gets a client."""

    async def main():
        async with client_of(service, **how) as client:
            return await asyncio.wait_for(ask(client), 60)

    return asyncio.run(main())


def post(service, path, body, **how):
    async def ask(client):
        return await client.post(path, json=body)

    return run(service, ask, **how)


def completion(service, **body):
    answer = post(service, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(text):
    """The documents of a stream, which has to end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
