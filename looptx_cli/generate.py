"""looptx generate: text from a model, each token with its depth and its confidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import is_plain, note, shown, stdout
from looptx_cli.imports import large_imports
from looptx_cli.options import with_fields
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
    from looptx_core.generation.engine import ChatPrompt, Engine, Generation, Prompt, Step
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
    model: Annotated[
        str | None,
        typer.Option(
            envvar="LOOPTX_MODEL", help="A run or a model folder; absent: the newest run."
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="An adapter, or the run that made it, on its own base.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture, before the prompt or at its <|image|>; may be repeated."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="A prompt is a turn of a chat, which the model answers.")
    ] = False,
    show_iterations: Annotated[
        bool, typer.Option("--show-iterations", help="Show each token's loops and confidence.")
    ] = False,
    compare_loops: Annotated[
        str | None, typer.Option(help="Depths to show side by side, as 1,4,10.")
    ] = None,
    attention: Annotated[str, typer.Option(help="auto, sdpa, flash or explicit.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, bf16, or int8 (weights; on a CPU).")
    ] = "float32",
    kernel: Annotated[
        str,
        typer.Option(
            help="auto, native (compiled, on a CPU), graph (recorded, on a GPU) or torch."
        ),
    ] = "auto",
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Write text, each token as deep as it needs.

    \b
    looptx generate "Call me"
    looptx generate "Call me" --model runs/a --show-iterations
    looptx generate "Call me" --compare-loops 1,4,10
    looptx generate --image cat.png --show-iterations
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
    if image and len(texts) > 1:
        raise UsageError("--image goes with one prompt; give one, or none for a caption")
    if image and not texts and not chat:
        texts = [""]
    for text in texts:
        if has_half(str(text)):
            raise UsageError("a prompt is not UTF-8; convert it")
    talk = not texts and sys.stdin.isatty()
    if not texts and not talk:
        texts = [_from_stdin()]

    files = {"image": image} if image else {}
    need = frozenset(MEDIA[name].ability for name in files)
    with large_imports():
        loaded = load(
            model, adapter=adapter, attention=attention, precision=precision, kernel=kernel,
            abilities=need, report=lambda line: note(line, quiet),
        )  # fmt: skip
    engine, templated = loaded.engine, loaded.is_chat
    if chat and not templated:
        raise UsageError(
            "--chat: this model was not finetuned on chats (looptx finetune, with messages as "
            "data); leave it out, or give --model or --adapter"
        )
    items = _read_items(engine, files)
    if chat:
        texts = [_message(str(text), items) for text in texts]
    elif items and not talk:
        texts = [_with_items(str(texts[0]), items)]
    if talk:
        _chat(engine, options, quiet, templated, items)
    elif depths:
        _compare(engine, texts, options, depths, as_json)
    elif as_json:
        results = [result.to_dict() for result in engine.complete(texts, options)]
        document = results[0] if len(results) == 1 else {"results": results}
        _print(json.dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")
    elif len(texts) == 1:
        _stream(engine, texts[0], options, show_iterations, quiet)
    else:
        for text, result in zip(texts, engine.complete(texts, options)):
            _show(engine, text, result, show_iterations, quiet)


def _read_items(engine: Engine, files: Mapping[str, Sequence[Path]]) -> tuple[MediaItem, ...]:
    """The files of each medium, decoded."""
    config = engine.model.config
    return tuple(MEDIA[name].read(file, config) for name, some in files.items() for file in some)


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
    """All of standard input, without a byte order mark and the last line's end."""
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
    """Print a continuation as it comes; with `iterations` in colours over its figures."""
    from looptx_cli.render import TokenDisplay, answers_told, legend, token_line

    plain = is_plain(sys.stdout)
    deepest = engine.model.config.max_loops
    out = stdout()
    display = TokenDisplay(out, deepest, _before(engine, prompt))

    begun = False

    def watch(step: Step) -> None:
        nonlocal begun
        if not begun and not (iterations and plain):
            _print(shown(_before(engine, prompt)))  # only now: refused settings print nothing
        begun = True
        if not iterations:
            _print(shown(step.text))
        elif plain:
            _print(token_line(step) + "\n")
        else:
            display.add(step)

    (result,) = engine.complete([prompt], options, watch)
    display.close()
    _print("" if iterations else "\n")
    if iterations and not plain:
        out.print(legend(result, deepest))
    if iterations and (told := answers_told(_before(engine, prompt), result.text)):
        note(told, quiet) if plain else out.print(told)
    _summarise(engine, result, iterations, quiet)


def _before(engine: Engine, prompt: Prompt) -> str:
    """What to print before a continuation; an answer stands alone."""
    from looptx_core.generation.engine import ChatPrompt

    return "" if isinstance(prompt, ChatPrompt) else engine.text_of(prompt)


def _show(
    engine: Engine, prompt: Prompt, result: Generation, iterations: bool, quiet: bool
) -> None:
    """One of several finished requests."""
    from looptx_cli.render import token_line

    _print(shown(f"{_before(engine, prompt)}{result.text}\n"))
    if iterations:
        _print("".join(token_line(step) + "\n" for step in result.tokens))
        _summarise(engine, result, iterations, quiet)


def _summarise(engine: Engine, result: Generation, iterations: bool, quiet: bool) -> None:
    """The figures, a result where they were asked for, and what to try next."""
    deepest = engine.model.config.max_loops
    share = round(engine.compute_saved(result), 2) + 0.0  # no -0 %
    saved = f"{share:.0%} of full depth's compute saved"
    if engine.counters.drafted:
        saved = f"{engine.counters.accepted} of {engine.counters.drafted} drafts stood"
    line = (
        f"{len(result.tokens)} tokens, {result.mean_loops:.2f} loops a token of {deepest}, "
        f"{result.tokens_per_second:.0f} tokens/s, {saved}"
    )
    if iterations:
        _print(line + "\n")
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
    """Each prompt's continuation at each fixed depth."""
    from looptx_cli.render import comparison

    found = {
        loops: engine.complete(prompts, replace(options, loops=loops, prompt_loops=loops))
        for loops in depths
    }
    if as_json:
        results = [r.to_dict() | {"loops": n} for n, each in found.items() for r in each]
        _print(json.dumps({"schema_version": SCHEMA_VERSION, "results": results}) + "\n")
        return
    for number, prompt in enumerate(prompts):
        stdout().print(
            comparison(engine.text_of(prompt), {n: each[number] for n, each in found.items()})
        )


def _chat(
    engine: Engine,
    options: GenerationOptions,
    quiet: bool,
    templated: bool,
    items: tuple[MediaItem, ...],
) -> None:
    """Lines in, answers or continuations out; what was said so far is before the next.

    templated: by turns, for a model that was finetuned on chats; another one goes on with the text.
    """
    kind = "A chat" if templated else "The model was not finetuned on chats and continues the text"
    note(f"{kind}: /loops N sets the depth, /new starts afresh, Ctrl-D ends.", quiet)
    said: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            _print("\n")
            return
        if line == "/new":
            said = []
        elif line.startswith("/loops"):
            asked = line.removeprefix("/loops").strip()
            options = replace(options, loops=int(asked) if asked.isdigit() else "auto")
        elif line:
            said.append({"role": "user", "content": line})
            prompt = _conversation(engine, said, options.max_new_tokens, templated, items)
            try:
                (result,) = engine.complete(
                    [prompt], options, lambda step: _print(shown(step.text))
                )
            except UsageError as error:  # too long a line, or a depth that is not there
                note(f"looptx: {error}", False)
                said.pop()
                continue
            _print("\n")
            said.append({"role": "assistant", "content": result.text})


def _conversation(
    engine: Engine,
    said: list[dict[str, str]],
    new: int,
    templated: bool,
    items: tuple[MediaItem, ...],
) -> Prompt:
    """What was said, as a prompt that leaves room for `new` tokens; the oldest turns give way."""
    from looptx_core.generation.engine import ChatPrompt

    room = max(1, engine.model.config.max_seq_len - new)
    if not templated:
        text = "".join(turn["content"] + "\n" * (turn["role"] == "assistant") for turn in said)
        if items:
            return _with_items(text, items)
        return engine.tokenizer.encode(text, add_special_tokens=False).ids[-room:]
    while True:
        prompt = ChatPrompt(tuple(said), items)
        if len(said) < 3 or engine.length(prompt) <= room:
            return prompt
        del said[:2]


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
