"""The model card: README.md with the front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig

_FRONT_MATTER = {
    "license": "apache-2.0",
    "library_name": "looptx",
    "pipeline_tag": "text-generation",
    "tags": ["looptx", "looped-transformer", "recurrent-depth", "early-exit"],
}


def model_card(
    name: str, config: ModelConfig, parameters: int, exit: ExitSettings, facts: Mapping[str, Any]
) -> str:
    """The card's text.

    Args:
        parameters: of the model, tied ones once.
        facts: of the training, printed as they come, such as `data`, `steps`, `tokens`, `seed`,
            `command`; `loss_by_loop`, nats a token from loop 1 on, becomes a table, and a
            `license` goes to the front matter.
    """
    facts = dict(facts)
    front = {**_FRONT_MATTER, "license": facts.pop("license", _FRONT_MATTER["license"])}
    losses, command = facts.pop("loss_by_loop", None), facts.pop("command", None)
    layers = f"{config.prelude_layers} + {config.core_layers} x loops + {config.coda_layers}"
    rows = {
        "parameters": parameters,
        "blocks (prelude + core x loops + coda)": layers,
        "loops": f"1 to {config.max_loops}",
        "width": config.d_model,
        "vocabulary": config.vocab_size,
        "context, tokens": config.max_seq_len,
        "exit rule": exit.rule,
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        "A looped transformer made by looptx: its core block is run again for tokens that need "
        "more thinking.",
        '```\nlooptx generate "Call me" --model PATH_OF_THIS_FOLDER --show-iterations\n```',
        _table(("shape", ""), rows),
    ]
    if facts or losses or command:
        parts.append("## Training")
    if command:
        parts.append(f"```\n{command}\n```")
    if facts:
        parts.append(_table(("fact", ""), facts))
    if losses:
        by_loop = {str(loop): f"{loss:.4f}" for loop, loss in enumerate(losses, 1)}
        parts.append(_table(("loop", "validation loss, nats a token"), by_loop))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((key, _cell(value)) for key, value in rows.items())]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
