"""looptx chat: talk with a model on the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from looptx_cli.console import note
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
from looptx_cli.streaming import given_media, read_items
from looptx_core.api import load
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.resolve import resolve
from looptx_core.media.registry import MEDIA


@with_fields(GenerationOptions)
def chat(
    flags: dict[str, Any],
    model: Model = None,
    adapter: Adapter = None,
    image: Image = None,
    audio: Audio = None,
    video: Video = None,
    system: Annotated[str, typer.Option(help="What the model is told before the chat.")] = "",
    show_iterations: ShowIterations = False,
    attention: Attention = "auto",
    precision: Precision = "float32",
    kernel: Kernel = "auto",
    config: Config = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Talk with a model; /help in the chat shows what can be typed.

    \b
    looptx chat
    looptx chat --adapter runs/finetune-1 --show-iterations
    looptx chat --model runs/a --system "Answer in one word." --loops 4
    echo "Who are you?" | looptx chat --quiet
    """
    options = resolve(GenerationOptions, flags=flags, config=config).build(GenerationOptions)
    files = given_media(quiet, image=image, audio=audio, video=video)
    with large_imports():
        loaded = load(
            model, adapter=adapter, attention=attention, precision=precision, kernel=kernel,
            abilities=frozenset(MEDIA[name].ability for name in files),
            report=lambda line: note(line, quiet),
        )  # fmt: skip
    Conversation(
        loaded.engine,
        options,
        templated=loaded.is_chat,
        items=read_items(loaded.engine, files),
        iterations=show_iterations,
        quiet=quiet,
        system=system,
    ).run()
