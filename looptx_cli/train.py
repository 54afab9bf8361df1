"""looptx train: from tokens to a looped model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, stdout
from looptx_cli.control import show_control, train_control, with_other_text
from looptx_cli.dry_run import show_training
from looptx_cli.imports import large_imports
from looptx_cli.options import with_fields, with_set
from looptx_cli.runs import (
    last_step,
    resumed,
    run_folder,
    settle,
    settle_length,
    summary,
    write_line,
)
from looptx_core.config.model import ModelConfig, fitting_memory
from looptx_core.config.resolve import Resolved, config_file, dotted, resolve
from looptx_core.config.run import TrainConfig, continued_lr
from looptx_core.errors import UsageError
from looptx_core.words import counted, quoted

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from looptx_core.checkpoint.folder import LoadedModel
    from looptx_core.training.run import TrainResult

SECTIONS = {"model": ModelConfig}


@with_fields(TrainConfig)
def train(
    flags: dict[str, Any],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key of the configuration, as model.d_model=256; may be repeated.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="delta|infini",
            help="Remember what leaves a window of attention, which fits --seq-len; texts of any "
            "length can then be read.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run, exactly.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show size and cost only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Try what memory can't hold.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Train a looped model.

    \b
    looptx train
    looptx train --data my.txt --steps 2000 --out runs/mine
    looptx train --data data --preset small --max-minutes 60
    looptx train --set model.d_model=256 --set model.core_layers=4
    looptx train --init runs/mine --data more.txt
    looptx train --memory delta --seq-len 1024 --batch-size 8
    looptx train --resume runs/mine
    looptx train --zero3 --offload nvme
    looptx train --preset 1b --dry-run
    """
    flags = with_set(flags, set_, SECTIONS)
    if memory is not None:
        if flags.get("model.memory"):
            raise UsageError("--memory and --set model.memory say the same; leave one out")
        flags["model.memory"] = memory
    if resume is not None:
        resolved = resumed(resume, flags, "train", TrainConfig, SECTIONS, config)
    else:
        resolved = resolve(TrainConfig, SECTIONS, flags=flags, config=config)
        if resolved.values["offload"] == "nvme" and not resolved.given("preset"):
            resolved = _to_try_swapping(flags, config)
        settle_length(resolved)
        if resolved.values["model.memory"] != "none":
            fitting = fitting_memory(resolved.values["seq_len"])
            mine = {key: value for key, value in fitting.items() if not resolved.given(key)}
            resolved = settle(resolved, mine, "seq_len")
    settings = resolved.build(TrainConfig)
    until = None
    if resume is not None and not dry_run:
        until = last_step(resume, settings.steps, flags["steps"], lambda line: note(line, quiet))
        if not until:
            return
    source = _source(settings, resolved) if settings.init else None
    if source is not None:
        own = dotted(source.config.to_dict(), "model")
        own["lr"] = continued_lr(source.config.d_model)
        own = {key: value for key, value in own.items() if not resolved.given(key)}
        settings = settle(resolved, own, "`init`").build(TrainConfig)
    model_config = resolved.build(ModelConfig, "model")
    with large_imports():
        from looptx_core.parallel.plan import check_memory, plan
        from looptx_core.parallel.strategy import check_deepspeed_file
        from looptx_core.training.step_time import estimate_time

    tokenizer = source.tokenizer if source else None
    if settings.epochs is not None:
        settings, told = _in_steps(settings, model_config.vocab_size, tokenizer, until)
        settle(resolved, {"steps": settings.steps}, "`epochs`")
        note(told, quiet)
    if dry_run:
        check_deepspeed_file(settings)
        if settings.codec:
            from looptx_core.training.run import fit_vocabulary

            text = _text_vocabulary(model_config)
            model_config = fit_vocabulary(_with_codec(model_config, settings), text, False)
        found = plan(model_config, settings)
        time = estimate_time(
            model_config, settings, lambda: _time_new_model(model_config, settings, quiet),
            found.fits,
        )  # fmt: skip
        show_training(found, time, as_json)
        return
    settings.check_context(model_config.max_seq_len)
    if not force:
        check_memory(model_config, settings)

    with large_imports():
        from looptx_cli.progress import train_progress
        from looptx_core.checkpoint.weights import fingerprint
        from looptx_core.data.bundled import bundled_shards
        from looptx_core.data.records import media_named, read_records
        from looptx_core.data.resolve import resolve_data, resolve_sources
        from looptx_core.data.shards import Manifest
        from looptx_core.media.registry import MEDIA, media_for
        from looptx_core.training.run import check, fit_vocabulary, train
        from looptx_core.training.teacher import check_teacher

    inputs = (*settings.data, settings.init, settings.teacher, config_file(config),
              settings.deepspeed_config)  # fmt: skip
    run = run_folder(
        resume, settings.out, "train", overwrite, inputs, lambda line: note(line, quiet)
    )
    quiet, as_json = quiet or not run.first, as_json and run.first
    if resolved.origins["steps"] == _TRIAL:
        note("a trial of swapping: preset small for 20 steps; --preset and --steps set them", quiet)
    check(settings, run.where)
    named = {item: media_named([item]) for item in settings.data}
    records = [item for item in settings.data if named[item]]
    texts = [item for item in settings.data if not named[item]]
    for medium in (m for name, m in MEDIA.items() if any(name in some for some in named.values())):
        if medium not in media_for(model_config):
            model_config = medium.enable(model_config)
            what = f"{medium.plural}: {medium.describe(model_config)}"
            note(f"{what}; {medium.size_key} sets it", quiet)
    model_config = _with_codec(model_config, settings)
    tokenizer = source.tokenizer if source else None
    text_vocabulary = _text_vocabulary(model_config)
    by_item = settings.source_weights([bool(named[item]) for item in settings.data])
    weights: list[float] = []
    if by_item:
        weight = dict(zip(settings.data, by_item))
        weights = [*([weight[item] for item in texts] or [0.0]),
                   *(weight[item] for item in records)]  # fmt: skip
    if not texts:
        if not weights:
            note("text: the bundled one, Moby Dick, and generated lines that need depth", quiet)
        shards = [bundled_shards(text_vocabulary, tokenizer)]
    elif weights:
        shards = resolve_sources(texts, text_vocabulary, tokenizer)
    else:
        shards = [resolve_data(texts, text_vocabulary, tokenizer)]

    manifests = [Manifest.read(folder) for folder in shards]
    manifest = manifests[0]
    origin = {"data": " ".join(each.fingerprint for each in manifests),
              "tokenizer": manifest.tokenizer}  # fmt: skip
    vocabulary = manifest.vocab_size
    if source is not None:
        origin["model"] = fingerprint(source.folder)
        note(f"init: {source.name}, learning rate {settings.lr:g}", quiet)
        vocabulary = source.config.vocab_size - source.config.all_codes
    model_config = fit_vocabulary(
        model_config, vocabulary, resolved.given("model.vocab_size") and source is None
    )
    check_teacher(settings.teacher, model_config, manifest.tokenizer)
    shape = dotted(model_config.to_dict(), "model")
    if records:
        origin["media data"] = read_records(records, settings.skip_bad).fingerprint
    run.until = until
    with run:
        settled = settle(resolved, shape, "`init`" if source else "the data")
        folder = run.begin(settled, origin, lambda line: note(line, quiet))
        note(f"run: {folder}", quiet)
        result = train(
            settings,
            model_config,
            data=shards,
            records=records,
            weights=weights,
            folder=folder,
            init=source,
            resume=resume is not None,
            until=until,
            callbacks=[train_progress(until or settings.steps, quiet or as_json)],
            report=lambda line: note(line, quiet),
            watch=write_line if as_json else None,
        )
        if result is None:
            return
        result = run.finish(result)
        if settings.control:

            def again(other: TrainConfig, where: Path) -> TrainResult | None:
                return train(
                    other, model_config, data=shards, records=records, folder=where, init=source,
                    callbacks=[train_progress(other.steps, quiet or as_json)],
                    report=lambda line: note(line, quiet),
                )  # fmt: skip

            result = train_control(
                result, settings, settled, model_config, 1.0, command="train", origin=origin,
                again=again, report=lambda line: note(line, quiet),
            )  # fmt: skip
            if source is not None and settings.data:
                result = with_other_text(result, source.folder)
    folder = result.folder
    if as_json:
        write_line(summary(result))
        return
    used = [name for name in MEDIA if any(name in some for some in named.values())]
    _show_result(result, " and ".join(MEDIA[name].plural for name in used))
    there = quoted(folder)
    if settings.bitnet:
        note(f"pack it: looptx convert --to-bitnet --model {there}", quiet)
    for name in used:
        note(f"try next: looptx generate --{name} FILE --model {there} --show-iterations", quiet)
    for section, flag in (("draw", "draw drawn.png"), ("speak", "speak spoken.wav")):
        if settings.codec and getattr(model_config, section).codec:
            note(f"try next: looptx generate PROMPT --{flag} --model {there}", quiet)
    note(f'try next: looptx generate "Call me" --model {there} --show-iterations', quiet)


def _source(settings: TrainConfig, resolved: Resolved) -> LoadedModel:
    """The model that `init` names. Raises `UsageError` for a preset beside it."""
    import torch

    from looptx_core.checkpoint.folder import as_float, load_model
    from looptx_core.checkpoint.registry import resolve_model

    if resolved.given("preset"):
        raise UsageError("`init` brings the model's own shape; leave out `preset`")
    found = resolve_model(settings.init, need=frozenset({"weights"}))
    return as_float(load_model(found.folder, dtype=torch.float32))


def _in_steps(
    settings: TrainConfig, vocab_size: int, tokenizer: Tokenizer | None, until: int | None
) -> tuple[TrainConfig, str]:
    """The settings with the steps that their epochs come to, and a line that says so."""
    with large_imports():
        from looptx_core.data.batches import window_count
        from looptx_core.data.bundled import bundled_shards
        from looptx_core.data.records import media_named
        from looptx_core.data.resolve import resolve_data
        from looptx_core.data.shards import Manifest
        from looptx_core.training.epochs import epochs_told, in_steps

    if media_named(settings.data):
        raise UsageError(
            "--epochs counts passes over text, and this data has records of media beside it; "
            "give --steps"
        )
    if settings.mix:
        raise UsageError("--epochs counts passes over one text, not over a mixture; give --steps")
    if given := settings.data:
        shards = resolve_data(given, vocab_size, tokenizer)
    else:
        shards = bundled_shards(vocab_size, tokenizer)
    windows = window_count(Manifest.read(shards).splits["train"].tokens, settings.seq_len)
    settings = in_steps(settings, windows)
    return settings, epochs_told(settings, until or settings.steps, windows)


def _time_new_model(model: ModelConfig, settings: TrainConfig, quiet: bool) -> float:
    note("timing a few steps", quiet)
    with large_imports():
        from looptx_core.training.trial import time_new_model
    return time_new_model(model, settings)


def _text_vocabulary(model: ModelConfig) -> int:
    """The rows of the vocabulary before those of codes."""
    first_codes = [section.first_code for section in model.written if section.first_code]
    return min(first_codes, default=model.vocab_size)


def _with_codec(model: ModelConfig, settings: TrainConfig) -> ModelConfig:
    """The model's configuration with what its codec says."""
    if settings.codec is None:
        if model.written and not settings.init:
            raise UsageError("this model draws or speaks; give its codec by `codec`")
        if settings.direction == "write" and not model.written:
            raise UsageError("`direction` write needs a codec; give it by `codec`")
        return model
    from looptx_core.checkpoint.codec_folder import with_codec

    return with_codec(model, settings.codec)


# Layers large enough that DeepSpeed swaps them, for a few steps.
_TRIAL = "a trial of --offload nvme"
_TRIAL_VALUES = {"steps": 20, "batch_size": 8, "seq_len": 128, "val_batches": 2}


def _to_try_swapping(flags: dict[str, Any], config: Path | None) -> Resolved:
    resolved = resolve(TrainConfig, SECTIONS, flags={**flags, "preset": "small"}, config=config)
    mine = {key: value for key, value in _TRIAL_VALUES.items() if not resolved.given(key)}
    resolved.origins["preset"] = _TRIAL
    return settle(resolved, mine, _TRIAL)


def _show_result(result: TrainResult, beside: str) -> None:
    """beside: the media of the data, in words."""
    from rich.table import Table

    out = stdout()
    table = Table(title="Held-out, by loop", title_justify="left", box=None, pad_edge=False)
    table.add_column("loops", justify="right")
    table.add_column("bits per byte", justify="right")
    table.add_column("accuracy", justify="right")
    for name in result.probes:
        table.add_column(name, justify="right")
    for loop, bits in enumerate(result.bits_per_byte_by_loop):
        table.add_row(
            str(loop + 1),
            f"{bits:.4f}",
            f"{result.accuracy_by_loop[loop]:.1%}",
            *(f"{accuracy[loop]:.0%}" for accuracy in result.probes.values()),
        )
    out.print(table)
    if result.caption_loss_by_loop:
        losses = "  ".join(f"{loss:.3f}" for loss in result.caption_loss_by_loop)
        out.print(f"Texts beside {beside}, held-out nats a token by loop: {losses}", soft_wrap=True)
    rate = result.tokens / max(result.seconds, 1e-9)
    before = result.steps_before
    now = f", {result.steps - before:,} of them now:" if before else ","
    out.print(
        f"{counted(result.steps, 'step')}{now} {result.tokens:,} tokens in {result.seconds:,.0f} s "
        f"({rate:,.0f} tokens/s), {result.flops:.3g} FLOPs",
        soft_wrap=True,
    )
    if swap := result.swapped:
        out.print(
            f"swapped: {swap.files} files of {swap.size:,} bytes; {swap.written:,} bytes written, "
            f"{swap.read:,} read",
            soft_wrap=True,
        )
    out.print(result.verdict, soft_wrap=True)
    if result.control is not None:
        show_control(result)
    if result.probes:
        first = sum(a[0] for a in result.probes.values()) / len(result.probes)
        last = sum(a[-1] for a in result.probes.values()) / len(result.probes)
        out.print(
            f"On lines that need depth, one loop answers {first:.0%} and "
            f"{len(result.loss_by_loop)} loops {last:.0%}.",
            soft_wrap=True,
        )
    out.print(f"model: {result.model_folder}, curves: {result.folder / 'curves.png'}",
              soft_wrap=True)  # fmt: skip
