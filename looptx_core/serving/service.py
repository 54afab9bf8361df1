"""Between HTTP's event loop and the engine's thread: limits, and the events of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from looptx_core.config.model import ModelConfig
from looptx_core.config.serving import ServeConfig
from looptx_core.errors import UsageError
from looptx_core.generation.cache_room import cache_bytes, free_memory
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import Step
from looptx_core.serving import errors
from looptx_core.serving.metrics import Metrics
from looptx_core.serving.reader import PromptReader
from looptx_core.serving.worker import Event, Failed, Job, Worker

T = TypeVar("T")
_SPARE = 0.9
"""The share of the free memory that a cache may take."""


class Exchange:
    """The jobs of one HTTP request, and what happens to them.

    Iterating gives lists of (index of the job, step), as they come, until all jobs have ended.
    Raises `ApiError` for the first job that fails, and when time is up.
    """

    def __init__(self, service: Service, jobs: Sequence[Job], name: str) -> None:
        self.jobs, self.name, self._service = jobs, name, service
        self.cut = False
        """Whether the server ended before the jobs did."""
        self._open = set(jobs)
        self._events: list[tuple[int, Step]] = []
        self._accepted = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._deadline = asyncio.get_running_loop().time() + service.config.request_timeout
        for index, job in enumerate(jobs):
            job.owner = (self, index)

    def put(self, job: Job, event: Event) -> None:
        if job not in self._open:
            return
        if isinstance(event, Step):
            self._events.append((job.owner[1], event))
            self._service.metrics.token(job, event)
            if event.finish_reason is not None:
                self._end_job(job)
        elif isinstance(event, Failed):
            self._error = self._error or event.error
            self._service.metrics.lost(job)
            self._end_job(job)
        else:
            self._accepted += 1
        self._changed.set()

    async def accepted(self) -> None:
        """Wait until all jobs are in the queue; raises for a bad one."""
        while self._accepted < len(self.jobs) and not self._events and self._open:
            await self._wait()
        self._check()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Step]]]:
        while True:
            events, self._events = self._events, []
            if events:
                yield events
            self._check()
            if not self._events and (self.cut or not self._open):
                return
            if not self._events:
                await self._wait()

    async def all(self) -> list[list[Step]]:
        """All steps of each job."""
        found: list[list[Step]] = [[] for _ in self.jobs]
        async for events in self:
            for index, step in events:
                found[index].append(step)
        if self.cut:
            raise errors.ending()
        return found

    def close(self) -> None:
        """Take out of the engine what has not ended; it is to be called whatever happened."""
        for job in list(self._open):
            self._service.worker.cancel(job)
            self._service.metrics.lost(job)
            self._end_job(job)

    def end(self) -> None:
        """Cut what has not ended: the server ends."""
        self.close()
        self.cut = True
        self._changed.set()

    def _end_job(self, job: Job) -> None:
        self._open.discard(job)
        self._service.left(self, not self._open)

    def _check(self) -> None:
        if self._error is not None:
            raise errors.of(self._error)
        # A client that reads slowly always finds tokens, so that nothing is waited for.
        if self._open and asyncio.get_running_loop().time() > self._deadline:
            raise self._late()

    def _late(self) -> errors.ApiError:
        return errors.too_late(self._service.config.request_timeout)

    async def _wait(self) -> None:
        """Until something happens."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError as error:
            raise self._late() from error


class Service:
    """A worker with a queue of limited length. One event loop may use it.

    Raises `UsageError` for a cache that this machine has no memory for, and for a context that the
    model does not have.
    """

    def __init__(self, engine: Engine, config: ServeConfig, *, chats: bool) -> None:
        self.engine, self.config, self.chats = engine, config, chats
        self.context = _context(config, engine.model.config)
        self.cache_bytes = _check_cache(engine, config.max_batch, self.context)
        self.reader = PromptReader(engine, self.context)
        self.draining = False
        self.created = int(time.time())
        self.worker = Worker(engine, config.max_batch, self.context, self._deliver)
        self.metrics = Metrics(self.worker, engine.model.config.max_loops)
        self._jobs = self._being_read = 0
        self._exchanges: set[Exchange] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def idle(self) -> bool:
        return not (self._exchanges or self._being_read)

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        """End all requests and the worker."""
        self.draining = True
        self.worker.stop()
        self.reader.close()

    def find(self, name: str) -> Exchange | None:
        """The exchange of this name, if it has not ended."""
        return next((own for own in self._exchanges if own.name == name), None)

    async def read(self, jobs: int, work: Callable[[], T]) -> T:
        """What `work` makes of the prompts of one HTTP request, in a thread of the reader's.

        jobs: how many will be opened. Their places are taken from now on. Raises `ApiError` where
        there is no room, and for what `work` raises.
        """
        if self.draining or not self.worker.alive:
            raise errors.ending()
        room = self.config.max_batch + self.config.max_queue
        if jobs > room:
            raise errors.bad_field(
                "n", f"this request has {jobs} choices, and the server holds {room}; ask for fewer"
            )
        if self._jobs + self._being_read + jobs > room:
            raise errors.full_queue(self.config.max_queue)
        self._being_read += jobs
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reader.pool, work)
        except Exception as error:  # of a decoder of media, too
            raise errors.of(error) from error
        finally:
            self._being_read -= jobs

    def open(self, jobs: Sequence[Job], name: str = "") -> Exchange:
        """Submit the jobs of one HTTP request, right after `read`, which has made room."""
        self._loop = asyncio.get_running_loop()
        exchange = Exchange(self, jobs, name)
        self._exchanges.add(exchange)
        self._jobs += len(jobs)
        for job in jobs:
            self.worker.submit(job)
        return exchange

    def left(self, exchange: Exchange, empty: bool) -> None:
        """A job of an exchange has ended. empty: none is left."""
        self._jobs -= 1
        if empty:
            self._exchanges.discard(exchange)

    def cut(self) -> None:
        """End all requests, with what they have."""
        for exchange in list(self._exchanges):
            exchange.end()

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Called in the worker's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hand_out, events)


def _hand_out(events: Sequence[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.owner[0].put(job, event)


def _context(config: ServeConfig, model: ModelConfig) -> int:
    """The tokens of a request: of a model that reads without end, those of its training if nothing
    else is asked for, because each request's work has to end."""
    most = model.context_limit
    if config.max_context is None:
        return model.max_seq_len
    if most is not None and config.max_context > most:
        raise UsageError(
            f"`max_context` {config.max_context}: the model's context holds {most}; "
            "give that or less, or leave it out"
        )
    return config.max_context


def _check_cache(engine: Engine, rows: int, context: int) -> int:
    """The bytes of the cache."""
    model = engine.model
    each = cache_bytes(model, 1, context, model.config.max_loops, engine.exit_settings)
    free = free_memory(engine.backend.device)
    if rows * each > _SPARE * free:
        fits = int(_SPARE * free / each)
        way = f"at most {fits} fit"
        if not fits:
            way = "free some memory" if model.config.has_memory else "give a smaller `max_context`"
        raise UsageError(
            f"`max_batch` {rows} with a context of {context} needs {rows * each / 2**30:.1f} GiB "
            f"for its cache, and {free / 2**30:.1f} GiB are free; {way}"
        )
    return rows * each
