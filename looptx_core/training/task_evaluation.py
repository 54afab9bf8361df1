"""Evaluation on tasks while a model trains; the tasks are those of `looptx evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer

from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.run import RunConfig
from looptx_core.errors import MissingError, UsageError
from looptx_core.evaluation.run import evaluate, find_tasks
from looptx_core.generation.engine import Engine
from looptx_core.training.frozen import cast_frozen


def tasks_of(config: RunConfig, depths: tuple[int, ...] = (1,)) -> EvaluateConfig:
    """The evaluation that a run asks for."""
    return EvaluateConfig(
        tasks=config.eval_tasks, loops=tuple(map(str, depths)), limit=config.eval_limit
    )


def check_tasks(config: RunConfig) -> None:
    """Raise what `find_tasks` does for tasks that can't be had, before a run has a folder."""
    if not config.eval_every:
        return
    try:
        find_tasks(tasks_of(config))
    except (UsageError, MissingError) as error:
        raise type(error)(str(error).replace("`tasks`", "`eval_tasks`")) from error


def task_evaluation(
    config: RunConfig,
    tokenizer: Tokenizer,
    special: SpecialTokens | None,
    report: Callable[[str], object],
) -> list[L.Callback]:
    """The callback that measures the tasks of a run, if it asks for any.

    special: those of a model that is trained further; None: the tokenizer's own.
    """
    if not config.eval_every:
        return []
    return [TaskEvaluation(config, tokenizer, special or SpecialTokens.known(tokenizer), report)]


class TaskEvaluation(L.Callback):
    """Measures the model on tasks each `eval_every` optimizer steps and after the last one.

    The logs get `eval_TASK_METRIC` at the last loop and `eval_TASK_METRIC_at_1` at one loop. It
    works with a copy of the model, with its adapters, so that the run is the same as without it,
    and before the step's checkpoint is saved, so that a checkpoint's records are in the log.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        special: SpecialTokens,
        report: Callable[[str], object],
    ) -> None:
        assert config.eval_every is not None
        self.config, self.every, self.report = config, config.eval_every, report
        self.tokenizer, self.special = tokenizer, special

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """One line of each task, so that lines which don't fit the model are found at once."""
        if trainer.is_global_zero:
            self._measured(module, limit=1)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        last = step >= trainer.max_steps
        if trainer.fit_loop._should_accumulate() or (step % self.every and not last):
            return
        if not trainer.is_global_zero:
            return  # the others wait at the next step's gradient
        figures = self._measured(module, self.config.eval_limit)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step - 1)
        said = "; ".join(
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.3f}"
            for name, value in figures.items()
            if not name.endswith("_at_1")
        )
        self.report(f"tasks at step {step}: {said}")

    def _measured(self, module: Any, limit: int | None) -> dict[str, float]:
        deepest = module.schedule.max_loops
        wanted = tasks_of(self.config, tuple(sorted({1, deepest})))
        wanted = EvaluateConfig(wanted.tasks, wanted.loops, limit)
        model = cast_frozen(copy.deepcopy(module.model), torch.float32).eval()
        engine = Engine(
            model, self.tokenizer, ends=self.special.ends, kernel="torch",
            batch_size=wanted.batch_size,
        )  # fmt: skip
        found = {}
        for row in evaluate(engine, wanted)["results"]:
            name = f"eval_{row['task']}_{row['metric']}"
            found[name if row["loops"] == deepest else f"{name}_at_1"] = row["value"]
        return found
