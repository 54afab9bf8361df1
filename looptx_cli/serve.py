"""looptx serve: a model behind an OpenAI-compatible address."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated, Any

import typer

from looptx_cli.console import note, stdout
from looptx_cli.imports import large_imports
from looptx_cli.model_options import Adapter, Attention, Config, Kernel, Model, Precision
from looptx_cli.options import with_fields
from looptx_core.api import load
from looptx_core.config.resolve import resolve
from looptx_core.config.serving import ServeConfig
from looptx_core.errors import MissingError

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@with_fields(ServeConfig)
def serve(
    flags: dict[str, Any],
    model: Model = None,
    adapter: Adapter = None,
    attention: Attention = "auto",
    precision: Precision = "float32",
    kernel: Kernel = "auto",
    config: Config = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Answer over HTTP as OpenAI does, each token with its loops and confidence.

    \b
    looptx serve
    looptx serve --model runs/a --port 9000
    looptx serve --adapter runs/finetune-1 --precision int8 --max-batch 32
    looptx serve --host 0.0.0.0 --api-key secret

    The address itself is a page to try the model on. Ctrl-C lets running requests finish.
    """
    settings = resolve(ServeConfig, flags=flags, config=config).build(ServeConfig)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingError(
            f"serving needs {missing[0].replace('_', '-')}; pip install 'looptx[serve]'"
        )
    with large_imports():
        loaded = load(
            model, adapter=adapter, attention=attention, precision=precision, kernel=kernel,
            batch_size=settings.max_batch, report=lambda line: note(line, quiet),
        )  # fmt: skip
        from looptx_core.serving.run import serve as run

    def announce(address: str) -> None:
        stdout().print(address, soft_wrap=True)
        note(f"try next: {_curl(address, loaded.is_chat, settings.api_key is not None)}", quiet)
        note("Ctrl-C lets running requests finish, a second one ends at once", quiet)

    run(loaded.engine, settings, chats=loaded.is_chat, announce=announce)


def _curl(address: str, chats: bool, has_key: bool) -> str:
    """A line to type that asks for an answer."""
    body: dict[str, Any] = {"prompt": "Call me", "max_tokens": 16}
    if chats:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    path = "chat/completions" if chats else "completions"
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    return (
        f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )
