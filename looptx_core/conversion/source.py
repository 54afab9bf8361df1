"""What a conversion reads: the model, and the data that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from looptx_core.checkpoint.folder import LoadedModel, load_empty, load_model
from looptx_core.checkpoint.registry import local_folder, resolve_adapter, resolve_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.conversion.gguf_names import require_gguf
from looptx_core.conversion.huggingface import from_huggingface
from looptx_core.conversion.onnx_folder import graph_depth
from looptx_core.conversion.pretrained import Looping, is_plain, open_plain
from looptx_core.conversion.source_check import (
    logit_difference,
    second_loop_costs,
    transformers_or_none,
)
from looptx_core.data.chat import ChatTemplate
from looptx_core.data.corpus import bundled_text
from looptx_core.data.datamodule import Batches
from looptx_core.data.own import OwnData, given_data, open_data, own_data
from looptx_core.data.sample import sample_text
from looptx_core.errors import UsageError
from looptx_core.model.loop import LoopedTransformer

SEQ_LEN, BATCH, VAL_BATCHES = 128, 32, 4
PLAIN_BATCH = 8  # of a plain model that is not trained on: such models are large


def read_source(
    config: ConvertConfig, report: Callable[[str], object]
) -> tuple[LoadedModel, list[Path | None], Callable[[], nn.Module] | None]:
    """The model, the folders that it was read from, and what opens it in transformers where it was
    a plain one."""
    looping = Looping(config.core, config.max_loops, config.injection or "bridge")
    if config.from_hf:
        folder = local_folder(config.from_hf)
        loaded = _with_readable_template(from_huggingface(folder, looping), report)
        return loaded, [], partial(open_plain, folder) if is_plain(folder) else None
    if config.from_gguf:
        require_gguf("from_gguf")
        from looptx_core.conversion.gguf_file import GGUF, from_gguf

        file = GGUF(Path(config.from_gguf))
        loaded = from_gguf(file, looping)
        if loaded.chat_template is None and file.values.get("tokenizer.chat_template") is not None:
            report("warning: the chat template is left out, as it is no text; chats do not work")
        loaded = _with_readable_template(loaded, report)
        return loaded, [], file.in_transformers if file.loops == 1 else None
    if config.adapter:
        from looptx_core.finetuning.merge import merge  # brings PEFT

        found = resolve_adapter(config.adapter, config.model)
        assert found.adapter is not None
        report(f"model: {found.folder}, with the adapter {found.adapter}")
        return merge(found.folder, found.adapter), [found.folder, found.adapter], None

    def check(folder: Path) -> None:
        source = load_empty(folder)
        # A depth that it has not is an error of its own, and no reason to take another model.
        loops = config.loops and min(config.loops, source.config.max_loops)
        check_kinds(replace(config, loops=loops), source)

    found = resolve_model(config.model, need=frozenset({"weights"}), check=check)
    if config.model is None:
        report(f"model: {found.folder}, {found.reason}")
    return load_model(found.folder), [found.folder], None


def _with_readable_template(loaded: LoadedModel, report: Callable[[str], object]) -> LoadedModel:
    """Without a chat template that has a fault, which is said now and not at the first chat."""
    template = ChatTemplate.of_others(loaded.chat_template, {})
    if template is None or (flaw := template.flaw()) is None:
        return loaded
    report(f"warning: the chat template is left out, as it has a fault ({flaw}); chats do not work")
    return replace(loaded, chat_template=None)


def check_kinds(config: ConvertConfig, source: LoadedModel) -> None:
    """Raise `UsageError` for a model that can't be stored as asked."""
    kind = source.config.linear
    if config.to_bitnet and kind == "packed":
        raise UsageError(f"{source.folder}: its weights are ternary already; leave `to_bitnet` out")
    if config.dtype == "int8" and kind in ("ternary", "packed"):
        raise UsageError(
            f"{source.folder}: its weights are ternary, smaller than int8; leave `dtype` int8 out"
        )
    if config.to_hf and source.config.has_memory:
        raise UsageError(
            f"{source.folder}: transformers' format has no memory; leave `to_hf` out, or take a "
            "model without one"
        )
    if config.to_onnx:
        graph_depth(source, config.loops)
    if config.to_gguf:
        from looptx_core.conversion.gguf_export import check_gguf  # brings the extra

        check_gguf(source, config.loops)


def compare_with_source(
    config: ConvertConfig,
    model: LoopedTransformer,
    tokenizer: Tokenizer,
    plain: Callable[[], nn.Module],
    report: Callable[[str], object],
) -> dict[str, Any]:
    """How far one loop is from the plain model, and what other spans would cost; for the result."""
    tokens = sample_text(tokenizer, model.config.max_seq_len)
    found: dict[str, Any] = {}
    if (theirs := transformers_or_none(plain)) is None:
        report("one loop is not compared with the source: pip install transformers for that")
    else:
        found["logit_difference"] = logit_difference(model, theirs, tokens)
    if config.core:
        first = model.config.prelude_layers
        found["core"] = f"{first}:{first + model.config.core_layers}"
        found["injection"] = model.config.injection
    if config.core == "auto":
        found["spans"] = second_loop_costs(model, tokens)
    return found


@dataclass
class EvaluationData:
    """What a conversion trains on and judges by. note: of the data, where it is the model's."""

    batches: Batches
    name: str
    """For people."""
    own: bool
    note: OwnData | None


def evaluation_data(
    config: ConvertConfig,
    source: LoadedModel,
    trains: bool,
    report: Callable[[str], object],
    rows: int,
) -> EvaluationData:
    """By the data that is given, else by the model's own.

    Where it has none, the bundled text judges, and nothing is trained on it: `UsageError`.
    """
    own = own_data(source.folder, source.facts)
    data = given_data(config.data) if config.data else own
    lack = ""
    if data is None:
        lack = "what this model was trained on is not known"
    elif not config.data and (gone := data.missing):
        lack = f"what this model was trained on, {', '.join(gone)}, is gone"
    if lack and trains:
        raise UsageError(
            f"{source.folder}: {lack}; give such data by `data`, or pass `direct`, which only "
            "rounds"
        )
    mine = not lack and data is not None and own is not None and data.same_inputs(own)
    if lack or data is None:
        # Without the lines for tasks that are mixed into it for models of ours.
        data = OwnData("text", (str(bundled_text()),))
        name = "the bundled text, which is not this model's own"
    else:
        name = data.name if config.data else f"the model's own data, {data.name}"
    report(f"data: {name}")
    batches = open_data(
        data,
        source.tokenizer,
        source.config,
        seq_len=SEQ_LEN,
        rows=rows,
        batches=config.finetune_steps,
        val_batches=VAL_BATCHES,
        seed=config.seed,
        chat=source.chat,
        end=source.end,
        held_out_only=not config.to_bitnet,  # which sets its scales by a batch of training
        report=report,
    )
    return EvaluationData(batches, name, mine, data if trains else own)
