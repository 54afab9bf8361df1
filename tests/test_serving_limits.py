"""looptx serve in process: limits, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import threading

from serving_cases import GREEDY, events, post, run, service_of, until

from looptx_core.errors import DataError
from looptx_core.generation import request as request_module
from looptx_core.generation.encoding import PromptEncoder
from looptx_core.generation.request import Request, TokenPrompt
from looptx_core.generation.running_batch import RunningBatch
from looptx_core.generation.scheduler import Scheduler
from looptx_core.generation.text import TextStream


def test_what_a_client_that_left_held_is_free_at_once(engine):
    body = {"prompt": "a", "max_tokens": 500, "n": 3, **GREEDY}

    async def ask(client):
        for stream in (False, True):
            task = asyncio.ensure_future(
                client.post("/v1/completions", json=body | {"stream": stream})
            )
            await until(lambda: service.worker.load[0] == 3)
            task.cancel()
            await until(lambda: service.worker.load[:2] == (0, 0) and service.idle)
        return (await client.get("/metrics")).text

    with service_of(engine) as service:
        metrics = run(service, ask)
        assert len(service.worker._scheduler.batch) == 0 and not service.worker._jobs
    assert "looptx_request_failure_total 6.0" in metrics


def test_the_queue_the_clock_and_the_end(engine):
    body = {"prompt": "a", "max_tokens": 500, **GREEDY}

    async def full(client):
        first = asyncio.ensure_future(client.post("/v1/completions", json=body | {"n": 2}))
        await until(lambda: service.worker.load[:2] == (1, 1))
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        service.draining = True
        assert (await client.get("/health")).status_code == 503
        assert (await client.post("/v1/completions", json=body)).status_code == 503
        service.cut()
        return await first

    with service_of(engine, max_batch=1, max_queue=1) as service:
        assert run(service, full).status_code == 503

    async def cut(client):
        task = asyncio.ensure_future(client.post("/v1/completions", json=body | {"stream": True}))
        await until(lambda: service.metrics.generated._value.get() > 3)
        service.cut()
        return events((await task).text)

    with service_of(engine) as service:
        *_, last = run(service, cut)
        assert last["choices"][0]["finish_reason"] == "abort"

    with service_of(engine, request_timeout=0.05) as service:
        late = post(service, "/v1/completions", body)
        assert late.status_code == 408 and late.headers["x-should-retry"] == "false"
        stream = post(service, "/v1/completions", body | {"stream": True})
        assert '"request_timeout"' in stream.text and "[DONE]" not in stream.text


def test_a_turn_that_fails_ends_what_ran_and_nothing_else(engine, monkeypatch):
    step, broken = Scheduler.step, [True]

    def fail(self):
        if broken and len(self) == 3:
            broken.clear()
            step(self)
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(Scheduler, "step", fail)
    body = {"prompt": "a", "max_tokens": 20, **GREEDY}

    async def ask(client):
        return await asyncio.gather(
            *[client.post("/v1/completions", json=body | {"seed": n}) for n in range(3)]
        )

    with service_of(engine, max_batch=2) as service:
        answers = run(service, ask)
    assert sorted(answer.status_code for answer in answers) == [200, 500, 500]
    assert not any("memory" in answer.text for answer in answers)


def test_a_request_that_fails_by_itself_ends_alone(engine, monkeypatch, caplog):
    """In its draw, its text, its prompt's pass and its drafts; it is told so, others go on."""
    body = {"prompt": "a whale", "max_tokens": 12, **GREEDY}
    chances, push, prompt = Request.chances, TextStream.push, RunningBatch.prompt

    def fail_draw(self, logits, seen):
        if self.options.seed == 1 and len(self.seen) > 9:
            raise RuntimeError("secret")
        return chances(self, logits, seen)

    def fail_text(self, token):
        if self._stop == ("never",):
            raise RuntimeError("secret")
        return push(self, token)

    def fail_prompt(self, rows, tokens, *how, **more):
        if tokens.shape[1] == 9:
            raise RuntimeError("secret")
        return prompt(self, rows, tokens, *how, **more)

    monkeypatch.setattr(Request, "chances", fail_draw)
    monkeypatch.setattr(TextStream, "push", fail_text)
    monkeypatch.setattr(RunningBatch, "prompt", fail_prompt)
    wrong = [
        {"seed": 1, "speculate": 2}, {"stop": "never"}, {"prompt": [20] * 9},
        {"stop": "never", "stream": True},
    ]  # fmt: skip

    async def ask(client):
        async def one(more):
            return await client.post("/v1/completions", json=body | more)

        alone = await one({})
        *bad, good = await asyncio.gather(*map(one, [*wrong, {}]))
        await until(lambda: service.idle)
        return alone, bad, good

    with service_of(engine, max_batch=5) as service:
        alone, (*bad, stream), good = run(service, ask)
        assert len(service.worker._scheduler) == 0 and service.worker._scheduler.tokens == 0
    assert good.json()["choices"] == alone.json()["choices"]
    assert [answer.status_code for answer in bad] == [500] * 3
    assert '"server_error"' in stream.text and "[DONE]" not in stream.text
    assert not any("secret" in answer.text for answer in (*bad, stream))
    assert caplog.text.count("RuntimeError: secret") == 4


def test_weights_that_are_damaged_are_no_fault_of_the_request(engine, monkeypatch):
    def fail(*_):
        raise DataError("the model's logits are no numbers")

    monkeypatch.setattr(request_module, "check_number", fail)
    with service_of(engine) as service:
        assert post(service, "/v1/completions", {"prompt": "a"}).status_code == 500


def test_a_cache_that_cannot_be_allocated(engine, monkeypatch):
    """Again and again: what waits is told so, the server says that it is ill, and it ends."""
    from looptx_core.serving import worker

    monkeypatch.setattr(worker, "_PAUSE", 0.01)
    new_cache, held = engine.model.new_cache, []

    def fail(rows, *how):
        if rows > 1:
            held.append(service.worker._scheduler)
            raise RuntimeError("out of memory")
        return new_cache(rows, *how)

    def break_down(self):
        monkeypatch.setattr(engine.model, "new_cache", fail)
        raise RuntimeError("a turn that fails")

    async def ask(client):
        bodies = [{"prompt": "a", "max_tokens": 2, "n": n} for n in (4, 2)]
        found = await asyncio.gather(*[client.post("/v1/completions", json=b) for b in bodies])
        health = await client.get("/health")
        later = await client.post("/v1/completions", json=bodies[0])
        return [answer.status_code for answer in (*found, health, later)]

    with service_of(engine, max_batch=2) as service:
        monkeypatch.setattr(Scheduler, "step", break_down)
        assert run(service, ask) == [500, 500, 503, 503]
    assert held == [None] * 3, "the next cache was allocated beside the one before"


def test_keys_hosts_origins_and_sizes(engine, monkeypatch):
    from looptx_core.serving import guard

    async def ask(client):
        async def get(path="/v1/models", **headers):
            return (await client.get(path, headers=headers)).status_code

        found = [
            await get(), await get(authorization="Bearer wrong"),
            await get(authorization="Bearer secret"), await get("/health"), await get("/"),
            await get("/metrics"), await get("/health", host="evil.example"),
            await get("/health", host="localhost:80"), await get("/health", host="[::1]:8000"),
            await get("/health", origin="http://evil.example"),
            await get("/health", origin="http://127.0.0.1"), await get("/health", host="["),
            await get("/health", origin="http://["),
        ]  # fmt: skip
        monkeypatch.setattr(guard, "MOST_BYTES", 1000)
        key = {"authorization": "Bearer secret"}

        async def pieces():
            for _ in range(20):
                yield b" " * 100

        long = await client.post("/v1/completions", content=b" " * 1001, headers=key)
        chunked = await client.post("/v1/completions", content=pieces(), headers=key)
        return found, [long.status_code, chunked.status_code]

    with service_of(engine, api_key="secret") as service:
        statuses, sizes = run(service, ask)
    assert statuses == [401, 401, 200, 200, 200, 401, 403, 200, 200, 403, 200, 403, 400]
    assert sizes == [413, 413]


def test_prompts_are_read_beside_the_loop_and_the_engine(engine, monkeypatch):
    """Once a request, in a thread; one that can't fit by its bytes is never encoded."""
    encoded, waiting, going = [], threading.Event(), threading.Event()
    whole = PromptEncoder.read

    def read(self, prompt):
        if not isinstance(prompt, TokenPrompt):
            encoded.append((threading.current_thread().name[:13], len(prompt)))
            waiting.set()
            assert going.wait(10)
        return whole(self, prompt)

    monkeypatch.setattr(PromptEncoder, "read", read)

    async def ask(client):
        body = {"prompt": "a whale", "max_tokens": 2, "n": 3}
        task = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await until(waiting.is_set)
        assert (await client.get("/health")).status_code == 200
        full = await client.post("/v1/completions", json=body | {"n": 4})
        never = await client.post("/v1/completions", json=body | {"n": 7})
        going.set()
        large = await client.post("/v1/completions", json=body | {"prompt": "a" * 100_000})
        return [found.status_code for found in (await task, full, never, large)]

    with service_of(engine, max_batch=4, max_queue=2) as service:
        assert run(service, ask) == [200, 429, 400, 400]
    assert encoded == [("looptx-reader", 7)]
