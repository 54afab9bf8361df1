"""looptx's models under lm-eval, and lm-eval's tasks under `looptx evaluate` (extra `eval`).

import looptx_core.evaluation.harness  # registers the model `looptx`
lm_eval.simple_evaluate("looptx", "model=runs/a,loops=auto", tasks=["arc_easy"])
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.evaluation.measure import Result
from looptx_core.evaluation.scoring import Scorer
from looptx_core.generation.engine import Engine
from looptx_core.machine.device import best_device


@register_model("looptx")
class LooptxLM(TemplateLM):
    """A model at a depth: fixed, or with the real exits of the engine.

    model: a run or a model folder, as for `looptx.load`; loops: a number or 'auto'. scorer: in
    place of both. An unknown argument is a `TypeError`.
    """

    def __init__(
        self,
        model: str | None = None,
        loops: int | str = "auto",
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        *,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        if scorer is None:
            depth = EvaluateConfig(loops=(str(loops),)).depths[0]
            rows = int(batch_size) if str(batch_size).isdigit() else 32
            loaded = load_model(resolve_model(model).folder, device=best_device())
            engine = Engine(
                loaded.model, loaded.tokenizer, loaded.exit, ends=loaded.special.ends,
                name=loaded.name, batch_size=rows,
            )  # fmt: skip
            scorer = Scorer(engine, depth, GenerationOptions(), rows)
        self.scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return self.scorer.engine.end

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.engine.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        begin = [] if add_special_tokens is False else self.scorer.engine.opening
        return [*begin, *self.scorer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scorer = self.scorer
        lines = [scorer.line(context, continuation) for _, context, continuation in requests]
        return [(sum(found.logprobs), all(found.hits)) for found in scorer.score(lines)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [self.scorer.windows(request.args[0]) for request in requests]
        found = iter(self.scorer.score([line for own in windows for line in own]))
        return [sum(sum(next(found).logprobs) for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy; a task that draws its answers is a `UsageError`."""
        texts = []
        for request in requests:
            prompt, how = request.args
            if how.get("do_sample") or how.get("temperature"):
                raise UsageError("the task draws its answers, and evaluate is greedy")
            until = how.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            most = int(how.get("max_gen_toks", 256))
            texts.append(self.scorer.complete([prompt], most, stop)[0].text)
        return texts


def known_tasks(include: str | None) -> list[str]:
    """The names of lm-eval's tasks and groups, those of a folder included."""
    return _manager(include).all_tasks


@functools.cache
def _manager(include: str | None) -> TaskManager:
    """Reads the names of thousands of files, which takes seconds."""
    return TaskManager(include_path=include)


def run_harness(
    scorer: Scorer, names: Sequence[str], config: EvaluateConfig
) -> tuple[list[Result], dict[tuple[str, str], bool], dict[str, Any]]:
    """lm-eval's tasks at one depth: rows, which metrics are better when higher, and facts.

    Raises `DataError` where a task's data can't be had.
    """
    rows: list[Result] = []
    better: dict[tuple[str, str], bool] = {}
    facts: dict[str, Any] = {}
    manager = _manager(config.include_path)
    for name in names:
        scorer.reset()
        started = time.perf_counter()
        try:
            done = lm_eval.simple_evaluate(
                model=LooptxLM(scorer=scorer), tasks=[name], limit=config.limit,
                task_manager=manager, log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
        except LooptxError:
            raise
        except Exception as error:  # of lm-eval, datasets or a hub: many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"task {name}: lm-eval can't run it ({reason}); check its data and the network"
            ) from error
        seconds = time.perf_counter() - started
        assert done is not None
        for task, found in done["results"].items():
            for key, value in found.items():
                metric, _, kind = key.partition(",")
                if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                deviation = found.get(f"{metric}_stderr,{kind}")
                rows.append(
                    Result(
                        task, scorer.depth, scorer.mean_loops, metric, float(value),
                        float(deviation) if isinstance(deviation, int | float) else None,
                        scorer.flops_per_token, seconds,
                    )
                )  # fmt: skip
                up = done.get("higher_is_better", {}).get(task, {}).get(metric)
                better[task, metric] = up is not False
            count = done.get("n-samples", {}).get(task, {}).get("effective")
            facts[task] = {"metric": None, "lines": count, "chance": None}
    return rows, better, facts
