"""What a request has to pass before the application sees it: host, origin, key, and limits."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looptx_core.config.serving import ServeConfig, is_loopback
from looptx_core.serving.errors import ApiError

MOST_BYTES = 32 << 20
"""Of a body; items of media come in base 64."""
BODY_SECONDS = 30.0
"""For a body to arrive."""
OPEN_PATHS = ("/", "/health")
"""What needs no key: the page, which asks for it, and the answer that the server is up."""


class Guard:
    """ASGI middleware. Answers what it refuses by itself."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers, scope["path"])
            body = await _read(headers, receive)
        except ApiError as error:
            response = error.response()
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        # A page of another name may point that name here (DNS rebinding).
        if self.config.is_local and not is_loopback(_name(host)):
            raise ApiError(403, "this server answers to localhost only; use its own address")
        origin = headers.get("origin")
        if origin is not None and _address(origin) != host:
            raise ApiError(403, "pages of other origins may not use this server")
        if self.config.api_key is None or path in OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if kind.lower() == "bearer" else ""
        if not hmac.compare_digest(given.encode(), self.config.api_key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send it as a bearer token", None,
                "invalid_api_key", {"www-authenticate": "Bearer"},
            )  # fmt: skip


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(origin: str) -> str:
    """The host and port of an Origin header. Raises `ApiError` for what is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError as error:
        raise ApiError(400, "the header Origin is no address; leave it out") from error


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body; None if the client has left. Raises `ApiError` for one too large or late."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MOST_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MOST_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from error


def _too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MOST_BYTES >> 20} MiB; send less")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body once, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
