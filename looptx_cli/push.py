"""looptx push: a model to the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from looptx_cli.console import note, stdout
from looptx_core.errors import UsageError

SCHEMA_VERSION = 1


def push(
    folder: Annotated[Path, typer.Argument(help="A run, a model folder or an adapter's.")],
    name: Annotated[str, typer.Argument(help="Where to, as hf:OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that only you can read.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="What the upload is, in a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Put a model on the Hugging Face hub.

    \b
    looptx push runs/a hf:me/looped
    looptx push runs/a hf:me/looped --private --message "600 steps"
    looptx generate "Call me" --model hf:me/looped

    Log in once by hf auth login, or set HF_TOKEN.
    """
    from looptx_core.checkpoint.hub import is_hub_name, push_model
    from looptx_core.checkpoint.registry import resolve_model

    if is_hub_name(folder):
        raise UsageError(f"{folder}: a name of the hub; give a folder, then the name")
    found = resolve_model(folder)
    done = push_model(
        found.adapter or found.folder, name, private=private, message=message,
        report=lambda line: note(line, quiet),
    )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(done)}) + "\n")
        return
    stdout().print(done.url, soft_wrap=True)
    if found.adapter:
        note(f'try next: looptx generate "Call me" --adapter {name}', quiet)
    else:
        note(f'try next: looptx generate "Call me" --model {name}', quiet)
