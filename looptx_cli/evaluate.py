"""looptx evaluate: how good a model is at each depth, and what that costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from looptx_cli.console import note, stdout
from looptx_cli.imports import large_imports
from looptx_cli.model_options import Adapter, Config, Model
from looptx_cli.options import check_figure, with_fields
from looptx_cli.tables import show_rows
from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.resolve import resolve
from looptx_core.words import quoted


@with_fields(EvaluateConfig)
def evaluate(
    flags: dict[str, Any],
    model: Model = None,
    adapter: Adapter = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Measure a model on tasks, at several depths and with its exits.

    \b
    looptx evaluate
    looptx evaluate --tasks hops,text --loops 1,2,4,8,auto --out depths.png
    looptx evaluate --model runs/a --tasks hops --limit 50 --json
    looptx evaluate --tasks mine --include-path my-tasks
    looptx evaluate --tasks arc_easy --loops 4,auto

    Five tasks ship and need no network; those of lm-eval come with the extra `eval`.
    """
    settings = resolve(EvaluateConfig, flags=flags, config=config).build(EvaluateConfig)
    out = None if settings.out is None else Path(settings.out)
    if out is not None:
        check_figure(out, overwrite)

    with large_imports():
        from looptx_core.api import load
        from looptx_core.evaluation.run import evaluate, find_tasks, sentences

    find_tasks(settings)  # a wrong name is told before the model is read
    loaded = load(model, adapter=adapter, batch_size=settings.batch_size)
    if model is None and adapter is None:
        note(loaded.choices[0], quiet)
    document = evaluate(loaded.engine, settings, lambda line: note(line, quiet))
    if out is not None:
        from looptx_core.inspection.figures import draw_charts
        from looptx_core.inspection.task_charts import task_charts

        draw_charts(task_charts(document), out)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        _show(document)
        for sentence in sentences(document):
            stdout().print(sentence, soft_wrap=True)
    if out is not None:
        note(f"figure: {out}", quiet)
    note(f"try next: {_next(document, model, adapter, settings)}", quiet)


def _show(document: dict[str, Any]) -> None:
    rows, before = [], ("", "")
    for row in document["results"]:
        name = (row["task"], row["metric"])
        rows.append([
            *(("", "") if name == before else name),
            str(row["loops"]),
            f"{row['value']:.4f}",
            "" if row["stderr"] is None else f"{row['stderr']:.4f}",
            f"{row['mean_loops']:.2f}",
            f"{row['flops_per_token']:.3g}",
            f"{row['seconds']:.1f}",
        ])  # fmt: skip
        before = name
    figures = ("loops", "value", "± error", "mean loops", "FLOPs", "s")
    show_rows(("task", "metric", *figures), rows, right=figures)


def _next(
    document: dict[str, Any], model: str | None, adapter: str | None, settings: EvaluateConfig
) -> str:
    """Deeper where a task still gains, else a figure of what there is."""
    again = {"model": model, "adapter": adapter, "include-path": settings.include_path}
    given = "".join(f" --{flag} {quoted(value)}" for flag, value in again.items() if value)
    asked = f" --tasks {quoted(','.join(settings.names))}" if settings.names else ""
    most = max((depth for depth in settings.depths if depth != "auto"), default=0)
    gaining = [item["task"] for item in document["enough"] if item["loops"] == most]
    if gaining:
        tasks = ",".join(dict.fromkeys(gaining))
        depths = ",".join(map(str, sorted({most, most + 2, 2 * most})))
        return f"looptx evaluate{given} --tasks {quoted(tasks)} --loops {depths},auto"
    if settings.out is None:
        return f"looptx evaluate{given}{asked} --out depths.png"
    inspected = adapter or model
    given = f" --model {quoted(inspected)}" if inspected else ""
    return f"looptx inspect-loops{given} --target-loss-increase 0.5%"
