"""looptx generate: text from a model, each token with its depth and its confidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, shown, stdout
from looptx_cli.conversation import Conversation
from looptx_cli.drawing import SCHEMA_VERSION, draw_picture
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
)
from looptx_cli.options import with_fields
from looptx_cli.reading import reading_shown
from looptx_cli.speaking import MOST_TOKENS, check_written, speak_text
from looptx_cli.streaming import (
    given_media,
    pipe_rate,
    piped_frames,
    print_now,
    read_items,
    stream,
)
from looptx_core.api import load
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.resolve import resolve
from looptx_core.documents import (
    MOST_BYTES,
    arriving,
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
    from looptx_core.generation.transcribe import Segment
    from looptx_core.media.batch import MediaItem

_SHOWN, _END = 20_000, 400  # characters of a prompt that are shown whole, and of the end of others


@with_fields(GenerationOptions)
def generate(
    flags: dict[str, Any],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: a chat, or standard input.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line, or JSON lines with `prompt`.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="One prompt, a whole file; of any length for a model with a memory."),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    image: Image = None,
    audio: Audio = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            help="A clip, before the prompt or at its <|video|>; may be repeated. -: PNG, JPEG or "
            "PPM frames from a pipe."
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of --video -; absent: 25.")
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(help="With --video -, answer each time so many seconds of it have passed."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="A prompt is a turn of a chat, which the model answers.")
    ] = False,
    draw: Annotated[
        Path | None, typer.Option(help="Draw the prompt into this file, a PNG, JPEG or WebP.")
    ] = None,
    speak: Annotated[
        Path | None, typer.Option(help="Speak the prompt into this file, a WAV, FLAC or OGG.")
    ] = None,
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
    looptx generate "cat face" --draw drawn.png --guidance 2
    looptx generate "seven four one" --speak digits.wav
    ffmpeg -i in.mp4 -f image2pipe -c:v png - | looptx generate --video - --every 2
    looptx generate "Call me" --adapter runs/finetune-1
    looptx generate --chat "Who are you?" --adapter runs/finetune-1
    looptx generate "Call me" --json | jq .tokens[0]
    looptx generate --prompts-file prompts.txt --loops 4 --temperature 0
    looptx generate --prompt-file book.txt --model runs/with-memory
    looptx generate "Call me" --speculate 4
    """
    resolved = resolve(GenerationOptions, flags=flags, config=config)
    options = resolved.build(GenerationOptions)
    depths = _depths(compare_loops)
    texts: list[Prompt] = [*(prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if prompt_file:
        mend = "check --prompt-file"
        texts.append(read_text(prompt_file, mend=mend, pipes=True).rstrip("\n"))
    files = given_media(quiet, image=image, audio=audio, video=video)
    if timestamps and (len(audio or ()) != 1 or len(files) > 1 or texts or chat or compare_loops):
        raise UsageError("--timestamps goes with one --audio and nothing else to read")
    check_written(draw, speak, len(texts), timestamps or chat or bool(compare_loops),
                   show_iterations)  # fmt: skip
    writes = draw is not None or speak is not None
    rate = pipe_rate(files.get("video", ()), fps, every)
    if rate and chat and not texts:
        raise UsageError("--video - takes standard input, so give the message as an argument")
    if every and (len(texts) > 1 or len(files) > 1 or chat or depths or show_iterations):
        raise UsageError("--every goes with --video - and one prompt, and nothing else")
    if files and len(texts) > 1:
        flag = f"--{next(iter(files))}"
        raise UsageError(f"{flag} goes with one prompt; give one, or none for a caption")
    if (files or writes) and not texts and not chat:
        texts = [""] if files or sys.stdin.isatty() else []
    for text in texts:
        if has_half(str(text)):
            raise UsageError("a prompt is not UTF-8; convert it")
    interactive = not texts and sys.stdin.isatty()
    if not texts and not interactive:
        texts = [_from_stdin()]

    abilities = frozenset(MEDIA[name].ability for name in files)
    if draw is not None:
        abilities |= {MEDIA["image"].write_ability}
    if speak is not None:
        abilities |= {MEDIA["audio"].write_ability}
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
    if every:
        assert rate is not None
        _narrate(engine, str(texts[0]), options, rate, every, as_json)
        return
    items = read_items(engine, files, rate)
    if draw is not None:
        draw_picture(engine, str(texts[0]), items, options, draw, show_iterations, as_json, quiet)
        return
    if speak is not None:
        if not resolved.given("max_new_tokens"):
            options = replace(options, max_new_tokens=MOST_TOKENS)
        speak_text(engine, str(texts[0]), items, options, speak, show_iterations, as_json, quiet)
        return
    if chat:
        texts = [_message(str(text), items) for text in texts]
    elif items and not interactive:
        texts = [_with_items(str(texts[0]), items)]
    if interactive:
        Conversation(engine, options, templated, items, show_iterations, quiet).run()
    elif depths:
        _compare(engine, texts, options, depths, as_json)
    elif as_json:
        with reading_shown(engine, sum(map(engine.length, texts)), quiet):
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
    from looptx_core.generation.transcribe import transcribe

    _print_segments(transcribe(engine, str(file), options), as_json)


def _narrate(
    engine: Engine, prompt: str, options: GenerationOptions, fps: float, every: float, as_json: bool
) -> None:
    """What happens when, a line each time, as it is seen."""
    from looptx_core.generation.watch import narrate
    from looptx_core.media.video.frames import frames_of_pipe

    frames = frames_of_pipe(piped_frames(), fps, "standard input")
    _print_segments(narrate(engine, frames, every, prompt, min(fps, 12.5), options), as_json)


def _print_segments(segments: Iterable[Segment], as_json: bool) -> None:
    from looptx_core.generation.transcribe import joined
    from looptx_core.media.base import clock

    found = []
    for segment in segments:
        found.append(segment)
        if not as_json:
            start, end = clock(segment.start), clock(segment.end)
            print_now(shown(f"[{start} - {end}] {segment.text}\n"))
    if as_json:
        document = joined(found).to_dict()
        document["segments"] = [segment.to_dict() for segment in found]
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
    parts, size = [], 0
    for part in arriving(sys.stdin.buffer):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise DataError(f"standard input: over {MOST_BYTES:,} bytes, too large for a prompt")
    raw = b"".join(parts)
    try:
        return raw.decode("utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        kind = known_kind(raw) or f"not UTF-8 at byte {error.start}; convert it"
        raise DataError(f"standard input: {kind}") from error


def _stream(
    engine: Engine, prompt: Prompt, options: GenerationOptions, iterations: bool, quiet: bool
) -> None:
    """Print a continuation as it is generated, and its figures."""
    with reading_shown(engine, engine.length(prompt), quiet):
        result = stream(engine, prompt, options, iterations, quiet, _before(engine, prompt))
    _summarise(engine, result, iterations, quiet)


def _before(engine: Engine, prompt: Prompt) -> str:
    """The text to print before a continuation, of a long one the end; of a chat nothing."""
    from looptx_core.generation.engine import ChatPrompt

    text = "" if isinstance(prompt, ChatPrompt) else engine.text_of(prompt)
    return text if len(text) <= _SHOWN else "…" + text[-_END:]


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
        some = ",".join(str(depth) for depth in sorted({1, 4, deepest}) if depth <= deepest)
        note(f"try next: --compare-loops {some}, or --exit gain", quiet)
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
