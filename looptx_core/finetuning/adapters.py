"""Adapters on a looped model, by PEFT and in its own format.

One adapter serves all loops, or those from the second on, or each loop has its own (`loop_1`,
`loop_2`, ...), chosen as the loop is entered; what is outside the loop then has the adapter
`default`. The confidence head is no adapter, nor is the bridge by which a pretrained model's later
loops begin: they are trained whole and stored with them (PEFT's `modules_to_save`).

    adapter_config.json, adapter_model.safetensors   PEFT's; loop_<n>/ has the same for each loop
    looptx.json                                      the base's fingerprint, facts, and the first
                                                     loop with the adapter where it is not the first
    tokenizer.json, tokenizer_config.json            with the chat template
    generation_config.json                           the exit rule, calibrated with the adapter
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import nn

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.card import lineage_table
from looptx_core.checkpoint.folder import (
    LoadedModel,
    as_float,
    read_chat_template,
    read_exit,
    tokenizer_config,
)
from looptx_core.checkpoint.header import read_header
from looptx_core.checkpoint.weights import check_finite, fingerprint, refuse_pickle
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings
from looptx_core.documents import check_links, read_json
from looptx_core.errors import DataError, UsageError
from looptx_core.finetuning.lora import join_products
from looptx_core.finetuning.quiet_peft import without_bitsandbytes
from looptx_core.machine.integrity import check_folder, write_digests
from looptx_core.model.loop import LoopedTransformer
from looptx_core.schema import typed

with without_bitsandbytes():
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import DUMMY_TARGET_MODULES

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "looptx.json"
_SHARED = "default"
_FROM_SECOND = ((), (_SHARED,))


@without_bitsandbytes()
def attach(model: LoopedTransformer, config: FinetuneConfig) -> PeftModel:
    """Freeze the model and give it adapters, in place; they and the confidence head train.

    Raises `UsageError` for a target that matches nothing or is tied to another layer.
    """
    layers = targets(model, config.target_modules)
    inside = [name for name in layers if name.startswith("core.")]
    if not inside and (config.lora_per_loop or config.lora_layers != "all"):
        which = "`lora_per_loop`" if config.lora_per_loop else f"`lora_layers` {config.lora_layers}"
        raise UsageError(f"{which}: no target lies in the loop; leave it out")
    whole = ["confidence", *(["injection"] if model.injection.kind == "bridge" else [])]
    if model.config.memory != "none":
        whole.append("memory")  # closed gates would stay closed

    def lora(names: Sequence[str] | str, save: list[str] | None = None) -> LoraConfig:
        return LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number serves
            lora_dropout=config.lora_dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            target_modules=names if isinstance(names, str) else list(names),
            modules_to_save=save,
            # Encoders run once an item, and are left as they are.
            exclude_modules="|".join(rf"{name}\..*" for name in _encoders(model)) or None,
        )

    if not config.lora_per_loop:
        named = config.target_modules if config.lora_layers == "all" else inside
        peft = get_peft_model(model, lora(named, whole))
        join_products(model)
        if config.lora_layers == "later":
            follow_loops(model, _FROM_SECOND, trainable=True)
        return peft
    outside = [name for name in layers if name not in inside]
    if config.lora_layers == "core":
        outside = []
    peft = get_peft_model(model, lora(outside or DUMMY_TARGET_MODULES, whole))
    names = _loop_names(model.config.max_loops)
    for name in names:
        peft.add_adapter(name, lora(inside))
    join_products(model)
    follow_loops(model, [[name] for name in names], trainable=True)
    return peft


def _encoders(model: LoopedTransformer) -> list[str]:
    """The names of the modules that read media."""
    encoders = list(model.encoders().values())
    return [name for name, module in model.named_children() if module in encoders]


def targets(model: LoopedTransformer, names: Sequence[str]) -> list[str]:
    """The full names of the linear layers that `names` mean, by their ends."""
    left_out = ["confidence.", *(f"{name}." for name in _encoders(model))]
    if model.injection.kind == "streams":  # whose gates are no layers of a block
        left_out.append("injection.")
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(left_out))
    }
    found: set[str] = set()
    for target in names:
        matched = {name for name in linear if f".{name}".endswith(f".{target}")}
        if not matched:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UsageError(f"`target_modules` {target}: matches no layer; there are {there}")
        if "head" in matched and model.config.tie_embeddings:
            raise UsageError(
                "`target_modules` head: it shares its weights with the embedding, which an "
                "adapter can't change apart; leave it out"
            )
        found |= matched
    return sorted(found)


def follow_loops(
    model: LoopedTransformer, by_loop: Sequence[Sequence[str]], trainable: bool
) -> None:
    """Let each loop use the adapters that `by_loop` names; loops beyond the last use the last's.

    PEFT's `set_adapter` would freeze all the others, so the choice is set on the layers.
    """
    names = [name for each in by_loop for name in each]
    layers = [module for module in model.core.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_requires_grad(names, trainable)

    model.enter_loop = _Chosen(layers, by_loop)
    model.enter_loop(1)


@dataclass(frozen=True)
class _Chosen:
    """Switches layers to the adapters of a loop; no closure, so that a copied model has its own."""

    layers: Sequence[BaseTunerLayer]
    by_loop: Sequence[Sequence[str]]

    def __call__(self, loop: int) -> None:
        for layer in self.layers:
            layer._active_adapter = list(self.by_loop[min(loop, len(self.by_loop)) - 1])


def save_adapter(
    folder: Path,
    peft: PeftModel,
    base: LoadedModel,
    *,
    exit_settings: ExitSettings,
    facts: Mapping[str, Any],
    chat_template: str | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    from_second: bool = False,
) -> None:
    """Write an adapter folder, whole or not at all; one that is there is replaced.

    from_second: whether the adapter acts from the second loop on. files: more JSON documents, by
    name.
    """
    name = base.folder.resolve()
    for settings in peft.peft_config.values():
        settings.base_model_name_or_path = str(name)
    own = {"format_version": 1, "base": fingerprint(base.folder), "facts": dict(facts)}
    if from_second:
        own["first_loop"] = 2
    generation = {"exit": asdict(exit_settings)}
    tokens = tokenizer_config(base.special, base.config.max_seq_len, chat_template)
    card = _card(folder, base.name, facts)

    def write(place: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty `default`, whose place is intended
            peft.save_pretrained(str(place), save_embedding_layers=False)
        (place / "tokenizer.json").write_text(base.tokenizer.to_str(), "utf-8")
        (place / "README.md").write_text(card, "utf-8")
        for file, content in (
            (FACTS, own),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokens),
            *(files or {}).items(),
        ):
            (place / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        write_digests(place)

    write_folder(folder, write)


def load_adapter(base: LoadedModel, folder: str | Path, merge: bool = True) -> LoadedModel:
    """The base with an adapter, in evaluation mode; `base.model` is changed.

    merge: put an adapter that acts alike in all loops into the weights, which run as fast as the
    base's.

    Raises:
        DataError: no adapter, a pickle, or an adapter of another base.
    """
    folder = Path(folder)
    loops, from_second = loops_of(folder), is_from_second(folder)
    _check_base(base, folder)
    base = as_float(base)
    names = [_SHARED, *_loop_names(loops)]
    _check_parts(folder, loops)
    try:
        with warnings.catch_warnings(), without_bitsandbytes():
            warnings.simplefilter("ignore")
            peft = PeftModel.from_pretrained(base.model, str(folder), local_files_only=True)
            for name in names[1:]:
                peft.load_adapter(str(folder / name), name, local_files_only=True)
            if merge and not loops and not from_second:
                peft.merge_and_unload()
    except Exception as error:  # PEFT and its parts raise many kinds for what doesn't fit
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{folder}: this adapter doesn't fit {base.folder} ({reason}); give its own base"
        ) from error
    check_folder(folder)
    model = base.model
    if loops or from_second:
        by_loop = _FROM_SECOND if from_second else [[name] for name in names[1:]]
        follow_loops(model, by_loop, trainable=False)
    elif merge:
        model.requires_grad_(True)
    file = folder / "generation_config.json"
    exit_settings = read_exit(folder) if file.is_file() else base.exit
    return replace(
        base,
        model=model.eval(),
        exit=exit_settings,
        folder=folder,
        facts=own_facts(folder) or base.facts,
        chat_template=read_chat_template(folder) or base.chat_template,
    )


def own_facts(folder: Path) -> dict[str, Any]:
    """What an adapter tells of its training; PEFT's own tells nothing."""
    file = folder / FACTS
    found = read_json(file).get("facts") if file.is_file() else None
    return found if isinstance(found, dict) else {}


def is_from_second(folder: Path) -> bool:
    """Whether an adapter acts from the second loop on, so that one loop is the base's."""
    file = folder / FACTS
    return file.is_file() and read_json(file).get("first_loop") == 2


def check_adapter(folder: Path) -> None:
    """Raise `DataError` for an adapter's folder that is damaged; its base need not be there."""
    _check_parts(folder, loops_of(folder))
    check_folder(folder)


def _check_parts(folder: Path, loops: int) -> None:
    for place in [folder, *(folder / name for name in _loop_names(loops))]:
        _check_files(place)


def loops_of(folder: Path) -> int:
    """How many loops have an adapter of their own; 0 for a shared one."""
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder}: no adapter ({CONFIG} is missing); check `adapter`")
    count = 0
    while (folder / f"loop_{count + 1}" / CONFIG).is_file():
        count += 1
    return count


def _check_base(base: LoadedModel, folder: Path) -> None:
    file = folder / FACTS
    expected = read_json(file).get("base") if file.is_file() else None  # PEFT's own has none
    if expected is not None and expected != fingerprint(base.folder):
        own = read_json(folder / CONFIG).get("base_model_name_or_path")
        raise DataError(
            f"{folder}: an adapter of another base than {base.folder}; it was trained on {own}"
        )


def _check_files(place: Path) -> None:
    check_links(place)
    file = place / CONFIG
    settings = typed(_AdapterSettings, read_json(file), str(file), ignore_unknown=True)
    if (place / WEIGHTS).is_file():
        _check_weights(place / WEIGHTS, settings)
        return
    for file in sorted(place.glob("adapter_model.*")):
        refuse_pickle(file)
    raise DataError(f"{place}: {WEIGHTS} is missing; copy the adapter again")


@dataclass(frozen=True)
class _AdapterSettings:
    """What adapter_config.json must hold for PEFT to make layers of a bearable size."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: float
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None


def _check_weights(file: Path, settings: _AdapterSettings) -> None:
    """Raise `DataError` for a file that is damaged, holds NaN, or is of another rank."""
    refuse_pickle(file)
    header = read_header(file)
    largest = max((max(stored.shape, default=0) for stored in header.values()), default=0)
    ranks = (settings.r, *settings.rank_pattern.values())
    if header and not 1 <= min(ranks) <= max(ranks) <= largest:
        raise DataError(
            f"{file}: holds no matrices of rank {max(ranks):,}, which {CONFIG} asks for; "
            "copy the adapter again"
        )
    with safe_open(file, framework="pt") as data:
        for name in header:
            check_finite(data.get_tensor(name), name, file)


def _loop_names(loops: int) -> list[str]:
    return [f"loop_{loop}" for loop in range(1, loops + 1)]


def _card(folder: Path, base: str, facts: Mapping[str, Any]) -> str:
    told = {key: value for key, value in facts.items() if key != "lineage"}
    rows = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    lineage = lineage_table(facts.get("lineage"))
    return (
        "---\nlibrary_name: peft\ntags: [looptx, lora]\n---\n\n"
        f"# An adapter of {base}\n\nMade by `looptx finetune`; PEFT opens it.\n\n"
        f'```\nlooptx generate "..." --adapter PATH_OF_THIS_FOLDER\n```\n\n'
        f"| fact | |\n| --- | --- |\n{rows}\n" + (f"\n{lineage}\n" if lineage else "")
    )
