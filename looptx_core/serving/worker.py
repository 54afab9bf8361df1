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
_MOST_FAILURES = 3
"""Caches in a row that could not be allocated, before the worker gives up."""


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


class EngineError(LooptxError):
    """The engine failed at a request; the log has the reason."""


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
        self._scheduler: Scheduler | None = None
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._ending = self._broken = False
        self._thread = threading.Thread(target=self._run, name="looptx-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """False before it starts, after its end, and once it finds no memory for a cache."""
        return self._thread.is_alive() and not self._broken

    @property
    def load(self) -> tuple[int, int, float]:
        """(jobs that run, jobs that wait, the share of the cache that is filled)."""
        scheduler = self._scheduler
        if scheduler is None:
            return 0, 0, 0.0
        running = scheduler.running
        return running, len(scheduler) - running, scheduler.tokens / (self.rows * self.context)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and all jobs without further events."""
        self._ending = True
        self._commands.put(lambda: None)  # wakes it
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
        failures = 0
        while not self._ending and failures < _MOST_FAILURES:
            failures += 1
            try:
                with (
                    torch.inference_mode(),
                    self.engine.lasting(self.rows, self.context) as self._scheduler,
                ):
                    failures = 0
                    for job in self._jobs.values():
                        assert job.request is not None
                        self._scheduler.add(job.request)
                    self._turns(self._scheduler)
            except Exception:  # of a turn: its jobs fail, and the server lives on
                log.exception("a turn of the engine failed")
                self._fail()
                time.sleep(_PAUSE)
        if not self._ending:
            log.error("the engine finds no memory for its cache and has given up")
            self._broken = True
            self._lose(list(self._jobs.values()))
        while not self._ending:
            self._obey()  # every job fails, because there is no scheduler

    def _fail(self) -> None:
        """A turn failed: the jobs that ran end, those that wait go on."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            self._lose([job for job in self._jobs.values() if job.request not in scheduler.waiting])

    def _lose(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            assert job.request is not None
            del self._jobs[job.request.index]
        self._deliver([(job, Failed(EngineError("the engine failed"))) for job in jobs])

    def _turns(self, scheduler: Scheduler) -> None:
        while not self._ending:
            self._obey()
            if self._jobs:
                events = [self._event(step) for step in scheduler.step()]
                if events:
                    self._deliver(events)

    def _event(self, step: Step) -> tuple[Job, Event]:
        """What a step means for its job, which may end with it."""
        job = self._jobs[step.request]
        if step.finish_reason is not None:
            del self._jobs[step.request]
        if (request := job.request) is None or request.error is None:
            return job, step
        log.error("a request failed", exc_info=request.error)
        request.error = None  # its frames hold tensors
        return job, Failed(EngineError("the engine failed"))

    def _obey(self) -> None:
        """Do what was asked since the last turn; wait for it where nothing else is to be done."""
        wait = not self._jobs
        while True:
            try:
                self._commands.get(block=wait)()
            except queue.Empty:
                return
            except Exception:  # of one request: the others go on
                log.exception("a command to the engine failed")
            wait = False

    def _accept(self, job: Job) -> None:
        try:
            job.request = self._request(job)
        except Exception as error:  # whatever a prompt does to a tokenizer, others go on
            self._deliver([(job, Failed(error))])
            return
        self._jobs[job.request.index] = job
        if self._scheduler is not None:
            self._scheduler.add(job.request)
        self._deliver([(job, Accepted())])

    def _request(self, job: Job) -> Request:
        scheduler = self._scheduler
        if scheduler is None:
            raise EngineError("there is no memory for the cache")
        request = self.engine.request(next(self._numbers), job.prompt, job.options, where=job.where)
        job.prompt_tokens = len(request.seen)
        request.limit = min(request.limit, self.context)
        cache = scheduler.batch.cache
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
        # An answer is text: pictures are made of codes for a long time, while the others wait.
        request.barred = [writer.opens for writer in request.writers.values()]
        request.writers = {}
        request.top_logprobs, request.score_prompt = job.top_logprobs, job.score_prompt
        request.ends_alone = True
        return request

    def _drop(self, job: Job) -> None:
        if job.request is not None and job.request.index in self._jobs:
            del self._jobs[job.request.index]
            if self._scheduler is not None:
                self._scheduler.cancel(job.request)

    def _change(self, job: Job, options: GenerationOptions) -> None:
        request = job.request
        if request is None or request.options.speculate:
            return
        own = resolve_exit(self.engine.exit_settings, options, self.engine.model.config)
        request.exit = own
