"""An evaluation: tasks by depths, one JSON document, and what the depths are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import MissingError, UsageError
from looptx_core.evaluation.measure import Result, measure
from looptx_core.evaluation.scoring import Scorer
from looptx_core.evaluation.task import NeedsHarness, Task, own_tasks, read_task
from looptx_core.words import counted

if TYPE_CHECKING:
    from looptx_core.generation.engine import Engine

SCHEMA_VERSION = 1
INSTALL = "pip install 'looptx[eval]'"
Document = dict[str, Any]
_SHARES = {"accuracy", "acc", "acc_norm", "exact_match"}
"""Metrics whose best value is 1."""


def evaluate(
    engine: Engine, config: EvaluateConfig, report: Callable[[str], object] = lambda line: None
) -> Document:
    """Measure a model on tasks at each depth.

    The document has `results`, a row for each task and depth, by task; `tasks`, what each is;
    and `enough`, by task and metric the depth beyond which nothing is gained, see `enough`.

    Raises:
        UsageError: a task that there is not.
        MissingError: a task of lm-eval's, which is not installed.
        DataError: a task file or its lines are wrong.
    """
    own, foreign = find_tasks(config)
    options = GenerationOptions(exit=config.exit, threshold=config.threshold)
    scorers = [Scorer(engine, depth, options, config.batch_size) for depth in config.depths]
    results: list[Result] = []
    better: dict[tuple[str, str], bool] = {}
    tasks: Document = {}
    for task in own:
        depths = ", ".join(map(str, config.depths))
        report(f"{task.name}: {task.metric} at depth {depths}")
        for scorer in scorers:
            results.append(measure(task, scorer, config.limit))
        better[task.name, task.metric] = task.higher_is_better
        count = len(task.lines(config.limit))
        tasks[task.name] = {"metric": task.metric, "lines": count, "chance": task.chance}
    if foreign:
        from looptx_core.evaluation.harness import run_harness

        for scorer in scorers:
            report(f"{', '.join(foreign)}: by lm-eval at depth {scorer.depth}")
            rows, directions, facts = run_harness(scorer, foreign, config)
            results += rows
            better |= directions
            tasks |= facts
        results.sort(key=lambda row: [*tasks].index(row.task))
    if cut := max(scorer.cut for scorer in scorers):
        what = counted(cut, "prompt longer", "prompts longer")
        report(f"{what} than the model's context: read from the end only")
    return {
        "schema_version": SCHEMA_VERSION,
        "model": engine.name,
        "tasks": tasks,
        "results": [asdict(row) for row in results],
        "enough": [
            {"task": task, "metric": metric, "higher_is_better": up,
             "loops": enough([r for r in results if (r.task, r.metric) == (task, metric)], up)}
            for (task, metric), up in better.items()
        ],
    }  # fmt: skip


def enough(rows: Sequence[Result], higher_is_better: bool) -> int | None:
    """The smallest fixed depth that no other one beats by more than one standard error.

    The error is the best depth's, as in the one-standard-error rule of Breiman et al. (1984). None
    where fewer than two fixed depths were measured.
    """
    fixed = sorted((row for row in rows if isinstance(row.loops, int)), key=lambda row: row.loops)
    if len(fixed) < 2:
        return None
    sign = 1 if higher_is_better else -1
    best = max(fixed, key=lambda row: sign * row.value)
    within = sign * best.value - (best.stderr or 0.0)
    found = next(row.loops for row in fixed if sign * row.value >= within)
    assert isinstance(found, int)
    return found


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What the depths are worth, in words, one line a task."""
    found, gaining = [], False
    deepest: int | None = None
    most = max((r["loops"] for r in document["results"] if r["loops"] != "auto"), default=0)
    for item in document["enough"]:
        name, depth = item["task"], item["loops"]
        rows = [
            r for r in document["results"]
            if (r["task"], r["metric"]) == (name, item["metric"])
        ]  # fmt: skip
        chance = document["tasks"].get(name, {}).get("chance")
        if chance is not None and all(_like_chance(row, chance) for row in rows):
            found.append(f"{name}: no better than guessing ({chance:.3g}) at any depth.")
            continue
        if depth is None:
            continue
        deepest = max(depth, deepest or 0)
        by_depth = {row["loops"]: row for row in rows}
        value = f"{_loops(depth)} ({_value(by_depth[depth])})"
        perfect = item["metric"] in _SHARES and by_depth[depth]["value"] == 1
        if depth < max(d for d in by_depth if d != "auto"):
            text = f"{name}: nothing is gained beyond {value}"
        elif perfect:
            text = f"{name}: all right at {value}, and no sooner"
        else:
            text = f"{name}: still gains at {value}, the deepest"
        gaining |= depth == most and not perfect
        if "auto" in by_depth:
            own = by_depth["auto"]
            text += f"; auto has {own['value']:.3f} at {own['mean_loops']:.2f} loops"
        found.append(text + ".")
    if deepest is not None and len(document["enough"]) > 1:
        found.append(
            f"By one standard error, a task still gains at {_loops(most)}, the deepest."
            if gaining
            else f"By one standard error, no task gains beyond {_loops(deepest)}."
        )
    return found


def _like_chance(row: Mapping[str, Any], chance: float) -> bool:
    return bool(row["value"] <= chance + 2 * (row["stderr"] or 0.0))


def _loops(depth: int) -> str:
    return "one loop" if depth == 1 else f"{depth} loops"


def _value(row: Mapping[str, Any]) -> str:
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
    return f"{row['value']:.3f}{error}"


def find_tasks(config: EvaluateConfig) -> tuple[list[Task], list[str]]:
    """The tasks that looptx reads itself, and the names of those for lm-eval."""
    files = own_tasks()
    shipped = list(files)
    if config.include_path is not None:
        files |= own_tasks(Path(config.include_path))
    own, foreign = [], []
    for name in config.names or shipped:
        if name not in files:
            foreign.append(_known_to_harness(name, files, config.include_path))
            continue
        try:
            own.append(read_task(files[name]))
        except NeedsHarness as reason:
            if not has_harness():
                raise MissingError(
                    f"{files[name]}: this task needs lm-eval, as {reason}; {INSTALL}"
                ) from reason
            foreign.append(name)
    return own, foreign


def has_harness() -> bool:
    """Whether lm-eval is installed."""
    import importlib.util

    return importlib.util.find_spec("lm_eval") is not None


def _known_to_harness(name: str, files: Mapping[str, Path], include: str | None) -> str:
    """The name, where lm-eval has such a task. Raises `UsageError` and `MissingError`."""
    known = list(files)
    if has_harness():
        from looptx_core.evaluation.harness import known_tasks

        known += known_tasks(include)
        if name in known:
            return name
    near, ours = get_close_matches(name, known, n=1), f"looptx's own are {', '.join(files)}"
    if not near and not has_harness():
        raise MissingError(f"`tasks` {name}: {ours}; lm-eval's tasks need the package; {INSTALL}")
    hint = f"did you mean {near[0]}?" if near else ours
    raise UsageError(f"`tasks` {name}: no such task; {hint}")
