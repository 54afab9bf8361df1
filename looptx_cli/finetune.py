"""looptx finetune: from a trained model and examples to one that knows the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, stdout
from looptx_cli.control import show_control, train_control, with_other_text
from looptx_cli.dry_run import show_finetuning
from looptx_cli.imports import large_imports
from looptx_cli.options import with_fields
from looptx_cli.runs import (
    last_step,
    resumed,
    run_folder,
    settle,
    settle_length,
    summary,
    write_line,
)
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.resolve import Resolved, config_file, resolve
from looptx_core.words import counted, quoted

if TYPE_CHECKING:
    from looptx_core.finetuning.answers import HeldOutAnswers
    from looptx_core.finetuning.run import FinetuneResult, Prepared


@with_fields(FinetuneConfig)
def finetune(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run, exactly.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show size and cost only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Finetune a model on prompts and responses: all of it, or small adapters beside it.

    \b
    looptx finetune --lora --qlora
    looptx finetune --data qa.jsonl --model runs/a --lora
    looptx finetune --data qa.jsonl --epochs 3
    looptx finetune --data chats.parquet --qlora --quantization int8
    looptx finetune --data qa.csv --columns prompt=question --columns response=answer
    looptx finetune --data qa.jsonl --lora --dry-run
    looptx finetune --data hf:NAME --lora --seq-len 512 --too-long drop

    A line of data is {"prompt", "response"}, {"messages": [{"role", "content"}]} or {"text"}, each
    with an `image` where there are pictures; Alpaca's and ShareGPT's records are read too.
    """
    from looptx_core.checkpoint.registry import resolve_model

    if resume is not None:
        resolved = resumed(resume, flags, "finetune", FinetuneConfig, config=config)
    else:
        resolved = resolve(FinetuneConfig, flags=flags, config=config)
        settle_length(resolved)
    settings = resolved.build(FinetuneConfig)
    until = None
    if resume is not None:
        until = last_step(resume, settings.steps, flags["steps"], lambda line: note(line, quiet))
        if not until:
            return
    with large_imports():
        from looptx_core.data.bundled import bundled_questions
        from looptx_core.data.records import media_named
        from looptx_core.media.registry import MEDIA

    abilities = {MEDIA[name].ability for name in media_named(settings.data)}
    base = resolve_model(settings.model, need=frozenset({"weights", *abilities}))
    inputs = (*settings.data, settings.model, settings.teacher, base.folder,
              config_file(config), settings.deepspeed_config)  # fmt: skip
    run = run_folder(
        resume, settings.out, "finetune", overwrite, inputs, lambda line: note(line, quiet)
    )
    quiet, as_json = quiet or not run.first, as_json and run.first
    if settings.model is None:
        note(f"model: {base.folder}, {base.reason}", quiet)
    if not settings.data:
        note("data: the bundled questions on tables of arrows", quiet)
    data = list(settings.data) or [str(bundled_questions())]

    with large_imports():
        from looptx_cli.progress import train_progress
        from looptx_core.finetuning.run import finetune, prepare
        from looptx_core.training.run import check

    def report(line: str) -> None:
        note(line, quiet)

    check(settings, run.where)
    prepared = prepare(
        settings, base=base.folder, data=data, until=until, judge=not dry_run, report=report
    )
    if dry_run:
        from looptx_core.finetuning.plan import plan_finetune

        report("timing a few steps")
        show_finetuning(plan_finetune(prepared), as_json)
        return
    settle(resolved, {"model": str(base.folder.resolve())}, base.reason)
    settle(resolved, {"steps": prepared.config.steps}, "`epochs`")
    run.until = until
    with run:
        folder = run.begin(resolved, prepared.origin, report)
        note(f"run: {folder}, {settings.method}", quiet)
        result = finetune(
            prepared,
            folder=folder,
            resume=resume is not None,
            until=until,
            callbacks=[train_progress(until or prepared.config.steps, quiet or as_json)],
            report=report,
            watch=write_line if as_json else None,
        )
        if result is None:
            return
        result = run.finish(result)
        if settings.control:
            result = _with_control(result, prepared, resolved, data, quiet or as_json, report)
    folder = result.folder
    if as_json:
        write_line(summary(result))
        return
    _show(result)
    example = "map ga cc fc dd aa hb bb ed: Where ends g" if not settings.data else "..."
    flag = "--adapter" if settings.adapts else "--model"
    note(f'try next: looptx generate "{example}" {flag} {quoted(folder)} --temperature 0', quiet)


def _with_control(
    result: FinetuneResult,
    prepared: Prepared,
    resolved: Resolved,
    data: list[str],
    silent: bool,
    report: Callable[[str], object],
) -> FinetuneResult:
    """The result with what the same training without loops reached, and what both forgot."""
    from looptx_cli.progress import train_progress
    from looptx_core.finetuning.run import finetune, prepare
    from looptx_core.training.control import counted_share

    def again(settings: FinetuneConfig, folder: Path) -> FinetuneResult | None:
        other = prepare(settings, base=result.base, data=data)  # whose facts the first run has told
        progress = train_progress(settings.steps, silent)
        return finetune(other, folder=folder, callbacks=[progress], report=report)

    counted_now = counted_share(prepared.batches.train_dataloader())
    result = train_control(
        result, prepared.config, resolved, prepared.base.config, counted_now, command="finetune",
        origin=prepared.origin, again=again, report=report,
    )  # fmt: skip
    return with_other_text(result, result.base)


def _show(result: FinetuneResult) -> None:
    from rich.table import Table

    out = stdout()
    table = Table(title="Held-out responses, by loop", title_justify="left", box=None,
                  pad_edge=False)  # fmt: skip
    for name in ("loops", "loss before", "after", "accuracy before", "after"):
        table.add_column(name, justify="right")
    for loop, after in enumerate(result.loss_by_loop):
        table.add_row(
            str(loop + 1),
            f"{result.loss_by_loop_before[loop]:.3f}",
            f"{after:.3f}",
            f"{result.accuracy_by_loop_before[loop]:.1%}",
            f"{result.accuracy_by_loop[loop]:.1%}",
        )
    out.print(table)

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    share = result.trainable / result.parameters
    say(
        f"{result.method}: {counted(result.steps, 'step')} in {result.seconds:,.0f} s, "
        f"{result.trainable:,} parameters trained ({share:.1%} of the base's)"
    )
    say(f"confidence: calibration error {result.ece_before:.3f} before, {result.ece:.3f} after")
    if result.quantised_loss is not None:
        share = result.base_bytes / (2 * result.parameters)
        say(
            f"base in memory: {result.base_bytes:,} bytes, {share:.0%} of bf16; "
            f"loss {result.quantised_loss:.3f} on the quantised base, "
            f"{result.loss_by_loop[-1]:.3f} on the full-precision one, where the adapter runs"
        )
    if result.answers is not None:
        _show_answers(result.answers)
    if result.control is not None:
        show_control(result)
    what = "adapter" if (result.model_folder / "adapter_config.json").exists() else "model"
    say(f"{what}: {result.model_folder}, curves: {result.folder / 'curves.png'}")


def _show_answers(answers: HeldOutAnswers) -> None:
    """A few prompts with what was expected and given, and how many answers are exact."""
    from rich.table import Table

    out = stdout()
    table = Table(title="Held-out answers", title_justify="left", box=None, pad_edge=False)
    table.add_column("", width=1)
    for name, ratio in (("prompt", 2), ("expected", 1), ("given", 1)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for answer in answers.shown:
        texts = (answer.prompt, answer.expected, answer.given)
        table.add_row("=" if answer.exact else "x", *(_clipped(text) for text in texts))
    out.print(table)
    few = f", of {answers.of:,} held out" if answers.of > answers.records else ""
    out.print(
        f"exact match: {answers.share:.1%} of {answers.records:,} held-out answers{few}",
        soft_wrap=True,
    )


def _clipped(text: str, most: int = 120) -> str:
    """A text on one line, its middle left out where it is long: prompts often end in what is
    asked."""
    line = " ".join(text.split())
    half = most // 2
    return line if len(line) <= most else f"{line[:half]} … {line[-half:]}"
