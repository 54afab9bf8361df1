"""The thread that generates for a server: it alone touches model, cache and tokenizer.

Others hand it jobs and get events back. Between two turns of the scheduler it does what it was
told, so that a cancelled job has left within a turn.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import LooptxError, UsageError
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import Request, Step, TokenPrompt
from looptx_core.generation.scheduler import Scheduler
from looptx_core.stopping.resolve import resolve_exit

log = logging.getLogger(__name__)

_PAUSE = 0.1
"""Seconds after an error, so that one that stays does not fill the log."""


@dataclass(eq=False)
class Job:
    """One text to be written."""

    prompt: TokenPrompt
    options: GenerationOptions
    top_logprobs: int = 0
    score_prompt: bool = False
    where: str = "the prompt"
    """What errors call it."""
    owner: Any = None
    """Of whoever submitted it; the worker does not look at it."""
    submitted: float = field(default_factory=time.perf_counter)
    request: Request | None = None
    """What became of it, once it is accepted."""
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Accepted:
    """A job waits for its turn: its prompt is fine."""


@dataclass(frozen=True)
class Failed:
    """A job ended by an error."""

    error: Exception


Event = Accepted | Failed | Step
Deliver = Callable[[Sequence[tuple[Job, Event]]], object]


class Worker:
    """Generates in a thread of its own.

    rows: jobs that run at once. context: tokens of each. deliver: called in the thread, with the
    events of each turn. A job's last event is a `Failed`, or a `Step` with its finish reason; a
    cancelled job has no further events.
    """

    def __init__(self, engine: Engine, rows: int, context: int, deliver: Deliver) -> None:
        self.engine, self.rows, self.context = engine, rows, context
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._scheduler: Scheduler
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="looptx-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int, float]:
        """(jobs that run, jobs that wait, the share of the cache that is filled)."""
        scheduler = getattr(self, "_scheduler", None)
        if scheduler is None:
            return 0, 0, 0.0
        running = scheduler.running
        return running, len(scheduler) - running, scheduler.tokens / (self.rows * self.context)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and all jobs without further events."""
        self._commands.put(self._end)
        self._thread.join()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._accept(job))

    def cancel(self, job: Job) -> None:
        """Take a job out, wherever it stands; nothing happens if it has ended."""
        self._commands.put(lambda: self._drop(job))

    def change_exit(self, job: Job, options: GenerationOptions) -> None:
        """Let a job's tokens stop by these options from the next one on."""
        self._commands.put(lambda: self._change(job, options))

    # What follows runs in the thread.

    def _run(self) -> None:
        while not self._ending:
            try:
                with (
                    torch.inference_mode(),
                    self.engine.lasting(self.rows, self.context) as self._scheduler,
                ):
                    self._turns()
            except Exception as error:  # of a turn: its jobs fail, and the server lives on
                log.exception("a turn of the engine failed")
                failed = [(job, Failed(error)) for job in self._jobs.values()]
                self._jobs.clear()
                self._deliver(failed)
                time.sleep(_PAUSE)

    def _turns(self) -> None:
        while not self._ending:
            self._obey()
            if self._jobs:
                events = [(self._jobs[step.request], step) for step in self._scheduler.step()]
                for step in (step for _, step in events if step.finish_reason is not None):
                    del self._jobs[step.request]
                if events:
                    self._deliver(events)

    def _obey(self) -> None:
        """Do what was asked since the last turn; wait for it where nothing else is to be done."""
        try:
            self._commands.get(block=not self._jobs)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _accept(self, job: Job) -> None:
        try:
            job.request = self._request(job)
        except Exception as error:  # whatever a prompt does to a tokenizer, others go on
            if not isinstance(error, LooptxError):
                log.exception("a prompt could not be read")
            self._deliver([(job, Failed(error))])
            return
        self._jobs[job.request.index] = job
        self._scheduler.add(job.request)
        self._deliver([(job, Accepted())])

    def _request(self, job: Job) -> Request:
        request = self.engine.request(next(self._numbers), job.prompt, job.options, where=job.where)
        job.prompt_tokens = len(request.seen)
        request.limit = min(request.limit, self.context)
        cache = self._scheduler.batch.cache
        deepest = max(request.exit.max_loops, request.prompt_exit.max_loops)
        if deepest > cache.loops:
            name = "max_loops" if job.options.loops == "auto" else "loops"
            raise UsageError(f"`{name}` {deepest}: this server runs at most {cache.loops}")
        settings = request.exit.settings
        if (settings.kv_policy, settings.kv_type) != (cache.policy, cache.kind):
            raise UsageError(
                f"`speculate` needs a cache of the policy {settings.kv_policy}, and this server's "
                f"has {cache.policy}; leave out `speculate`"
            )
        request.top_logprobs, request.score_prompt = job.top_logprobs, job.score_prompt
        return request

    def _drop(self, job: Job) -> None:
        if job.request is not None and job.request.index in self._jobs:
            del self._jobs[job.request.index]
            self._scheduler.cancel(job.request)

    def _change(self, job: Job, options: GenerationOptions) -> None:
        request = job.request
        if request is None or request.options.speculate:
            return
        own = resolve_exit(self.engine.exit_settings, options, self.engine.model.config)
        request.exit = own

    def _end(self) -> None:
        self._ending = True
        self._jobs.clear()
