"""The model card: README.md with the front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import STORED_AS, ModelConfig
from looptx_core.documents import read_text
from looptx_core.words import counted

_FRONT_MATTER = {
    "license": "apache-2.0",
    "library_name": "looptx",
    "pipeline_tag": "text-generation",
    "tags": ["looptx", "looped-transformer", "recurrent-depth"],
}
_EARLY_EXIT = "early-exit"  # a tag

_LONGEST = 100  # characters of a license's name
UNKNOWN = "unknown"
"""The license of a model of others that names none."""


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    exit: ExitSettings,
    facts: Mapping[str, Any],
    depth: int | None = None,
) -> str:
    """The card's text.

    Args:
        parameters: of the model, tied ones once.
        facts: of the training, printed as they come, such as `data`, `steps`, `tokens`, `seed`,
            `command`; `loss_by_loop`, nats a token from loop 1 on, becomes a table, and a
            `license` goes to the front matter.
        depth: the loops that each token runs, in a format without exits; None: the exit decides.
    """
    facts = dict(facts)
    front = {**_FRONT_MATTER, "license": facts.pop("license", _FRONT_MATTER["license"])}
    if depth is None:
        front["tags"] = [*_FRONT_MATTER["tags"], _EARLY_EXIT]
        does = "its core block is run again for tokens that need more thinking."
    else:
        does = f"its core block is run {counted(depth, 'time')} for every token."
    lineage = lineage_table(facts.pop("lineage", None))
    losses, command = facts.pop("loss_by_loop", None), facts.pop("command", None)
    repeated = f"{config.core_layers} x {depth or 'loops'}"
    layers = f"{config.prelude_layers} + {repeated} + {config.coda_layers}"
    rows = {
        "parameters": parameters,
        "blocks (prelude + core x loops + coda)": layers,
        "loops": depth or f"1 to {config.max_loops}",
        "width": config.d_model,
        "vocabulary": config.vocab_size,
        "context, tokens": config.max_seq_len,
        **({} if depth else {"exit rule": exit.rule}),
        **({"weights": STORED_AS[config.linear]} if config.linear in STORED_AS else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"A looped transformer made by looptx: {does}",
        '```\nlooptx generate "Call me" --model PATH_OF_THIS_FOLDER --show-iterations\n```',
        _table(("shape", ""), rows),
    ]
    if facts or losses or command:
        parts.append("## Training")
    if command:
        parts.append(f"```\n{command}\n```")
    if facts:
        parts.append(_table(("fact", ""), facts))
    if lineage:
        parts.append(lineage)
    if losses:
        by_loop = {str(loop): f"{loss:.4f}" for loop, loss in enumerate(losses, 1)}
        parts.append(_table(("loop", "validation loss, nats a token"), by_loop))
    return "\n\n".join(parts) + "\n"


def descended(
    facts: Mapping[str, Any], base: str, kept: Mapping[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """The facts of a model that was made from another, whose data and steps are not its own.

    Args:
        facts: of the base; they become the last entry of `lineage`, the oldest model's comes first.
        base: the base's name.
        kept: facts that hold for both.
        own: what was done to make it, such as `method`, `data` and `steps`.
    """
    told = {
        key: facts[key] for key in ("method", "data", "steps", "tokens", "seed") if key in facts
    }
    before = facts.get("lineage")
    line = [*(before if isinstance(before, list) else []), {"name": base, **told}]
    return {"base": base, **(kept or {}), **own, "lineage": line}


def unmeasured(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the losses by loop, which hold for the weights they were measured with."""
    return {key: value for key, value in facts.items() if "_by_loop" not in key}


def stated_license(folder: Path) -> str:
    """The license that a folder's card names in its front matter; `UNKNOWN` where it names none."""
    card = folder / "README.md"
    parts = read_text(card).split("---\n", 2) if card.is_file() else []
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        front = None
    return license_of(front.get("license") if isinstance(front, dict) else None)


def license_of(stated: Any) -> str:
    """A license as a model's file states it; `UNKNOWN` for what is no short line of text."""
    line = isinstance(stated, str) and stated.isprintable() and 0 < len(stated.strip()) <= _LONGEST
    return stated.strip() if line else UNKNOWN


def lineage_table(lineage: Any) -> str:
    """The models that a model was made from, the oldest first, as a table; '' for none."""
    if not isinstance(lineage, list) or not lineage:
        return ""
    keys = ("name", "method", "data", "steps")
    rows = [[_cell(model.get(key, "")) for key in keys] for model in lineage
            if isinstance(model, Mapping)]  # fmt: skip
    head = ["made from", "method", "data", "steps"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(keys), *rows))


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((key, _cell(value)) for key, value in rows.items())]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
