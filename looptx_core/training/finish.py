"""The end of a training run: its final evaluation, and its model folder."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from looptx_core.checkpoint.card import descended
from looptx_core.checkpoint.folder import LoadedModel, save_model
from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.config.generation import ExitSettings
from looptx_core.config.run import TrainConfig
from looptx_core.data.bundled import CORPUS
from looptx_core.data.datamodule import TokenData
from looptx_core.data.mixture import RECORDS, TEXT, MixedData
from looptx_core.data.own import FILE as OWN_DATA
from looptx_core.data.own import OwnData
from looptx_core.data.probes import probe_batches, read_probes
from looptx_core.machine.device import on_best_device
from looptx_core.model.code_rows import fold_code_rows
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.strategy import Swapped
from looptx_core.training.calibration import calibrate
from looptx_core.training.control import Control
from looptx_core.training.curves import plot_run, verdict
from looptx_core.training.evaluate import LoopEvaluation, evaluate_all, evaluate_loops
from looptx_core.training.module import LoopedLM


@dataclass
class TrainResult:
    """The results of a finished run."""

    folder: Path
    model_folder: Path
    steps: int
    seconds: float
    tokens: int
    """Tokens of the steps that this process ran."""
    steps_before: int
    """Steps of a resumed run that earlier processes ran."""
    loss_by_loop: list[float]
    """Held-out nats a token."""
    bits_per_byte_by_loop: list[float]
    accuracy_by_loop: list[float]
    probes: dict[str, list[float]] = field(default_factory=dict)
    """Accuracy by loop on generated lines that need depth, by name."""
    temperature: float = 1.0
    flops: float = 0.0
    verdict: str = ""
    caption_loss_by_loop: list[float] = field(default_factory=list)
    """Held-out nats a token of texts beside items of media."""
    best_step: int | None = None
    """With `keep_best`: the step whose weights the model has."""
    swapped: Swapped | None = None
    """Under NVMe offload: the swap files and the traffic, in bytes."""
    control: Control | None = None
    """The same training without loops, where it was asked for."""


def finish_training(
    model: LoopedTransformer,
    module: LoopedLM,
    batches: TokenData | MixedData,
    config: TrainConfig,
    data: Sequence[Path],
    records: Sequence[str | Path],
    folder: Path,
    steps: int,
    started: float,
    init: LoadedModel | None = None,
    weights: Sequence[float] = (),
) -> TrainResult:
    """Evaluate and calibrate a trained model, and save it to `folder`/final.

    started: `time.monotonic` at the start. The other arguments are those of `train` and `fit`.
    """
    fold_code_rows(model)
    loops = module.schedule.max_loops

    def measure() -> tuple[dict[str, LoopEvaluation], dict[str, list[float]]]:
        parts = {
            name: evaluate_all(model, batches.held_out(part), loops)
            for name, part in batches.val_parts.items()
        }
        probes = [probe for folder in data for probe in read_probes(folder)]
        lines = probe_batches(probes, batches.shards.tokenizer)
        return parts, {
            name: evaluate_loops(model, tokens, loops, counted).accuracy_by_loop
            for name, tokens, counted in lines
        }

    by_part, probes = on_best_device(model, measure)
    evaluation = by_part[TEXT]
    earliest = ExitSettings(min_loops=module.schedule.first_read(config.loss_at))
    exit_settings = calibrate(earliest, functools.reduce(operator.add, by_part.values()))
    counts = [text.manifest.splits["val"] for text in batches.texts]
    per_byte = sum(count.tokens for count in counts) / sum(count.bytes for count in counts)
    bits = [loss / math.log(2) * per_byte for loss in evaluation.loss_by_loop]
    metrics = read_metrics(folder / "metrics.jsonl")
    result = TrainResult(
        folder=folder,
        model_folder=folder / "final",
        steps=steps,
        seconds=time.monotonic() - started,
        steps_before=module.begun_at,
        tokens=(steps - module.begun_at) * config.batch_size * config.seq_len,
        loss_by_loop=evaluation.loss_by_loop,
        bits_per_byte_by_loop=bits,
        accuracy_by_loop=evaluation.accuracy_by_loop,
        probes=probes,
        temperature=exit_settings.temperature,
        flops=float(module.flops),
        verdict=verdict(evaluation.loss_by_loop),
        caption_loss_by_loop=by_part[RECORDS].loss_by_loop if records else [],
        best_step=module.best_step,
        swapped=module.swapped,
    )
    plot_run(metrics, probes, folder / "curves.png")
    names = [Path(item["name"]).name for text in batches.texts for item in text.manifest.inputs]
    texts = [item for item in config.data if item not in records]
    if not texts and names != [CORPUS]:
        texts = [str(folder) for folder in data]
    own = OwnData.of(
        "text", texts, asdict(config), shards=data[0] if len(data) == 1 else None, media=records,
        weights=weights,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "data": names + [Path(item).name for item in records],
        "steps": result.steps,
        **({"best_step": module.best_step} if module.best_step else {}),
        "tokens": steps * config.batch_size * config.seq_len,
        "seed": config.seed,
        "loop_schedule": config.loop_schedule,
        "loss_by_loop": [round(loss, 4) for loss in result.loss_by_loop],
        "bits_per_byte_by_loop": [round(value, 4) for value in bits],
        "training_flops": result.flops,
        **(
            {"caption_loss_by_loop": [round(loss, 4) for loss in result.caption_loss_by_loop]}
            if records
            else {}
        ),
    }
    if init is not None:
        facts = descended(init.facts, init.name, method="training went on", **facts)
    save_model(
        result.model_folder,
        model,
        batches.shards.tokenizer,
        exit_settings=exit_settings,
        facts=facts,
        overwrite=True,
        files={OWN_DATA: own.to_dict()},
        chat_template=init.chat_template if init else None,
        special=init.special if init else None,
    )
    return result
