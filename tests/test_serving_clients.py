"""looptx serve over a socket: OpenAI's own client, slow and rude clients, and the end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import openai
import pytest
from serving_cases import served, service_of

from looptx_core.config.generation import GenerationOptions
from looptx_core.serving import run

OWN = {"ignore_eos": True}


@pytest.fixture(scope="module")
def address(engine):
    with service_of(engine, api_key="secret") as service, served(service) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_the_client_writes_streams_and_chats(client, engine):
    [model] = client.models.list().data
    assert model.id == "small" and client.models.retrieve("small").looptx["max_loops"] == 4
    asked = dict(model="small", prompt="Call me", max_tokens=8, temperature=0)
    whole = client.completions.create(**asked, logprobs=1, extra_body=OWN | {"loops": 3})
    options = GenerationOptions(temperature=0, max_new_tokens=8, ignore_eos=True, loops=3)
    [alone] = engine.complete(["Call me"], options)
    [choice] = whole.choices
    assert choice.text == alone.text and choice.looptx["loops"] == [3] * 8
    assert choice.logprobs.token_logprobs == pytest.approx(
        [step.logprob for step in alone.tokens], abs=1e-4
    )
    stream = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body=OWN | {"loops": 3}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == alone.text
    assert last.usage.completion_tokens == 8 == whole.usage.completion_tokens
    said = dict(model="small", messages=[{"role": "user", "content": "Call me"}], max_tokens=6)
    chat = client.chat.completions.create(**said, seed=1, reasoning_effort="high", extra_body=OWN)
    chunks = client.chat.completions.create(**said, seed=1, stream=True, extra_body=OWN)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat.choices[0].message.content and chat.choices[0].finish_reason == "length"


def test_the_clients_errors(client, address):
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as caught:
        client.completions.create(model="small", prompt="a", presence_penalty=1)
    assert caught.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="a")
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_many_at_once_by_the_asynchronous_client(address):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="secret") as client:

            async def one(number):
                stream = await client.completions.create(
                    model="small", prompt="Call me", max_tokens=12, seed=number % 3, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[one(number) for number in range(12)])

    texts = asyncio.run(ask())
    assert texts[:3] * 4 == texts and len(set(texts)) == 3


def raw(address, content: bytes, wait: float = 5) -> bytes:
    """What a plain socket gets, until the server closes it."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(content)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionResetError:
            pass
        return found


def test_clients_that_send_half_a_request(address, monkeypatch):
    from looptx_core.serving import guard

    monkeypatch.setattr(run, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    assert raw(address, b"POST /v1/comple") == b""
    assert raw(address, b"") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
    assert raw(address, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
    large = raw(address, head + b"Content-Length: 1000000000\r\n\r\n{")
    assert large.startswith(b"HTTP/1.1 413") and b'"invalid_request_error"' in large
    assert raw(address, b"\x00\x01\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_client_that_stops_reading_its_stream(engine, monkeypatch):
    """Its connection is closed, and its places are free."""
    monkeypatch.setattr(run, "SEND_SECONDS", 0.3)
    listen = run.listen

    def narrow(host, port):
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(run, "listen", narrow)
    body = json.dumps({"prompt": "a", "max_tokens": 500, "n": 4, "stream": True, "loops": 4})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with service_of(engine) as service, served(service) as (address, server):
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall((head + body).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            deadline = time.monotonic() + 20
            while not (service.idle and not server.server_state.connections):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert service.metrics.failed._value.get() >= 1  # others may have been done before


def test_a_crowd_of_idle_connections_keeps_nobody_out(address, monkeypatch):
    monkeypatch.setattr(run, "MOST_WAITING", 20)
    host, port = address.removeprefix("http://").split(":")
    crowd = [socket.create_connection((host, int(port))) for _ in range(60)]
    # A new client: an old one may hold a connection that is idle and is closed with the others.
    new = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    try:
        assert new.completions.create(model="small", prompt="a", max_tokens=1).choices
    finally:
        new.close()
        for connection in crowd:
            connection.close()


def test_the_first_signal_drains_and_the_second_does_not_wait(engine):
    asked = dict(model="small", prompt="a", max_tokens=400, temperature=0, extra_body=OWN)
    with (
        service_of(engine, drain_seconds=20) as service,
        served(service) as (address, server),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(**asked, stream=True)
        next(stream)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError, match="ending"):
            client.completions.create(**asked)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    with service_of(engine, drain_seconds=0.2) as service, served(service) as (address, server):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            slow = dict(asked, n=4, stream=True, extra_body=OWN | {"loops": 4})
            stream = client.completions.create(**slow)
            next(stream)
            began = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)
            assert server.hurried and server.force_exit
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_the_harness_over_http_agrees_with_the_one_in_process():
    """lm-eval's local-completions: echoed log-probabilities of token ids, several at once."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from looptx_core.api import load
    from looptx_core.checkpoint.registry import bundled_model
    from looptx_core.evaluation.harness import LooptxLM
    from looptx_core.evaluation.scoring import Scorer

    engine = load(bundled_model()).engine
    pairs = [
        ("Call me", " Ishmael"),
        ("map bf da ee fe cd hh gh aa:", " f E c A"),
        ("never mind how long precisely. " * 20, "I thought I would sail about a little"),
        ("", "whale"),
    ]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    own = LooptxLM(scorer=Scorer(engine, engine.model.config.max_loops, GenerationOptions(), 8))
    expected = own.loglikelihood(asked)
    with service_of(engine, chats=False) as service, served(service) as (address, _):
        over_http = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions", model=engine.name, batch_size=2,
            tokenizer=str(bundled_model()), num_concurrent=1,
        )  # fmt: skip
        found = over_http.loglikelihood(asked)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    values = [value for value, _ in expected]
    assert [value for value, _ in found] == pytest.approx(values, abs=1e-4)


@pytest.mark.slow
def test_a_fuzzer_of_the_schema_finds_no_server_error(engine):
    st = shutil.which("st") or os.environ.get("SCHEMATHESIS")
    if st is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    with service_of(engine, max_context=64) as service, served(service) as (address, _):
        done = subprocess.run(
            [st, "run", f"{address}/openapi.json", "--checks", checks, "--max-examples", "40",
             "--suppress-health-check", "all", "--phases", "coverage,fuzzing"],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        assert service.idle and service.worker.load[:2] == (0, 0)
