"""looptx serve in process: answers, errors, limits, and what becomes of clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from serving_cases import CONFIG, client_of, service_of, small_engine, until

from looptx_core.config.generation import GenerationOptions
from looptx_core.config.serving import ServeConfig
from looptx_core.errors import LooptxError, UsageError
from looptx_core.generation.request import ChatPrompt, MediaPrompt
from looptx_core.media.registry import MEDIA

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def service(engine):
    with service_of(engine) as service:
        yield service


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


def test_many_at_once_get_what_generate_writes(service, engine):
    """At different depths, in several pieces of a prompt, drawn and greedy, streamed or not."""
    long = "never mind how long precisely. " * 12
    bodies = [
        {"prompt": "Call me", "max_tokens": 9, **GREEDY},
        {"prompt": long, "max_tokens": 6, "loops": 2, **GREEDY},
        {"prompt": "Some years", "max_tokens": 8, "temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"prompt": long[7:], "max_tokens": 5, "exit": "gain", "threshold": 0.4, **GREEDY},
        {"prompt": "whale", "max_tokens": 7, "max_loops": 3, "min_loops": 2, **GREEDY},
        {"prompt": "Call", "max_tokens": 8, "speculate": 3, **GREEDY},
        {"prompt": "mind", "max_tokens": 4, "reasoning_effort": "low", **GREEDY},
    ]

    async def ask(client):
        async def one(number, body):
            body = body | {"stream": number % 2 == 0}
            answer = await client.post("/v1/completions", json=body)
            if not body["stream"]:
                [choice] = answer.json()["choices"]
                return choice["text"], choice["looptx"]["loops"], choice["looptx"]["confidence"]
            pieces = [event["choices"][0] for event in events(answer.text)]
            return (
                "".join(piece["text"] for piece in pieces),
                [loops for piece in pieces for loops in piece["looptx"]["loops"]],
                [sure for piece in pieces for sure in piece["looptx"]["confidence"]],
            )

        return await asyncio.gather(*[one(*pair) for pair in enumerate(bodies)])

    together = run(service, ask)
    for body, (text, loops, confidence) in zip(bodies, together):
        named = {name: value for name, value in body.items() if name in vars(GenerationOptions())}
        if "reasoning_effort" in body:
            named["max_loops"] = 2
        options = GenerationOptions(**named, max_new_tokens=body["max_tokens"])
        [alone] = engine.complete([body["prompt"]], options)
        assert text == alone.text and loops == [step.loops for step in alone.tokens]
        assert confidence == pytest.approx([s.confidence for s in alone.tokens], abs=1e-4)
    assert len({n for _, loops, _ in together for n in loops}) >= 3, "the case is too easy"


def test_a_completion_as_openai_gives_it(service, engine):
    whole = completion(service, prompt=["Call", "me"], n=2, max_tokens=4, seed=3, logprobs=2)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    again = completion(service, prompt="me", max_tokens=4, seed=4)
    assert whole["choices"][3]["text"] == again["choices"][0]["text"], "n draws with seed + i"
    assert whole["usage"]["completion_tokens"] == sum(
        len(choice["looptx"]["loops"]) for choice in whole["choices"]
    )
    for choice in whole["choices"]:
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(choice["looptx"]["loops"]) == len(told["top_logprobs"])
        for token, logprob, tops in zip(*list(told.values())[:3]):
            assert tops[token] == logprob and 2 <= len(tops) <= 3


def test_echo_scores_the_prompt_at_a_depth(service, engine):
    import torch

    ids = [20 + n % 60 for n in range(140)]
    found = completion(
        service, prompt=ids, echo=True, logprobs=1, max_tokens=0, loops=3, temperature=0
    )
    [choice] = found["choices"]
    told = choice["logprobs"]["token_logprobs"]
    with torch.no_grad():
        logs = engine.model(torch.tensor([ids]), 3).logits[0].log_softmax(-1)
    expected = [logs[n, token].item() for n, token in enumerate(ids[1:])]
    assert told[0] is None and told[1:] == pytest.approx(expected, abs=1e-4)
    likeliest = [max(tops.values()) for tops in choice["logprobs"]["top_logprobs"][1:]]
    assert likeliest == pytest.approx(logs.max(-1).values[:-1].tolist(), abs=1e-4)
    assert choice["looptx"]["loops"] == [] and choice["finish_reason"] == "length"
    streamed = post(service, "/v1/completions", {"prompt": ids, "echo": True, "logprobs": 1,
                    "max_tokens": 1, "loops": 3, "temperature": 0, "stream": True})  # fmt: skip
    first, second = events(streamed.text)
    assert first["choices"][0]["logprobs"]["token_logprobs"] == told
    assert len(second["choices"][0]["logprobs"]["tokens"]) == 1


def test_a_chat(service, engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Call me"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 6, "logprobs": True, **GREEDY}
    found = post(service, "/v1/chat/completions", body | {"top_logprobs": 2}).json()
    [choice] = found["choices"]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Call me"}]
    options = GenerationOptions(temperature=0, ignore_eos=True, max_new_tokens=6)
    [alone] = engine.complete([ChatPrompt(tuple(said))], options)
    assert choice["message"]["content"] == alone.text
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2] * 6
    usage = {"include_usage": True}
    stream = post(service, "/v1/chat/completions",
                  body | {"n": 2, "stream": True, "stream_options": usage})  # fmt: skip
    *pieces, last = events(stream.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    for index in range(2):
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"]["content"] for piece in own) == alone.text
        assert own[-1]["finish_reason"] == "length"


REFUSED = [
    ("frequency_penalty", {"frequency_penalty": 0.5}),
    ("logit_bias", {"logit_bias": {"5": 1}}),
    ("suffix", {"suffix": "x"}),
    ("best_of", {"best_of": 3}),
    ("unheard_of", {"unheard_of": 1}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "0"}),
    ("top_p", {"top_p": 0}),
    ("n", {"n": 0}),
    ("n", {"n": 1000}),
    ("max_tokens", {"max_tokens": -1}),
    ("logprobs", {"logprobs": 6}),
    ("stop", {"stop": ["a"] * 5}),
    ("stop", {"stop": ""}),
    ("seed", {"seed": 2**70}),
    ("loops", {"loops": 0}),
    ("loops", {"loops": 5}),
    ("max_loops", {"max_loops": 9}),
    ("min_loops", {"min_loops": 3, "max_loops": 2}),
    ("exit", {"exit": "never"}),
    ("reasoning_effort", {"reasoning_effort": "huge"}),
    ("reasoning_effort", {"reasoning_effort": "low", "loops": 2}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": "\ud800"}),
    ("prompt", {"prompt": [2**40]}),
    (None, {"prompt": [279, 300]}),
    (None, {"prompt": [20] * 600}),
    ("stream_options", {"stream_options": {"other": 1}}),
]


def test_nothing_is_ignored_and_bad_values_are_named(service):
    async def ask(client):
        found = []
        for _, fields in REFUSED:
            content = json.dumps({"prompt": "a", **fields})
            answer = await client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            error = answer.json().get("error", {})
            found.append((fields, answer.status_code, error.get("param"), "\n" in str(error)))
        return found

    expected = [(fields, 400, param, False) for param, fields in REFUSED]
    assert run(service, ask) == expected


def test_neutral_values_pass(service):
    for extreme in (
        {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e300}, {"temperature": 5e-324},
        {"temperature": 1e300}, {"top_p": 5e-324}, {"threshold": -1e300},
    ):  # fmt: skip
        completion(service, prompt="a whale", max_tokens=3, **extreme)
    completion(
        service, prompt="a", max_tokens=1, frequency_penalty=0.0, presence_penalty=0, logit_bias={},
        user="someone", suffix=None, best_of=1, logprobs=None, seed=None, stop=None, n=None,
        stream=None, temperature=None, top_p=None, echo=None, model="small",
    )  # fmt: skip
    body = {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "metadata": {"a": "b"},
        "store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium",
        "parallel_tool_calls": True,
    }  # fmt: skip
    assert post(service, "/v1/chat/completions", body).status_code == 200


def test_other_requests_that_are_refused(service):
    chat = "/v1/chat/completions"
    user = {"role": "user", "content": "a"}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    wrong = [
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model"),
        (chat, {"messages": []}, 400, "messages"),
        (chat, {}, 400, "messages"),
        (chat, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
        (chat, {"messages": [user], "tools": [{"type": "function"}]}, 400, "tools"),
        (chat, {"messages": [user], "top_logprobs": 2}, 400, "top_logprobs"),
        (chat, {"messages": [user], "response_format": {"type": "json_object"}}, 400,
         "response_format"),
        (chat, {"messages": [{"role": "user", "content": [picture]}]}, 400, "messages"),
        ("/looptx/exit", {"id": "cmpl-0", "threshold": 0.5}, 404, "id"),
        ("/nowhere", {}, 404, None),
    ]  # fmt: skip
    for path, body, status, param in wrong:
        answer = post(service, path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), body

    async def ask(client):
        kind = {"content-type": "application/json"}
        bodies = (b"", b"{", b"[1]", b"[" * 100_000, b'{"prompt": NaN}', b"\xff\xfe{}", b'"a"')
        return [
            (await client.post("/v1/completions", content=body, headers=kind)).status_code
            for body in bodies
        ] + [(await client.get("/v1/completions")).status_code]

    assert run(service, ask) == [400] * 7 + [405]


def test_tokens_there_and_back(service):
    found = post(service, "/tokenize", {"prompt": "Call me"}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == CONFIG.max_seq_len
    back = post(service, "/detokenize", {"tokens": found["tokens"]}).json()
    assert back == {"prompt": "Call me"}


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


def test_a_turn_that_fails_ends_its_requests_and_no_others(engine, monkeypatch):
    with service_of(engine) as service:
        broken = [True]
        step = (
            type(service.worker._scheduler).step if hasattr(service.worker, "_scheduler") else None
        )

        def fail(self):
            if broken:
                broken.clear()
                raise RuntimeError("out of memory")
            return step(self)

        from looptx_core.generation.scheduler import Scheduler

        step = Scheduler.step
        monkeypatch.setattr(Scheduler, "step", fail)
        answer = post(service, "/v1/completions", {"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 500 and "memory" not in answer.text
        completion(service, prompt="a", max_tokens=2)


def test_a_threshold_that_moves_while_it_is_written(engine):
    body = {"prompt": "a", "max_tokens": 400, "exit": "confidence", "threshold": 1.1, **GREEDY}

    async def ask(client):
        task = asyncio.ensure_future(client.post("/v1/completions", json=body | {"stream": True}))
        await until(lambda: service.metrics.generated._value.get() > 5)
        [exchange] = service._exchanges
        change = {"id": exchange.name, "threshold": 0.0}
        assert (await client.post("/looptx/exit", json=change)).status_code == 200
        pieces = events((await task).text)
        return [piece["choices"][0]["looptx"]["loops"][0] for piece in pieces]

    with service_of(engine) as service:
        loops = run(service, ask)
    assert loops[:4] == [4] * 4 and loops[-1] == 1


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
    assert statuses == [401, 401, 200, 200, 200, 401, 403, 200, 200, 403, 200, 403]
    assert sizes == [413, 413]


def test_settings_that_are_refused(engine, monkeypatch):
    from looptx_core.serving import service as module
    from looptx_core.serving.run import listen

    for wrong in (
        {"host": "0.0.0.0"}, {"host": ""}, {"api_key": "a b"}, {"api_key": ""}, {"port": -1},
        {"port": 70000}, {"max_batch": 0}, {"max_queue": -1}, {"request_timeout": 0},
        {"drain_seconds": -1.0}, {"max_context": 0},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            ServeConfig(**wrong)
    ServeConfig(host="0.0.0.0", api_key="secret")
    with pytest.raises(UsageError, match=r"max_context.*512"):
        module.Service(engine, ServeConfig(max_context=513), chats=True)
    monkeypatch.setattr(module, "free_ram", lambda: 1 << 20)
    with pytest.raises(UsageError, match=r"max_batch.*GiB.*at most \d+"):
        module.Service(engine, ServeConfig(max_batch=1000), chats=True)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LooptxError, match="something else listens"):
            listen("127.0.0.1", port)
    with pytest.raises(LooptxError):
        listen("no.such.host.invalid", 0)


def test_no_prompt_is_logged(service, caplog):
    with caplog.at_level(0):
        completion(service, prompt="a secret whale", max_tokens=2)
        post(service, "/v1/completions", {"prompt": "a secret whale", "n": 0})
    assert "whale" not in caplog.text


def test_a_picture_as_a_data_url(cat):
    """The bundled model that reads pictures names one, as on the command line."""
    import looptx

    model = looptx.load(abilities=frozenset({"vision"}), kernel="torch")
    raw = base64.b64encode(cat.read_bytes()).decode()
    with service_of(model.engine, chats=False) as service:

        def ask(url):
            part = {"type": "image_url", "image_url": {"url": url}}
            body = {"messages": [{"role": "user", "content": [part]}], "temperature": 0}
            return post(service, "/v1/chat/completions", body | {"max_tokens": 4})

        found = ask(f"data:image/png;base64,{raw}").json()
        other = ask("http://example.org/cat.png")
        damaged = ask("data:image/png;base64,AAAA")
    item = MEDIA["image"].read(cat, model.engine.model.config)
    [alone] = model.engine.complete(
        [MediaPrompt("", (item,))], GenerationOptions(temperature=0, max_new_tokens=4)
    )
    assert found["choices"][0]["message"]["content"] == alone.text
    assert (other.status_code, damaged.status_code) == (400, 400)
    assert "data URL" in other.text
