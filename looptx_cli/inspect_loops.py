"""looptx inspect-loops: what each loop brings, whom to believe, when to stop."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import is_plain, note, stdout
from looptx_cli.imports import large_imports
from looptx_cli.options import with_fields
from looptx_cli.streaming import given_media
from looptx_core.config.inspection import BRIEF, InspectConfig
from looptx_core.config.resolve import config_file, resolve
from looptx_core.documents import printable
from looptx_core.media.registry import MEDIA
from looptx_core.words import quoted

if TYPE_CHECKING:
    from looptx_core.checkpoint.folder import LoadedModel
    from looptx_core.data.datamodule import Batches


@with_fields(InspectConfig)
def inspect_loops(
    flags: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Option(
            envvar="LOOPTX_MODEL", help="A run or a model folder; absent: the newest run."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Look into the loops: what each brings, the confidence, the exits, a text in detail.

    \b
    looptx inspect-loops
    looptx inspect-loops --model runs/a --out report
    looptx inspect-loops --model runs/a --calibrate --target-loss-increase 0.5%
    looptx inspect-loops --prompt "Call me"
    looptx inspect-loops --image cat.png
    looptx inspect-loops --audio hello.wav
    """
    resolved = resolve(InspectConfig, flags=flags, config=config)
    settings = resolved.build(InspectConfig)
    looked_at = settings.text or settings.prompt or settings.media
    if looked_at and not any(map(resolved.given, ("data", "calibrate", "target_loss_increase"))):
        brief: dict[str, Any] = {k: v for k, v in BRIEF.items() if not resolved.given(k)}
        settings = replace(settings, **brief)
        if brief:
            flags_of = " and ".join(f"--{key.replace('_', '-')}" for key in brief)
            note(f"held-out data is measured in brief beside it; set {flags_of} for more", quiet)
    shown = given_media(quiet, **{name: map(Path, f) for name, f in settings.media.items()})
    found_media: dict[str, Any] = {name: tuple(map(str, f)) for name, f in shown.items()}
    settings = replace(settings, **found_media)

    from looptx_core.checkpoint.registry import next_run_dir, numbered, resolve_model

    found = resolve_model(model, need=frozenset(MEDIA[m].ability for m in settings.media))
    if model is None:
        note(f"model: {found.folder}, {found.reason}", quiet)
    next_run_dir(
        settings.out, "inspect-loops", overwrite,
        inputs=(
            *settings.data, *(file for files in settings.media.values() for file in files), model,
            found.folder, found.adapter, config_file(config),
        ),
        report=lambda line: note(line, quiet),
    )  # fmt: skip

    with large_imports():
        from looptx_core.checkpoint.folder import update_generation_config
        from looptx_core.finetuning.load import load_resolved
        from looptx_core.inspection.page import headline, sentences
        from looptx_core.inspection.report import inspect_loops, write_report
        from looptx_core.machine.device import best_device

    loaded = load_resolved(found, device=best_device())
    own = found.adapter or found.folder
    data, name = _data(settings, loaded, own, quiet)
    document, exit_settings = inspect_loops(
        loaded, data, settings, report=lambda line: note(line, quiet), name=name
    )
    with numbered(settings.out, "inspect-loops") as folder:
        write_report(document, folder)
    if settings.calibrate or settings.target_loss_increase:
        update_generation_config(own, exit_settings)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        return
    out = stdout()
    out.print(headline(document), soft_wrap=True)
    _show(document)
    for sentence in sentences(document):
        out.print(sentence, soft_wrap=True)
    if settings.calibrate or settings.target_loss_increase:
        out.print(
            f"{own}: temperature {exit_settings.temperature:.3f}, offset "
            f"{exit_settings.confidence_offset:.3f}, calibrated gains and "
            f"the exit {exit_settings.rule} with the cache policy {exit_settings.kv_policy} "
            "are the model's own now.",
            soft_wrap=True,
        )
    out.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    given = f" --model {quoted(model)}" if model else ""
    if not (settings.text or settings.prompt):
        note(f'try next: looptx inspect-loops{given} --prompt "Call me"', quiet)
    else:
        note(f"try next: looptx inspect-loops{given} --target-loss-increase 0.5%", quiet)


def _data(
    settings: InspectConfig, loaded: LoadedModel, folder: Path, quiet: bool
) -> tuple[Path | Batches, str]:
    """What was asked for, else the model's own data, text or records, else the bundled text; and
    the name of records."""
    from looptx_core.data.own import OwnData, open_data, own_data, text_shards
    from looptx_core.data.resolve import resolve_data

    if settings.data:
        return resolve_data(list(settings.data), tokenizer=loaded.tokenizer), ""
    own = own_data(folder, loaded.facts)
    if own is not None and not own.missing:
        if own.kind == "records" or own.media:
            note(f"data: the model's own held-out records, {own.name}", quiet)
            batches = open_data(
                own, loaded.tokenizer, loaded.config, seq_len=settings.seq_len,
                rows=settings.batch_size, batches=1, val_batches=settings.val_batches,
                chat=loaded.chat, end=loaded.end, held_out_only=True,
                report=lambda line: note(line, quiet),
            )  # fmt: skip
            return batches, own.name
        what = ", ".join(own.inputs)
        mine = f"the model's own validation split, {what}"
        split = mine if what else "the bundled text's validation split"
        note(f"data: {split}", quiet)
        return text_shards(own, loaded.tokenizer), ""
    lack = "are not known" if own is None else f"are gone: {', '.join(own.missing)}"
    note(f"data: the bundled text's validation split; this model's own data {lack}", quiet)
    return text_shards(OwnData("text"), loaded.tokenizer), ""


def _show(document: dict[str, Any]) -> None:
    from rich.table import Table

    from looptx_core.inspection import written

    out = stdout()

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            made.add_column(column, justify="right")
        return made

    tasks = document["tasks"]
    by_loop = table(
        f"Held-out, {document['tokens']:,} tokens", "loops", "bits per byte", "accuracy",
        "mended", "broken", "ECE", "AUROC",
    )  # fmt: skip
    for i, bits in enumerate(document["bits_per_byte_by_loop"]):
        judged = document["confidence_by_loop"][i]
        by_loop.add_row(
            str(i + 1),
            f"{bits:.4f}",
            f"{document['accuracy_by_loop'][i]:.1%}",
            f"{document['fixed_by_loop'][i - 1]:.2%}" if i else "",
            f"{document['broken_by_loop'][i - 1]:.2%}" if i else "",
            f"{judged['ece']:.3f}",
            "" if judged["auroc"] is None else f"{judged['auroc']:.3f}",
        )
    out.print(by_loop)
    if tasks:
        lines = table("Accuracy on lines that need depth", "loops", *(t["name"] for t in tasks))
        for i in range(document["loops"]):
            lines.add_row(str(i + 1), *(f"{task['accuracy_by_loop'][i]:.0%}" for task in tasks))
        lines.add_row("by the exit", *(f"{task['accuracy']:.0%}" for task in tasks))
        lines.add_row("mean loops", *(f"{task['mean_loops']:.2f}" for task in tasks))
        out.print(lines)
    if policies := document["kv_policies"]:
        title = f"The cache under real exits, {policies[0]['tokens']:,} tokens"
        cache = table(
            title, "policy", "exit", "loss", "with full cache", "accuracy", "with full cache",
            "loops", "bytes a token", "tokens/s",
        )  # fmt: skip
        cache.columns[1].no_wrap = True  # "fixed at 2"
        for row in policies:
            cache.add_row(
                row["policy"],
                row["exit"],
                f"{row['loss']:.4f}",
                f"{row['loss_with_full_cache']:.4f}",
                f"{row['accuracy']:.1%}",
                f"{row['accuracy_with_full_cache']:.1%}",
                f"{row['mean_loops']:.2f}",
                f"{row['bytes_per_token']:,}",
                f"{row['tokens_per_second']:.0f}",
            )
        out.print(cache)
    if memory := document["memory"]:
        heads = range(len(memory["gates"][0]))
        gates = table("Gates of the memory", "layer", *(f"head {head + 1}" for head in heads))
        for layer, shares in enumerate(memory["gates"], 1):
            gates.add_row(str(layer), *(f"{share:.0%}" for share in shares))
        out.print(gates)
        losses = table("Loss by position", "from token", "with memory", "without it")
        for row in zip(memory["positions"], memory["loss"], memory["loss_without"]):
            losses.add_row(f"{row[0]:,}", *(f"{loss:.4f}" for loss in row[1:]))
        out.print(losses)
    for medium in MEDIA.values():
        for item in document[medium.plural]:
            for line in medium.lines(item):
                out.print(line, highlight=False, soft_wrap=True)
    for item in document["written"]:
        for line in written.lines(item):
            out.print(line, highlight=False, soft_wrap=True)
    if document["trace"]:
        _show_trace(document["trace"]["tokens"], document["loops"])


def _show_trace(tokens: list[dict[str, Any]], deepest: int) -> None:
    from rich.text import Text

    from looptx_cli.render import depth_colour

    out = stdout()
    if not is_plain(sys.stdout):
        text = Text()
        for token in tokens:
            text.append(
                printable(token["text"], keep="\n\t"), style=depth_colour(token["loops"], deepest)
            )
        out.print(text)
    for token in tokens:
        first, last = token["top"][0][0], token["top"][-1][0]
        flips = f", changed at {', '.join(map(str, token['flips']))}" if token["flips"] else ""
        moved = " ".join(repr(tokens[place]["text"]) for place, _ in token["influences"][:3])
        out.print(
            f"{token['loops']:>3} {token['confidence']:5.3f} {token['text']!r} -> {first[0]!r} "
            f"{first[1]:.0%} .. {last[0]!r} {last[1]:.0%}{flips}; by {moved}",
            soft_wrap=True,
        )
