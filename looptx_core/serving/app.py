"""The application: OpenAI's endpoints and a few of our own, as ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from looptx_core import __version__
from looptx_core.generation.request import Step, TokenPrompt
from looptx_core.media.registry import media_for
from looptx_core.serving import answers, errors, fields
from looptx_core.serving.answers import Answer, Chat, Completion, TokenTexts
from looptx_core.serving.errors import ApiError
from looptx_core.serving.guard import Guard
from looptx_core.serving.page import page
from looptx_core.serving.prompts import chat_prompt
from looptx_core.serving.service import Exchange, Service
from looptx_core.serving.worker import Job

_CLIENT_LEFT = 499
_FEW = 16
"""Tokens of a completion that does not say how many."""
_ERROR = {"description": "An error, as OpenAI gives it.", "content": {"application/json": {}}}
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 403, 404, 408, 409, 413, 429, 500, 503), _ERROR
)

_TYPES = {"str", "int", "float", "bool"}
"""What pydantic calls a field's types."""

_FIGURES: dict[int | str, dict[str, Any]] = {
    200: {"description": "In Prometheus' format.", "content": {"text/plain": {}}}
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An answer, or its pieces as server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def build_app(service: Service) -> ASGIApp:
    """The whole application for a service that runs."""
    app = FastAPI(
        title="looptx", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS
    )
    endpoints = Endpoints(service)
    app.get("/", response_class=HTMLResponse)(endpoints.page)
    app.get("/health")(endpoints.health)
    app.get("/version")(endpoints.version)
    app.get("/metrics", responses=_FIGURES, response_class=Response)(endpoints.metrics)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{name:path}")(endpoints.model)
    app.post("/v1/completions", responses=_ANSWERS)(endpoints.completions)
    app.post("/v1/chat/completions", responses=_ANSWERS)(endpoints.chat)
    app.post("/tokenize")(endpoints.tokenize)
    app.post("/detokenize")(endpoints.detokenize)
    app.post("/looptx/exit")(endpoints.change_exit)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)
    app.exception_handler(Exception)(_broken)
    return Guard(app, service.config)


class Endpoints:
    """One method for each."""

    def __init__(self, service: Service) -> None:
        self.service, self.engine = service, service.engine
        self.config = service.engine.model.config
        self.name = service.engine.name
        self.texts = TokenTexts(service.engine.tokenizer)

    async def page(self) -> HTMLResponse:
        return HTMLResponse(
            page(self._facts()),
            headers={
                "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
                "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
            },
        )

    async def health(self) -> JSONResponse:
        """503 while the server ends."""
        if self.service.draining or not self.service.worker.alive:
            raise errors.ending()
        return JSONResponse({"status": "ok"})

    async def version(self) -> JSONResponse:
        return JSONResponse({"version": __version__})

    async def metrics(self) -> Response:
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._facts()]})

    async def model(self, name: str) -> JSONResponse:
        fields.check_model(name, self.name)
        return JSONResponse(self._facts())

    async def tokenize(self, asked: fields.TokenizeAsked) -> JSONResponse:
        fields.check_model(asked.model, self.name)
        reader, opened = self.service.reader, bool(asked.add_special_tokens)
        ids = await self.service.read(0, lambda: reader.tokenize(asked.prompt, opened))
        return JSONResponse(
            {"count": len(ids), "max_model_len": self.service.context, "tokens": ids}
        )

    async def detokenize(self, asked: fields.DetokenizeAsked) -> JSONResponse:
        fields.check_model(asked.model, self.name)
        reader = self.service.reader
        text = await self.service.read(0, lambda: reader.detokenize(asked.tokens))
        return JSONResponse({"prompt": text})

    async def change_exit(self, asked: fields.ExitAsked) -> JSONResponse:
        """Another threshold from the next token on."""
        exchange = self.service.find(asked.id)
        if exchange is None:
            raise ApiError(404, "no such answer is being written", "id")
        if any(job.options.speculate or job.options.loops != "auto" for job in exchange.jobs):
            raise ApiError(
                409, "this answer has a fixed depth, so no threshold ends a token; write it again "
                "without loops and speculate", "id"
            )  # fmt: skip
        for job in exchange.jobs:
            job.options = replace(job.options, threshold=asked.threshold)
            self.service.worker.change_exit(job, job.options)
        return JSONResponse({"id": asked.id, "threshold": asked.threshold})

    async def completions(self, asked: fields.CompletionAsked, request: Request) -> Response:
        fields.check_model(asked.model, self.name)
        prompts = asked.prompts()
        most = _FEW if asked.max_tokens is None else asked.max_tokens
        each = asked.options(self.config.max_loops, most)
        top, score = asked.logprobs or 0, bool(asked.echo) and asked.logprobs is not None
        names = [f"prompt {number + 1}" for number in range(len(prompts))]
        names = names if len(names) > 1 else ["the prompt"]
        reader, room = self.service.reader, ("max_tokens", asked.max_tokens)
        read = await self.service.read(
            len(prompts) * len(each),
            lambda: [reader.read(prompt, room, name) for prompt, name in zip(prompts, names)],
        )
        jobs = [
            Job(prompt, options, top, score, name)
            for prompt, name in zip(read, names)
            for options in each
        ]
        texts = None if asked.logprobs is None else self.texts
        answer = Completion(self.name, texts, asked.logprobs)
        exchange = await self._open(jobs, answer)

        def prompt_text(index: int) -> str:
            prompt = prompts[index // len(each)]
            if isinstance(prompt, str):
                return prompt
            return self.texts.tokenizer.decode(prompt, skip_special_tokens=False)

        def ids(job: Job) -> list[int]:
            return job.request.seen[: job.prompt_tokens] if job.request else []

        def scores(job: Job) -> list[Any]:
            return job.request.prompt_scores if job.request else []

        if asked.stream:

            def head(index: int) -> Any:
                job = jobs[index]
                return answer.prompt_piece(index, prompt_text(index), ids(job), scores(job))

            stream = Stream(exchange, answer, asked, most == 0, head if asked.echo else None)
            return stream.response()
        found = await _all(exchange, request)
        if found is None:
            return Response(status_code=_CLIENT_LEFT)
        choices = []
        for index, (job, steps) in enumerate(zip(jobs, found)):
            steps = steps if most else []
            text = "".join(step.text for step in steps)
            if asked.echo:
                whole = prompt_text(index) + text
                choices.append(answer.echoed(index, steps, whole, ids(job), scores(job)))
            else:
                choices.append(answer.choice(index, steps, text))
        used = _usage(jobs[:: asked.n or 1], found if most else [])
        return JSONResponse(answer.whole(choices, used))

    async def chat(self, asked: fields.ChatAsked, request: Request) -> Response:
        fields.check_model(asked.model, self.name)
        room = asked.most_tokens
        most = self.service.context if room[1] is None else room[1]
        each = asked.options(self.config.max_loops, most)

        def read() -> TokenPrompt:
            prompt = chat_prompt(asked.messages, self.engine, self.service.chats)
            return self.service.reader.read(prompt, room)

        prompt = await self.service.read(len(each), read)
        top = asked.top_logprobs or 0
        jobs = [Job(prompt, options, top) for options in each]
        answer = Chat(self.name, self.texts if asked.logprobs else None, top)
        exchange = await self._open(jobs, answer)
        if asked.stream:
            return Stream(exchange, answer, asked, False, answer.first_piece).response()
        found = await _all(exchange, request)
        if found is None:
            return Response(status_code=_CLIENT_LEFT)
        choices = [
            answer.choice(index, steps, "".join(step.text for step in steps))
            for index, steps in enumerate(found)
        ]
        return JSONResponse(answer.whole(choices, _usage(jobs[:1], found)))

    async def _open(self, jobs: Sequence[Job], answer: Answer) -> Exchange:
        """Submit jobs, and wait until the engine has taken them."""
        exchange = self.service.open(jobs, answer.id)
        try:
            await exchange.accepted()
        except BaseException:
            exchange.close()
            raise
        return exchange

    def _facts(self) -> dict[str, Any]:
        settings = self.engine.exit_settings
        return {
            "id": self.name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "looptx",
            "max_model_len": self.service.context,
            "looptx": {
                "max_loops": self.config.max_loops,
                "chats": self.service.chats,
                "reads": [medium.name for medium in media_for(self.config)],
                "exit": settings.rule,
                "threshold": getattr(
                    settings, "confidence" if settings.rule == "auto" else settings.rule
                ),
                "min_loops": settings.min_loops,
                "kv_policy": settings.kv_policy,
            },
        }


class Stream:
    """An answer piece by piece, as server-sent events.

    head: makes a choice's first piece, by its index, once its first token is there. silent: no
    token is told, because none was asked for.
    """

    def __init__(
        self, exchange: Exchange, answer: Answer, asked: fields.Asked, silent: bool, head: Any
    ) -> None:
        self.exchange, self.answer, self.silent, self.head = exchange, answer, silent, head
        self.counted = bool(asked.stream_options and asked.stream_options.include_usage)
        self.choices = asked.n or 1

    def response(self) -> Response:
        return _EventStream(
            self._events(),
            self.exchange,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def _events(self) -> AsyncIterator[bytes]:
        more: dict[str, Any] = {"usage": None} if self.counted else {}
        jobs = self.exchange.jobs
        found: list[list[Step]] = [[] for _ in jobs]
        answer = self.answer
        try:
            async for events in self.exchange:
                pieces = []
                for index, step in events:
                    if not found[index] and self.head:
                        pieces.append(self.head(index))
                    found[index].append(step)
                    finish = answer.empty_piece(index, "length")
                    pieces.append(finish if self.silent else answer.piece(index, step))
                yield b"".join(answer.event([piece], **more) for piece in pieces)
            if self.exchange.cut:
                for index, steps in enumerate(found):
                    if not (steps and steps[-1].finish_reason):
                        yield answer.event([answer.empty_piece(index, answers.CUT)], **more)
            if self.counted:
                used = _usage(jobs[:: self.choices], [] if self.silent else found)
                yield answer.event([], usage=used)
            yield answers.DONE
        except Exception as error:  # the head is sent, so no status can tell
            yield answers.event(errors.of(error).document())


class _EventStream(StreamingResponse):
    """Takes the jobs out when the client has left, however early."""

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncIterator[bytes], exchange: Exchange, headers: dict[str, str]
    ) -> None:
        super().__init__(content, headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


async def _all(exchange: Exchange, request: Request) -> list[list[Step]] | None:
    """The steps of all jobs; None where the client left before they were done."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(exchange.all()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()
        exchange.close()


def _usage(asked: Sequence[Job], found: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """asked: a job of each prompt."""
    prompt_tokens = sum(job.prompt_tokens for job in asked)
    return answers.usage(prompt_tokens, [step for steps in found for step in steps])


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    kind, param = first["type"], place[0] if place else None
    if kind == "json_invalid":
        return ApiError(400, "the body is not JSON").response()
    if not place:
        return ApiError(400, "the body must be a JSON object, sent as application/json").response()
    reason = str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        reason = "is not a field that is known here; leave it out"
    # Of a field with several types pydantic names each that it tried, and complains of the first.
    inner = [part for part in place[1:] if part.isdigit() or part.isidentifier()]
    inner = [part for part in inner if part not in _TYPES]
    if len(inner) < len(place) - 1 and kind.endswith("_type"):
        reason = "is of a type that it can't have"
    name = ".".join(part for part in (place[0], *inner) if part.isascii() and len(part) < 40)
    return ApiError(400, f"{name}: {reason}", param[:80] if param else None).response()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    headers = dict(error.headers or {})
    if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body
        return ApiError(400, "the body is not JSON in UTF-8, or nests too deeply").response()
    return ApiError(error.status_code, str(error.detail), headers=headers).response()


async def _broken(request: Request, error: Exception) -> Response:
    return errors.of(error).response()
