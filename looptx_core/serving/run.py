"""Serving over HTTP until a signal comes: the socket, limits of connections, and a graceful end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from looptx_core.config.serving import ServeConfig
from looptx_core.errors import Interrupted, LooptxError
from looptx_core.generation.engine import Engine
from looptx_core.serving.app import build_app
from looptx_core.serving.service import Service

HEAD_SECONDS = 10.0
"""For a request's head to arrive, from the connection's beginning or the answer before."""
SEND_SECONDS = 60.0
"""For a client to take what was sent, before its connection is closed."""
MOST_WAITING = 500
"""Connections without a request. One more, and the one that has waited longest is closed."""
_BACKLOG = 256
"""Connections that are accepted between two turns of the event loop."""
_FILES = 4096
"""Open files that the server may need: connections, those being accepted, and its own."""
_SWITCH_SECONDS = 0.0005
"""After which the event loop and the engine's thread hand Python over to each other; its own 5 ms
are a fifth of a pass, for which the other one would stand still."""
_LAST_SECONDS = 5
"""For the last events to reach the clients."""


def serve(
    engine: Engine, config: ServeConfig, *, chats: bool, announce: Callable[[str], object]
) -> None:
    """Serve a model until SIGINT or SIGTERM, which let running requests finish.

    chats: whether the model was finetuned on chats. announce: called with the address, once
    requests are answered.

    Raises:
        UsageError: a cache that does not fit, or a context that the model does not have.
        LooptxError: the port can't be had.
        Interrupted: a second signal.
    """
    service = Service(engine, config, chats=chats)
    _allow_files()
    sys.setswitchinterval(_SWITCH_SECONDS)
    listener = listen(config.host, config.port)
    with listener:
        service.start()
        try:
            server = Server(service, announce)
            server.run(sockets=[listener])
        finally:
            service.stop()
    if server.hurried:
        raise Interrupted("interrupted")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `LooptxError` where the address can't be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise LooptxError(f"`host` {host}: {error.strerror or error}; give an address") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LooptxError(f"`port` {port} at {host}: {_why(error)}") from error
    return listener


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "something else listens there; give another `port`, or 0 for a free one"
    if error.errno == errno.EACCES:
        return "not allowed here; give a `port` from 1024 up"
    if error.errno == errno.EADDRNOTAVAIL:
        return "not an address of this machine; give another `host`"
    return f"{error.strerror}; give another `host` or `port`"


def _allow_files() -> None:
    """Where a process may open few files, ask the system for more, up to what it allows."""
    if sys.platform == "win32":  # it has no such limits
        return
    import resource

    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    if own != resource.RLIM_INFINITY and own < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class Server(uvicorn.Server):
    """uvicorn's, with our way to end."""

    def __init__(self, service: Service, announce: Callable[[str], object]) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=type("Protocol", (_Protocol,), {"waiting": {}}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.service, self.announce = service, announce
        self.hurried = False
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        self.announce(address(sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests finish, a second one ends at once."""
        if self._deadline is not None:
            self.hurried = self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._deadline = time.monotonic() + self.service.config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() >= self._deadline
            if late:
                self.service.cut()
            self.should_exit = late or self.service.idle
        return await super().on_tick(counter)


def address(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """uvicorn's, which waits for ever for the rest of a request's head, and for a client to read
    its answer."""

    waiting: ClassVar[dict[_Protocol, asyncio.TimerHandle]]
    """Of one server: the connections without a request, the one that has waited longest first."""
    _stuck: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses while anything is left to be taken
        self._wait()
        if len(self.waiting) > MOST_WAITING:
            next(iter(self.waiting))._give_up()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._stop_waiting()
        elif self not in self.waiting:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_less()

    def _expect_less(self) -> None:
        """Hang up on a client that has taken nothing of what is left once the time is over."""
        left = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._expect_less()
            else:
                self.transport.abort()

        self._stuck = self.loop.call_later(SEND_SECONDS, check)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.waiting[self] = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if (timer := self.waiting.pop(self, None)) is not None:
            timer.cancel()

    def _stop_sending(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _give_up(self) -> None:
        self._stop_waiting()
        if self.idle and not self.transport.is_closing():
            self.transport.abort()
