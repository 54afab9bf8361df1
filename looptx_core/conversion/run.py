"""One conversion: read a model, change it as asked, evaluate it before and after, write it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from looptx_core.checkpoint.card import descended, unmeasured
from looptx_core.checkpoint.folder import (
    LoadedModel,
    model_files,
    write_model,
)
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.export import DTYPES, export, matrix_type, require_packages
from looptx_core.conversion.huggingface import to_huggingface
from looptx_core.conversion.memory import with_memory
from looptx_core.conversion.source import (
    BATCH,
    PLAIN_BATCH,
    SEQ_LEN,
    VAL_BATCHES,
    check_kinds,
    compare_with_source,
    evaluation_data,
    read_source,
)
from looptx_core.conversion.source_check import HalfSteps, Span, with_half_steps
from looptx_core.conversion.ternary import (
    WarmUp,
    bits_per_weight,
    pack_model,
    running_bytes,
    to_ternary,
)
from looptx_core.data.datamodule import Batches
from looptx_core.data.own import FILE as OWN_DATA
from looptx_core.errors import Interrupted
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import to_float, to_int8
from looptx_core.outputs import check_output
from looptx_core.training.calibration import calibrate
from looptx_core.training.evaluate import evaluate_all
from looptx_core.training.run import fit
from looptx_core.words import counted

_WARM_UP = 0.25  # of the steps


@dataclass
class ConvertResult:
    """What a conversion has to show. Losses in nats a token, held-out, by loop."""

    out: Path
    bytes_before: int
    """Of the folder that was read."""
    bytes_after: int
    """Of the folder that was written."""
    bits_per_weight: float
    """Stored bits of a weight in the blocks' linear layers, scales included."""
    memory_before: int
    """Bytes of the weights in memory, as they run."""
    memory_after: int
    loss_by_loop_before: list[float]
    loss_by_loop: list[float]
    seconds: float
    steps: int = 0
    """Of training through the rounding."""
    judged_by: str = ""
    """The data of the losses, in words."""
    own: bool = True
    """Whether that is what the model was made for."""
    logit_difference: float | None = None
    """Relative to the largest logit: of one loop and the plain model it came from, None where there
    is no such model, or no transformers to run it; or of what was exported and the model."""
    compared: str = "one loop against the source in transformers"
    """What that is the difference of, in words."""
    loops: int | None = None
    """The depth of a graph or a GGUF file, where the losses are at this depth alone."""
    core: str | None = None
    """The layers that are looped, as A:B; None where no choice was asked for."""
    injection: str | None = None
    """What later loops of these are, see `ConvertConfig`."""
    spans: list[Span] = field(default_factory=list)
    """What a second loop of other layers would cost, where `core` is auto."""
    half_steps: HalfSteps | None = None
    """What half steps of these layers cost or bring on the data of the losses, as source and
    untrained; None without a core."""

    @property
    def rise(self) -> float:
        """Of the loss at the last loop, as a share."""
        return self.loss_by_loop[-1] / self.loss_by_loop_before[-1] - 1

    def to_dict(self) -> dict[str, Any]:
        """The document that `looptx convert --json` prints."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "loss_before": self.loss_by_loop_before[-1],
            "loss_after": self.loss_by_loop[-1],
            "out": str(self.out),
            "logit_difference": self.logit_difference,
            "loops": self.loops,
            "core": self.core,
            "injection": self.injection,
            "spans": [span.to_dict() for span in self.spans],
            "half_steps": self.half_steps and self.half_steps._asdict(),
        }


def convert(
    config: ConvertConfig,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
    callbacks: Sequence[L.Callback] = (),
    report: Callable[[str], object] = lambda line: None,
) -> ConvertResult:
    """Convert a model folder into another.

    inputs: what else is read, such as a file of settings; no input is ever replaced.
    callbacks: Lightning's, for displays of the training through the rounding. report: called
    with lines of one choice each.

    Raises:
        UsageError: the target is taken, the model is ternary already, or an adapter has a part
            for each loop.
        DataError: unusable models, adapters or data; or one loop of a plain model that differs
            from it.
        MissingError: a GGUF file, and no package that reads or writes it; or none for ONNX.
        Interrupted: a Ctrl-C; nothing was written.
    """
    started = time.monotonic()
    require_packages(config)
    source, sources, plain = read_source(config, report)
    out = output_folder(config, source)
    inputs = (*inputs, *config.data, config.model, config.foreign, config.adapter, *sources)
    check = partial(check_output, out, "convert", overwrite=overwrite, inputs=inputs)
    if there := check():
        report(f"replaces {out}: {there}, once the new one is whole")
    check_kinds(config, source)
    was = matrix_type(source)
    memory_before = running_bytes(source.model.float())
    model = to_float(source.model)
    remembering = model
    if config.memory:
        remembering = with_memory(model, config.memory, config.memory_window, config.memory_block)
    if config.unrolled:
        made = export(config, source, model, was, out, check, report)
        return ConvertResult(
            out=out, bytes_before=folder_bytes(source.folder), bytes_after=folder_bytes(out),
            memory_before=memory_before, seconds=time.monotonic() - started, **made,
        )  # fmt: skip
    checked = compare_with_source(config, model, source.tokenizer, plain, report) if plain else {}
    trains = config.to_bitnet and not config.direct and model.config.linear == "float"
    judged = plain is not None and not config.to_bitnet
    held_out = evaluation_data(
        config, source, trains, report, rows=PLAIN_BATCH if judged else BATCH
    )
    # Later loops of a plain model are its first, or half steps, until they are trained.
    loops = model.config.loops if judged else model.config.max_loops
    batches = held_out.batches
    # Text that a model was not trained on tells nothing of when it may stop.
    suits = held_out.own or bool(config.data)
    if judged and config.core:
        before, checked["half_steps"] = with_half_steps(model, batches.val_dataloader())
    else:
        before = evaluate_all(model, batches.val_dataloader(), loops)
    bytes_before = folder_bytes(source.folder)

    after, exit_settings, steps = before, source.exit, 0
    model = remembering
    if config.to_bitnet:
        if model.config.linear == "float":
            model = to_ternary(model, [next(iter(batches.train_dataloader()))])
            if trains:
                steps = _finetune(model, batches, config, out, callbacks, report)
        model = pack_model(model)
    floats = torch.float32 if was == torch.int8 else was
    kind = DTYPES[config.dtype] if config.dtype else floats
    model = to_int8(model) if kind == torch.int8 else model.to(kind)
    memory_after = running_bytes(model)
    if config.to_bitnet or config.memory or kind != was:
        after = evaluate_all(model.float(), batches.val_dataloader(), loops)
        model = model.to(torch.float32 if kind == torch.int8 else kind)
        if suits and loops == model.config.max_loops:
            exit_settings = calibrate(exit_settings, after)

    facts = dict(source.facts) if after is before else unmeasured(source.facts)
    if suits:
        facts["loss_by_loop"] = [round(x, 4) for x in after.loss_by_loop[:loops]]
        if after is not before:
            facts["loss_by_loop_before"] = [round(x, 4) for x in before.loss_by_loop[:loops]]
    if config.to_bitnet:
        done = {"data": [held_out.name], "steps": steps, "seed": config.seed} if steps else {}
        losses = {key: facts[key] for key in facts if key.startswith("loss_by_loop")}
        facts = descended(
            source.facts, source.name, losses, method="ternary weights, "
            + ("trained through the rounding" if steps else "only rounded"), **done,
        )  # fmt: skip
        facts["ternary"] = f"trained {counted(steps, 'step')}" if steps else "rounded"
    elif config.memory:
        losses = {key: facts[key] for key in facts if key.startswith("loss_by_loop")}
        facts = descended(source.facts, source.name, losses,
                          method=f"a {config.memory} memory, not yet trained")  # fmt: skip
    elif not config.merge_adapter:  # the same model in another form
        facts["converted_from"] = source.name
    weights, files = model_files(
        out, model, source.tokenizer, exit_settings, facts,
        chat_template=source.chat_template, special=source.special,
    )  # fmt: skip
    if held_out.note is not None and not config.to_hf:  # which goes to others, without our paths
        files[OWN_DATA] = held_out.note.to_dict()
    if config.to_hf:
        if read := [medium.plural for medium in model.media]:
            kept = f"its encoder of {' and '.join(read)} stays in the folder for `from_hf`"
            report(f"transformers: the export takes text alone; {kept}")
        weights, files = to_huggingface(weights, files, asdict(exit_settings))
    files["config.json"]["command"] = "convert"
    check()
    write_model(out, weights, files, config.shard_size)
    return ConvertResult(
        out=out,
        bytes_before=bytes_before,
        bytes_after=folder_bytes(out),
        bits_per_weight=bits_per_weight(model),
        memory_before=memory_before,
        memory_after=memory_after,
        loss_by_loop_before=before.loss_by_loop[: 1 if judged else loops],
        loss_by_loop=after.loss_by_loop[:loops],
        seconds=time.monotonic() - started,
        steps=steps,
        judged_by=held_out.name,
        own=held_out.own,
        **checked,
    )


def _finetune(
    model: LoopedTransformer,
    batches: Batches,
    config: ConvertConfig,
    out: Path,
    callbacks: Sequence[L.Callback],
    report: Callable[[str], object],
) -> int:
    """Train through the rounding; the steps that were done."""
    steps = config.finetune_steps
    settings = ternary_training(config, model, batches)
    with tempfile.TemporaryDirectory(prefix="looptx-") as folder:
        try:
            _, done = fit(
                model, batches, settings, folder=Path(folder), advice="run it again",
                callbacks=[WarmUp(round(_WARM_UP * steps)), *callbacks], report=report,
            )  # fmt: skip
        except Interrupted as error:
            raise Interrupted(
                f"stopped, and {out} was not written; run it again, with fewer `finetune_steps` "
                "for a shorter run"
            ) from error
    if done < steps:
        report(f"stopped after {done} of {steps} steps, as `max_minutes` says")
    return done


def ternary_training(
    config: ConvertConfig, model: LoopedTransformer, batches: Batches
) -> TrainConfig:
    """The settings of the training through the rounding."""
    return TrainConfig(
        steps=config.finetune_steps,
        max_minutes=config.max_minutes,
        lr=config.lr,
        seed=config.seed,
        batch_size=batches.micro_batch,
        seq_len=min(SEQ_LEN, model.config.max_seq_len),
        save_every=config.finetune_steps + 1,
        val_every=config.finetune_steps,
        val_batches=VAL_BATCHES,
    )


def output_folder(config: ConvertConfig, source: LoadedModel) -> Path:
    """The folder that is written."""
    return Path(config.out or f"{source.name.removesuffix('.gguf')}-{config.suffix}")


def folder_bytes(folder: Path) -> int:
    """Of a folder's files, or of a file."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
