"""Folders that transformers opens, and back.

The code in such a folder is this package's own, file for file; only the imports among them are
made relative, since transformers looks for them in one flat folder.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from looptx_core.checkpoint.folder import (
    MODEL_TYPE,
    LoadedModel,
    read_chat_template,
    read_tokenizer,
)
from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.checkpoint.weights import load_weights
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.conversion.pretrained import (
    ARCHITECTURES,
    ONE_LOOP,
    WITHOUT_PLACE,
    Looping,
    from_folder,
)
from looptx_core.documents import read_json, short
from looptx_core.errors import DataError, UsageError
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.loop import LoopedTransformer
from looptx_core.schema import typed

ENTRY = "looptx_core.conversion.modeling_looptx"
CLASS = "LooptxForCausalLM"
_PREFIX = "model."
_IMPORT = re.compile(r"^(\s*)from (looptx_core(?:\.\w+)+) import", re.MULTILINE)
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
prompt = tokenizer("Call me", return_tensors="pt")
model.generate(**prompt, max_new_tokens=40)           # each token as deep as it needs
model.generate(**prompt, max_new_tokens=40, loops=4)  # a fixed depth
```

Tested with transformers {first} to {last}; it refuses others. `looptx convert --from-hf` makes it
a folder of looptx again."""
_ALL_FILES = """

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:  # transformers before 5.12 copies no local files but those named here
"""
_FENCE = re.compile(r"```\n.*?\n```", re.DOTALL)


def to_huggingface(
    weights: Mapping[str, Tensor], files: Mapping[str, Any], exit_settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model folder's tensors and files, as `model_files` gives them, for transformers."""
    sources = exported_sources()
    tested = re.search(r'^TESTED = \("(.+)", "(.+)"\)$', sources["modeling_looptx.py"], re.M)
    assert tested
    first, last = tested.groups()
    config = {
        **files["config.json"],
        "architectures": [CLASS],
        "auto_map": {
            "AutoConfig": "modeling_looptx.LooptxConfig",
            "AutoModelForCausalLM": f"modeling_looptx.{CLASS}",
        },
        "tested_with_transformers": [first, last],
        "exit": dict(exit_settings),
    }
    generation = {k: v for k, v in files["generation_config.json"].items() if k != "exit"}
    card = with_use(files["README.md"], _USE.format(first=first, last=last), "transformers")
    named = {_PREFIX + name: tensor for name, tensor in weights.items()}
    return named, {
        **files,
        **sources,
        "config.json": config,
        "generation_config.json": generation,
        "README.md": card,
    }


def with_use(card: str, use: str, library: str) -> str:
    """A model card that tells how to open the model by another library."""
    card = _FENCE.sub(lambda _: use, card, count=1)
    return card.replace("library_name: looptx", f"library_name: {library}")


def exported_sources() -> dict[str, str]:
    """The entry file and all of the package that it imports, by the name in the folder."""
    waiting, found = [ENTRY], {}
    while waiting:
        module = waiting.pop()
        name = _flat(module) + ".py"
        if name in found:
            continue
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin
        text = Path(spec.origin).read_text("utf-8")
        # `from looptx_core.model import loop` would find nothing in a flat folder.
        empty = spec.submodule_search_locations and len(ast.parse(text).body) < 2
        assert not empty, f"{module} is a package without names of its own; import from its files"
        waiting += [match[2] for match in _IMPORT.finditer(text)]
        found[name] = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import", text)
    entry = _flat(ENTRY) + ".py"
    named = "".join(f"    from .{name[:-3]} import *  # noqa: F403\n" for name in sorted(found)
                    if name != entry)  # fmt: skip
    found[entry] += _ALL_FILES + named
    return found


def from_huggingface(folder: Path, looping: Looping = ONE_LOOP) -> LoadedModel:
    """Read what `to_hf` wrote, as it is or saved again by transformers; or a plain model.

    A plain one, of `ARCHITECTURES`, becomes a looped model as `pretrained` says, with a confidence
    head that is yet to be trained. looping: for these alone.

    Raises:
        DataError: other folders, and what a looped model has no place for.
        UsageError: a core that does not fit.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check `from_hf`")
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind in ARCHITECTURES:
        return from_folder(folder, settings, looping)
    if kind != MODEL_TYPE or settings.get("architectures") != [CLASS]:
        part = WITHOUT_PLACE.get(kind) if isinstance(kind, str) else None
        lacks = f" has {part}" if part else ""
        raise DataError(
            f"{folder}: model_type {short(kind)}{lacks}; `from_hf` reads what `to_hf` wrote, and "
            f"{', '.join(ARCHITECTURES)}"
        )
    if looping.core is not None:
        raise UsageError(f"{folder}: a looped model already; `core` is for plain ones")
    shape = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
    config = typed(ModelConfig, shape, str(folder / "config.json"))
    known = {field.name for field in fields(ExitSettings)}
    rule = {k: v for k, v in (settings.get("exit") or {}).items() if k in known}
    with init_empty_weights():
        model = LoopedTransformer(config)

    def rename(name: str) -> str | None:
        name = name.removeprefix(_PREFIX)
        return None if name == "head.weight" and config.tie_embeddings else name

    load_weights(model, folder, rename=rename)
    tokenizer = read_tokenizer(folder, config)
    return LoadedModel(
        model.eval(),
        config,
        tokenizer,
        typed(ExitSettings, rule, f"{folder / 'config.json'}, exit"),
        settings.get("facts") or {},
        folder,
        read_chat_template(folder),
        SpecialTokens.read(folder, tokenizer),
    )


def _flat(module: str) -> str:
    """'model_block' for looptx_core.model.block; the entry keeps its own name."""
    if module == ENTRY:
        return module.rpartition(".")[2]
    return module.removeprefix("looptx_core.").replace(".", "_")
