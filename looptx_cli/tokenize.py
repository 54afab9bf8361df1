"""looptx tokenize: text to a tokenizer and packed shards; pictures or speech to a codec."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from looptx_cli.console import note, stderr, stdout
from looptx_cli.imports import large_imports
from looptx_cli.options import with_set
from looptx_cli.runs import settle
from looptx_core.config.codec import SHAPES, CodecConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.resolve import Resolved, config_file, field_help, resolve
from looptx_core.errors import UsageError
from looptx_core.words import counted, quoted

SCHEMA_VERSION = 1
SECTIONS = {"codec_model": CodecConfig}
_HELP = field_help(TokenizeConfig)
_STAGES = {"read": "Reading the text", "encode": "Encoding"}
_LINE_EVERY = 10.0  # seconds between plain lines of progress

Progress = Callable[[str, int, int | None], None]


def tokenize(
    inputs: Annotated[list[str] | None, typer.Argument(help=_HELP["data"])] = None,
    data: Annotated[list[str] | None, typer.Option(help="The same as INPUTS.")] = None,
    out: Annotated[str | None, typer.Option(help=_HELP["out"])] = None,
    vocab_size: Annotated[int | None, typer.Option(help=_HELP["vocab_size"])] = None,
    tokenizer: Annotated[str | None, typer.Option(help=_HELP["tokenizer"])] = None,
    val_fraction: Annotated[float | None, typer.Option(help=_HELP["val_fraction"])] = None,
    text_key: Annotated[str | None, typer.Option(help=_HELP["text_key"])] = None,
    seed: Annotated[int | None, typer.Option(help=_HELP["seed"])] = None,
    codec: Annotated[
        str | None, typer.Option(help=_HELP["codec"], metavar="picture|speech")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=_HELP["steps"])] = None,
    max_minutes: Annotated[float | None, typer.Option(help=_HELP["max_minutes"])] = None,
    batch_size: Annotated[int | None, typer.Option(help=_HELP["batch_size"])] = None,
    lr: Annotated[float | None, typer.Option(help=_HELP["lr"])] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key of a codec's shape, as codec_model.levels=8,6,5; may be repeated.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Turn text into tokens: a byte-level BPE vocabulary and packed shards.

    With --codec, train a codec instead, which turns pictures or speech into codes.

    \b
    looptx tokenize
    looptx tokenize corpus/*.txt --vocab-size 4096 --out data
    looptx tokenize talks.jsonl --text-key body --tokenizer data
    cat notes.txt | looptx tokenize - --json
    looptx tokenize --codec picture drawings/ --out codecs/drawings
    looptx tokenize --codec speech talks.jsonl --out codecs/talks

    Takes text, JSON lines, Parquet, folders, globs and standard input.
    """
    from looptx_core.checkpoint.registry import next_run_dir, numbered
    from looptx_core.data.bundled import add_bundled_probes, bundled_corpus
    from looptx_core.data.shard_writer import tokenize_corpus
    from looptx_core.data.tokenizer import load_tokenizer

    flags = {
        "data": [*(inputs or []), *(data or [])],
        "out": out,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "text_key": text_key,
        "seed": seed,
        "codec": codec,
        "steps": steps,
        "max_minutes": max_minutes,
        "batch_size": batch_size,
        "lr": lr,
    }
    flags = with_set(flags, set_, SECTIONS)
    resolved = resolve(TokenizeConfig, SECTIONS, flags=flags, config=config)
    settings = resolved.build(TokenizeConfig)
    if settings.codec:
        _train_codec(resolved, settings, config_file(config), overwrite, as_json, quiet)
        return
    for name in ("steps", "max_minutes", "batch_size", "lr"):
        if flags[name] is not None:
            raise UsageError(f"`{name}` is of a codec's training; add `codec` picture or speech")
    if settings.tokenizer and vocab_size:
        raise UsageError("--tokenizer brings its own vocabulary; leave --vocab-size out")
    next_run_dir(
        settings.out, "tokenize", overwrite,
        inputs=(*settings.data, settings.tokenizer, config_file(config)),
        report=lambda line: note(line, quiet),
    )  # fmt: skip
    if not settings.data:
        note("data: the bundled text, Moby Dick, and generated lines that need depth", quiet)

    started = time.perf_counter()
    with numbered(settings.out, "tokenize") as folder, _progress(quiet) as on_progress:
        manifest = tokenize_corpus(
            settings.data or [str(bundled_corpus())],
            folder,
            vocab_size=settings.vocab_size,
            tokenizer=load_tokenizer(settings.tokenizer) if settings.tokenizer else None,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
            text_key=settings.text_key,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if not settings.data:
        add_bundled_probes(folder)
    seconds = time.perf_counter() - started

    if as_json:
        report = {
            "schema_version": SCHEMA_VERSION,
            "documents": manifest.documents,
            "bytes": manifest.bytes,
            "tokens": manifest.tokens,
            "bytes_per_token": manifest.bytes_per_token,
            "vocab_size": manifest.vocab_size,
            "out": str(folder),
        }
        typer.echo(json.dumps(report))
        return
    splits = ", ".join(f"{name} {counts.tokens:,}" for name, counts in manifest.splits.items())
    stdout().print(
        f"{counted(manifest.documents, 'document')}, {manifest.bytes:,} bytes -> "
        f"{counted(manifest.tokens, 'token')} "
        f"({splits}), {manifest.bytes_per_token:.2f} bytes a token, "
        f"vocabulary {manifest.vocab_size:,}, {seconds:.1f} s -> {folder}",
        soft_wrap=True,
    )
    note(f"try next: looptx train --data {quoted(folder)}", quiet)


def _train_codec(
    resolved: Resolved,
    settings: TokenizeConfig,
    file: str | Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a codec and print how good it is."""
    from looptx_core.checkpoint.registry import next_run_dir, numbered

    kind = resolved.values["codec_model.kind"] = settings.codec
    fitting = {
        key: value for name, value in SHAPES[str(kind)].items()
        if not resolved.given(key := f"codec_model.{name}")
    }  # fmt: skip
    shape = settle(resolved, fitting, f"codec {kind}").build(CodecConfig, "codec_model")
    is_speech = kind == "speech"
    next_run_dir(
        settings.out, "codec", overwrite, inputs=(*settings.data, file),
        report=lambda line: note(line, quiet),
    )  # fmt: skip
    with large_imports():
        from looptx_core.training.tokenize_codec import make_codec
    plural = "recordings" if is_speech else "pictures"
    told = _codec_progress(quiet, f"Reading {plural}")
    with numbered(settings.out, "codec") as folder, told as on_progress:
        report, fingerprint = make_codec(settings, shape, folder, on_progress)
    if as_json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "codec": settings.codec,
            "codes": shape.codes,
            "tokens": shape.rows * shape.columns,
            "bits": report.bits,
            "psnr": {str(steps): value for steps, value in report.psnr.items()},
            "psnr_by_loop": report.psnr_by_loop,
            "mel_error": {str(steps): value for steps, value in report.mel_error.items()},
            "codes_used": report.codes_used,
            "held_out": report.held_out,
            "steps": report.steps,
            "seconds": report.seconds,
            "fingerprint": fingerprint,
            "out": str(folder),
        }
        typer.echo(json.dumps(document))
        return
    found = report.mel_error or report.psnr
    by_steps = ", ".join(f"{v:.2f} dB in {n} step{'s' * (n > 1)}" for n, v in found.items())
    by_loop = "  ".join(f"{value:.2f}" for value in report.psnr_by_loop)
    out = stdout()
    out.print(
        f"{report.held_out:,} held-out "
        f"{'stretches: mels off by' if is_speech else 'pictures: PSNR'} "
        f"{by_steps}; PSNR by loop in one step: {by_loop}",
        soft_wrap=True,
    )
    out.print(
        f"{report.bits / shape.bits:.0f} codes of {shape.codes:,} a "
        f"{'second' if is_speech else 'picture'}, {report.bits:.0f} bits; "
        f"{report.codes_used:.0%} of the codes used; {report.steps:,} steps in "
        f"{report.seconds:,.0f} s -> {folder}",
        soft_wrap=True,
    )
    texts = f"{plural.upper()}_WITH_TEXTS"
    note(f"try next: looptx train --codec {quoted(folder)} --data {texts}", quiet)


@contextmanager
def _codec_progress(
    quiet: bool, reading: str
) -> Iterator[Callable[[str, int, int, float | None], object]]:
    """A bar on a terminal, else a plain line every few seconds."""
    texts = {"read": reading, "train": "Training the codec"}
    console = stderr()
    if not quiet and console.is_terminal:
        from rich.progress import Progress as Bars

        with Bars(console=console, transient=True) as bars:
            tasks = {stage: bars.add_task(text, start=False) for stage, text in texts.items()}

            def show(stage: str, done: int, of: int, loss: float | None) -> None:
                bars.start_task(tasks[stage])
                told = texts[stage] if loss is None else f"{texts[stage]}, loss {loss:.3f}"
                bars.update(tasks[stage], completed=done, total=of, description=told)

            yield show
        return
    last = 0.0

    def tell(stage: str, done: int, of: int, loss: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if not quiet and now - last >= _LINE_EVERY:
            last = now
            told = "" if loss is None else f", loss {loss:.3f}"
            note(f"{texts[stage]}: {done:,} of {of:,}{told}")

    yield tell


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on a terminal, else a plain line for each stage and then every few seconds."""
    console = stderr()
    if quiet:
        yield None
    elif console.is_terminal:
        from rich.progress import Progress as Bars

        with Bars(console=console, transient=True) as bars:
            tasks = {stage: bars.add_task(text, start=False) for stage, text in _STAGES.items()}

            def show(stage: str, done: int, total: int | None) -> None:
                bars.start_task(tasks[stage])
                bars.update(tasks[stage], completed=done, total=total)

            yield show
    else:
        last: dict[str, float] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            now = time.monotonic()
            if now - last.get(stage, -_LINE_EVERY) >= _LINE_EVERY:
                last[stage] = now
                of = f" of {total / 1e6:.1f}" if total else ""
                note(f"{_STAGES[stage]}: {done / 1e6:.1f}{of} MB")

        yield tell
