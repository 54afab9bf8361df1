"""looptx serve in process: what it answers."""

from __future__ import annotations

import asyncio
import base64

import pytest
from serving_cases import (
    CONFIG,
    GREEDY,
    completion,
    events,
    post,
    run,
    service_of,
    until,
)

from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.request import ChatPrompt, MediaPrompt
from looptx_core.media.registry import MEDIA
from looptx_core.media.writer import Writer
from looptx_core.serving.answers import TokenTexts


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
    [silent] = completion(service, prompt=ids, max_tokens=0)["choices"]
    assert (silent["text"], silent["finish_reason"]) == ("", "length")
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


def test_tokens_there_and_back(service):
    found = post(service, "/tokenize", {"prompt": "Call me"}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == CONFIG.max_seq_len
    back = post(service, "/detokenize", {"tokens": found["tokens"]}).json()
    assert back == {"prompt": "Call me"}


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

    async def fixed(client):
        found = []
        for own in ({"loops": 2}, {"speculate": 2}):
            own = {"prompt": "a", "max_tokens": 400, "stream": True, **GREEDY, **own}
            task = asyncio.ensure_future(client.post("/v1/completions", json=own))
            await until(lambda: service._exchanges)
            [exchange] = service._exchanges
            change = {"id": exchange.name, "threshold": 0.0}
            found.append((await client.post("/looptx/exit", json=change)).status_code)
            service.cut()
            await task
        return found

    with service_of(engine) as service:
        loops = run(service, ask)
        assert run(service, fixed) == [409, 409]
    assert loops[:4] == [4] * 4 and loops[-1] == 1


def test_no_prompt_is_logged(service, caplog):
    with caplog.at_level(0):
        completion(service, prompt="a secret whale", max_tokens=2)
        post(service, "/v1/completions", {"prompt": "a secret whale", "n": 0})
    assert "whale" not in caplog.text


def test_a_model_that_draws_answers_with_text(engine, monkeypatch):
    """A prompt that would begin a picture is refused, and no answer begins one."""
    body = {"prompt": "Call me", "max_tokens": 12, **GREEDY}
    options = GenerationOptions(max_new_tokens=12, **GREEDY)
    [plain] = engine.complete([body["prompt"]], options)
    opens = plain.tokens[0].id
    writer = Writer()
    writer.opens, writer.first_code, writer.codes = opens, 279, 1
    monkeypatch.setattr(engine, "writers", {"image": writer})
    with service_of(engine) as service:
        for ids in ([opens, 30], [30, 279]):
            answer = post(service, "/v1/completions", {"prompt": ids})
            assert answer.status_code == 400 and "pictures" in answer.text
        for own in ({}, {"temperature": 1.0}, {"speculate": 3}):
            [choice] = completion(service, **{**body, "logprobs": 1, **own})["choices"]
            assert len(choice["looptx"]["loops"]) == 12
            assert TokenTexts(engine.tokenizer).text(opens) not in choice["logprobs"]["tokens"]


def test_a_picture_as_a_data_url(cat):
    """The bundled model that reads pictures names one, as on the command line."""
    import looptx

    model = looptx.load(abilities=frozenset({"vision"}), kernel="torch")
    raw = base64.b64encode(cat.read_bytes()).decode()
    with service_of(model.engine, chats=False) as service:

        def ask(url, **more):
            part = {"type": "image_url", "image_url": {"url": url, **more}}
            body = {"messages": [{"role": "user", "content": [part]}], "temperature": 0}
            return post(service, "/v1/chat/completions", body | {"max_tokens": 4})

        found = ask(f"data:image/png;base64,{raw}").json()
        other = ask("http://example.org/cat.png")
        damaged = ask("data:image/png;base64,AAAA")
        small = ask("data:image/png;base64,AAAA", detail="low")
        odd = ask("data:image/png;base64,AAAA", size=3)
    item = MEDIA["image"].read(cat, model.engine.model.config)
    [alone] = model.engine.complete(
        [MediaPrompt("", (item,))], GenerationOptions(temperature=0, max_new_tokens=4)
    )
    assert found["choices"][0]["message"]["content"] == alone.text
    assert (other.status_code, damaged.status_code) == (400, 400)
    assert "data URL" in other.text
    assert (small.status_code, odd.status_code) == (400, 400)
    assert "detail" in small.text and "size" in odd.text
