"""Figures of a server in Prometheus' format, named as vLLM names the same."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from looptx_core.generation.request import Step

if TYPE_CHECKING:
    from looptx_core.serving.worker import Job, Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts what jobs do. deepest: the model's loops."""

    def __init__(self, worker: Worker, deepest: int) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "looptx", "registry": self.registry}
        self.finished = Counter("request_success", "Finished requests.", ["reason"], **own)
        self.failed = Counter("request_failure", "Requests that were refused or cut.", **own)
        self.prompts = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self.generated = Counter("generation_tokens", "Generated tokens.", **own)
        self.early = Counter(
            "early_exit_tokens", "Generated tokens that stopped before the deepest loop.", **own
        )
        self.loops = Histogram(
            "loops_per_token",
            "Loops of a generated token.",
            buckets=range(1, deepest + 1),
            **own,
        )
        self.confidence = Histogram(
            "token_confidence",
            "Stated probability that a token is right.",
            buckets=[n / 10 for n in range(1, 11)],
            **own,
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "From arrival.", buckets=_SECONDS, **own
        )
        self.queued = Histogram(
            "request_queue_time_seconds", "Until the prompt is read.", buckets=_SECONDS, **own
        )
        self.gap = Histogram(
            "time_per_output_token_seconds", "Between tokens.", buckets=_SECONDS, **own
        )
        gauges = {
            "num_requests_running": "Requests that have a row.",
            "num_requests_waiting": "Requests in the queue.",
            "kv_cache_usage_perc": "Filled share of the cache, 1 is full.",
        }
        for number, (name, told) in enumerate(gauges.items()):
            Gauge(name, told, **own).set_function(partial(_load, worker, number))
        self._deepest = deepest
        self._last: dict[Job, float] = {}

    def token(self, job: Job, step: Step) -> None:
        now = time.perf_counter()
        before = self._last.get(job)
        if before is None:
            self.prompts.inc(job.prompt_tokens)
            self.first.observe(now - job.submitted)
            if job.request is not None:
                self.queued.observe(max(0.0, job.request.began - job.submitted))
        else:
            self.gap.observe(now - before)
        self._last[job] = now
        self.generated.inc()
        self.loops.observe(step.loops)
        self.confidence.observe(step.confidence)
        if step.loops < self._deepest:
            self.early.inc()
        if step.finish_reason is not None:
            self.finished.labels(step.finish_reason).inc()
            self.drop(job)

    def lost(self, job: Job) -> None:
        """A job ended without its last token."""
        self.failed.inc()
        self.drop(job)

    def drop(self, job: Job) -> None:
        self._last.pop(job, None)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _load(worker: Worker, number: int) -> float:
    return worker.load[number]
