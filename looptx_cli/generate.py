"""looptx generate: text from a model, each token with its depth and its confidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, shown, stdout
from looptx_cli.conversation import Conversation
from looptx_cli.imports import large_imports
from looptx_cli.model_options import (
    Adapter,
    Attention,
    Audio,
    Config,
    Image,
    Kernel,
    Model,
    Precision,
    ShowIterations,
    Video,
)
from looptx_cli.options import with_fields
from looptx_cli.streaming import given_media, print_now, read_items, stream
from looptx_core.api import load
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.resolve import resolve
from looptx_core.documents import (
    MOST_BYTES,
    has_half,
    known_kind,
    lines_of,
    read_json_lines,
    read_text,
)
from looptx_core.errors import DataError, UsageError
from looptx_core.media.registry import MEDIA

if TYPE_CHECKING:
    from looptx_core.generation.engine import ChatPrompt, Engine, Generation, Prompt
    from looptx_core.media.batch import MediaItem

SCHEMA_VERSION = 1


@with_fields(GenerationOptions)
def generate(
    flags: dict[str, Any],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: a chat, or standard input.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line, or JSON lines with `prompt`.")
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    image: Image = None,
    audio: Audio = None,
    video: Video = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="A prompt is a turn of a chat, which the model answers.")
    ] = False,
    timestamps: Annotated[
        bool,
        typer.Option(
            "--timestamps", help="Hear a recording of any length in pieces, each with its times."
        ),
    ] = False,
    show_iterations: ShowIterations = False,
    compare_loops: Annotated[
        str | None, typer.Option(help="Depths to show side by side, as 1,4,10.")
    ] = None,
    attention: Attention = "auto",
    precision: Precision = "float32",
    kernel: Kernel = "auto",
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Write text, each token as deep as it needs.

    \b
    looptx generate "Call me"
    looptx generate "Call me" --model runs/a --show-iterations
    looptx generate "Call me" --compare-loops 1,4,10
    looptx generate --image cat.png --show-iterations
    looptx generate --audio hello.wav
    looptx generate --audio talk.mp3 --timestamps
    looptx generate --video wave.webp
    looptx generate "Call me" --adapter runs/finetune-1
    looptx generate --chat "Who are you?" --adapter runs/finetune-1
    looptx generate "Call me" --json | jq .tokens[0]
    looptx generate --prompts-file prompts.txt --loops 4 --temperature 0
    looptx generate "Call me" --speculate 4
    """
    resolved = resolve(GenerationOptions, flags=flags, config=config)
    options = resolved.build(GenerationOptions)
    depths = _depths(compare_loops)
    texts: list[Prompt] = [*(prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    files = given_media(image=image, audio=audio, video=video)
    if timestamps and (len(audio or ()) != 1 or len(files) > 1 or texts or chat or compare_loops):
        raise UsageError("--timestamps goes with one --audio and nothing else to read")
    if files and len(texts) > 1:
        flag = f"--{next(iter(files))}"
        raise UsageError(f"{flag} goes with one prompt; give one, or none for a caption")
    if files and not texts and not chat:
        texts = [""]
    for text in texts:
        if has_half(str(text)):
            raise UsageError("a prompt is not UTF-8; convert it")
    interactive = not texts and sys.stdin.isatty()
    if not texts and not interactive:
        texts = [_from_stdin()]

    abilities = frozenset(MEDIA[name].ability for name in files)
    with large_imports():
        loaded = load(
            model, adapter=adapter, attention=attention, precision=precision, kernel=kernel,
            abilities=abilities, report=lambda line: note(line, quiet),
        )  # fmt: skip
    engine, templated = loaded.engine, loaded.is_chat
    if chat and not templated:
        raise UsageError(
            "--chat: this model was not finetuned on chats (looptx finetune, with messages as "
            "data); leave it out, or give --model or --adapter"
        )
    if timestamps:
        _transcribe(engine, files["audio"][0], options, as_json)
        return
    items = read_items(engine, files)
    if chat:
        texts = [_message(str(text), items) for text in texts]
    elif items and not interactive:
        texts = [_with_items(str(texts[0]), items)]
    if interactive:
        Conversation(engine, options, templated, items, show_iterations, quiet).run()
    elif depths:
        _compare(engine, texts, options, depths, as_json)
    elif as_json:
        results = [result.to_dict() for result in engine.complete(texts, options)]
        document = results[0] if len(results) == 1 else {"results": results}
        print_now(json.dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")
    elif len(texts) == 1:
        _stream(engine, texts[0], options, show_iterations, quiet)
    else:
        for text, result in zip(texts, engine.complete(texts, options)):
            _show(engine, text, result, show_iterations, quiet)


def _transcribe(engine: Engine, file: Path, options: GenerationOptions, as_json: bool) -> None:
    """What is said when, a line a piece, as it is heard."""
    from looptx_core.generation.transcribe import joined, transcribe
    from looptx_core.media.base import clock

    segments = []
    for segment in transcribe(engine, str(file), options):
        segments.append(segment)
        if not as_json:
            start, end = clock(segment.start), clock(segment.end)
            print_now(shown(f"[{start} - {end}] {segment.text}\n"))
    if as_json:
        document = joined(segments).to_dict()
        document["segments"] = [segment.to_dict() for segment in segments]
        print_now(json.dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")


def _with_items(text: str, items: tuple[MediaItem, ...]) -> Prompt:
    from looptx_core.generation.engine import MediaPrompt

    return MediaPrompt(text, items)


def _message(text: str, items: tuple[MediaItem, ...]) -> ChatPrompt:
    from looptx_core.generation.engine import ChatPrompt

    return ChatPrompt(({"role": "user", "content": text},), items)


def _depths(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        depths = [int(part) for part in text.split(",")]
    except ValueError:
        depths = [0]
    if min(depths) < 1:
        raise UsageError(f"--compare-loops {text}: give depths from 1 up, as in 1,4,10")
    return depths


def _read_prompts(file: Path) -> list[str]:
    mend = "check --prompts-file"
    if not file.exists():
        raise DataError(f"{file}: no such file; {mend}")
    if file.suffix in (".jsonl", ".ndjson"):
        prompts = [_prompt_of(where, value) for where, value in read_json_lines(file, mend=mend)]
    else:
        prompts = [line for line in lines_of(read_text(file, mend=mend, pipes=True)) if line]
    if not prompts:
        raise DataError(f"{file}: holds no prompts; write one a line")
    return prompts


def _prompt_of(where: str, value: Any) -> str:
    match value:
        case {"prompt": str(prompt)}:
            return prompt
    raise DataError(f'{where}: expected a line such as {{"prompt": "…"}}')


def _from_stdin() -> str:
    """All of standard input, without a byte order mark and the last newline."""
    raw = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise DataError(f"standard input: over {MOST_BYTES:,} bytes, too large for a prompt")
    try:
        return raw.decode("utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        kind = known_kind(raw) or f"not UTF-8 at byte {error.start}; convert it"
        raise DataError(f"standard input: {kind}") from error


def _stream(
    engine: Engine, prompt: Prompt, options: GenerationOptions, iterations: bool, quiet: bool
) -> None:
    """Print a continuation as it is generated, and its figures."""
    result = stream(engine, prompt, options, iterations, quiet, _before(engine, prompt))
    _summarise(engine, result, iterations, quiet)


def _before(engine: Engine, prompt: Prompt) -> str:
    """The text to print before a continuation; nothing before a chat's answer."""
    from looptx_core.generation.engine import ChatPrompt

    return "" if isinstance(prompt, ChatPrompt) else engine.text_of(prompt)


def _show(
    engine: Engine, prompt: Prompt, result: Generation, iterations: bool, quiet: bool
) -> None:
    """Print one of several finished requests."""
    from looptx_cli.render import token_line

    print_now(shown(f"{_before(engine, prompt)}{result.text}\n"))
    if iterations:
        print_now("".join(token_line(step) + "\n" for step in result.tokens))
        _summarise(engine, result, iterations, quiet)


def _summarise(engine: Engine, result: Generation, iterations: bool, quiet: bool) -> None:
    """Print the figures and what to try next; to stdout with --show-iterations, else as a note."""
    from looptx_cli.render import compute_told
    from looptx_core.words import counted

    deepest = engine.model.config.max_loops
    saved = compute_told(engine.compute_saved(result))
    if engine.counters.drafted:
        saved = f"{engine.counters.accepted} of {engine.counters.drafted} drafts stood"
    count = counted(len(result.tokens), "token")
    line = (
        f"{count}, {result.mean_loops:.2f} loops a token of {deepest}, "
        f"{result.tokens_per_second:.0f} tokens/s, {saved}"
    )
    if iterations:
        print_now(line + "\n")
        note(f"try next: --compare-loops 1,4,{deepest}, or --exit gain", quiet)
    else:
        note(line, quiet)
        note("try next: --show-iterations", quiet)


def _compare(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    depths: list[int],
    as_json: bool,
) -> None:
    """Print each prompt's continuation at each fixed depth."""
    from looptx_cli.render import comparison

    found = {
        loops: engine.complete(prompts, replace(options, loops=loops, prompt_loops=loops))
        for loops in depths
    }
    if as_json:
        results = [r.to_dict() | {"loops": n} for n, each in found.items() for r in each]
        print_now(json.dumps({"schema_version": SCHEMA_VERSION, "results": results}) + "\n")
        return
    for number, prompt in enumerate(prompts):
        stdout().print(
            comparison(engine.text_of(prompt), {n: each[number] for n, each in found.items()})
        )
