"""looptx serve in process: requests and settings that are refused, and those that pass."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from serving_cases import CONFIG, GREEDY, completion, post, run, service_of

from looptx_core.config.serving import ServeConfig
from looptx_core.errors import LooptxError, UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

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
    ("max_tokens", {"max_tokens": 512}),
    ("max_tokens", {"max_tokens": 2**70, "stream": True}),
    ("max_tokens", {"prompt": [[20], [20] * 500], "max_tokens": 13}),
    (None, {"prompt": "a" * 100_000}),
    ("stop", {"stop": ["a"] * 5}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": "a" * 257}),
    ("stop", {"stop": ["a", "b" * 257]}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": -(2**63) - 1}),
    ("loops", {"loops": 0}),
    ("loops", {"loops": 5}),
    ("max_loops", {"max_loops": 9}),
    ("min_loops", {"min_loops": 3, "max_loops": 2}),
    ("exit", {"exit": "never"}),
    ("exit", {"loops": 2, "exit": "gain"}),
    ("threshold", {"loops": 2, "threshold": 0.5}),
    ("min_loops", {"loops": 2, "min_loops": 1}),
    ("max_loops", {"loops": 2, "max_loops": 3}),
    ("max_loops", {"loops": 2, "speculate": 1, "max_loops": 3}),
    ("threshold", {"speculate": 1, "threshold": 0.5}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
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


def test_refusals_name_fields_as_clients_know_them(service):
    bodies = [
        b'{"prompt": {}}', b'{"prompt": "a", "loops": []}', b'{"prompt": "\xff"}', b"[" * 10**5,
        b"[]",
    ]  # fmt: skip

    async def ask(client):
        kind = {"content-type": "application/json"}
        answers = [await client.post("/v1/completions", content=b, headers=kind) for b in bodies]
        return [answer.json()["error"]["message"] for answer in answers]

    unreadable = "the body is not JSON in UTF-8, or nests too deeply"
    assert run(service, ask) == [
        "prompt: is of a type that it can't have", "loops: is of a type that it can't have",
        unreadable, unreadable, "the body must be a JSON object, sent as application/json",
    ]  # fmt: skip


def test_what_the_context_has_no_room_for(engine):
    """What is asked for has to fit; where nothing is, the answer takes what there is."""
    chat, said = "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
    with service_of(engine, max_context=48) as service:
        whole = post(service, chat, said | GREEDY).json()
        assert whole["usage"]["total_tokens"] == 48
        left = whole["usage"]["completion_tokens"]
        for field in ("max_tokens", "max_completion_tokens"):
            error = post(service, chat, said | {field: left + 1}).json()["error"]
            assert (error["param"], error["code"]) == (field, "context_length_exceeded")
            assert f"ask for {left} at most" in error["message"]
            assert error["message"].startswith("this model's maximum context length is 48 tokens")
            assert post(service, chat, said | {field: left}).status_code == 200
        for most, length in ((None, 7), (7, 7), (2, 2)):
            few = completion(service, prompt=[20] * 41, max_tokens=most, **GREEDY)
            assert few["usage"]["completion_tokens"] == length
        full = post(service, "/v1/completions", {"prompt": [20] * 48, "max_tokens": 0})
        assert full.json()["error"]["code"] == "context_length_exceeded"


def test_neutral_values_pass(service):
    for extreme in (
        {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e300}, {"temperature": 5e-324},
        {"temperature": 1e300}, {"top_p": 5e-324}, {"threshold": -1e300},
        {"seed": -1}, {"seed": -(2**63)},
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
    said = {"type": "text", "text": "a"}
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
        (chat, {"messages": [{"role": "user", "content": [said | {"more": 1}]}]}, 400, "messages"),
        (chat, {"messages": [user], "max_tokens": 1, "max_completion_tokens": 2}, 400,
         "max_tokens"),
        ("/detokenize", {"tokens": [1] * 600}, 400, "tokens"),
        ("/tokenize", {"prompt": "a" * 100_000}, 400, None),
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
    monkeypatch.setattr(module, "free_memory", lambda device: 1 << 20)
    with pytest.raises(UsageError, match=r"max_batch.*GiB.*at most \d+"):
        module.Service(engine, ServeConfig(max_batch=1000), chats=True)
    config = replace(CONFIG, memory="delta", memory_window=16, memory_block=8)
    remembering = Engine(LoopedTransformer(config).eval(), engine.tokenizer)
    long = module.Service(remembering, ServeConfig(max_batch=2, max_context=10_000), chats=True)
    row = remembering.model.new_cache(1, 10_000, config.max_loops).nbytes
    assert long.context == 10_000 and long.cache_bytes == 2 * row > 0
    with pytest.raises(UsageError, match=r"max_batch.*GiB.*at most \d+"):
        module.Service(remembering, ServeConfig(max_batch=1000), chats=True)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LooptxError, match="something else listens"):
            listen("127.0.0.1", port)
    with pytest.raises(LooptxError):
        listen("no.such.host.invalid", 0)
