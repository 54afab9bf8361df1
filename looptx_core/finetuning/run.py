"""One finetuning run: a base and examples to an adapter folder or a model folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch

from looptx_core.checkpoint.card import descended
from looptx_core.checkpoint.folder import (
    LoadedModel,
    as_float,
    load_model,
    save_model,
    update_generation_config,
)
from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.checkpoint.run_facts import update_facts
from looptx_core.checkpoint.weights import fingerprint
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings
from looptx_core.config.processes import is_first
from looptx_core.data.bundled import bundled_questions
from looptx_core.data.chat import TEMPLATE
from looptx_core.data.example import unlabelled
from looptx_core.data.examples import ExampleData, read_examples, split_packed
from looptx_core.data.own import FILE as OWN_DATA
from looptx_core.data.own import OwnData
from looptx_core.data.tokenizer import fingerprint as tokenizer_fingerprint
from looptx_core.errors import UsageError
from looptx_core.finetuning.adapters import attach, load_adapter, save_adapter, targets
from looptx_core.finetuning.answers import HeldOutAnswers, answer_held_out
from looptx_core.finetuning.quantise import quantise, stored_bytes
from looptx_core.machine.device import on_best_device
from looptx_core.media.registry import MEDIA
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.calibration import reported_confidence
from looptx_core.training.calibration import calibrate, fit_odds
from looptx_core.training.control import Control
from looptx_core.training.curves import plot_run
from looptx_core.training.epochs import epochs_told, in_steps
from looptx_core.training.evaluate import LoopEvaluation, evaluate_all
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.metrics import calibration_error
from looptx_core.training.run import fit, report_unlabelled, resuming
from looptx_core.training.task_evaluation import task_evaluation
from looptx_core.training.teacher import check_teacher
from looptx_core.words import counted

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class FinetuneResult:
    """What a finished run has to show. By loop, on the held-out examples' responses."""

    folder: Path
    model_folder: Path
    """The model, or the adapter."""
    base: Path
    method: str
    steps: int
    seconds: float
    trainable: int
    """Parameters of the trunk that are trained; the confidence head's come on top."""
    parameters: int
    """Of the base's trunk."""
    base_bytes: int
    """The base's weights in memory while training."""
    loss_by_loop_before: list[float]
    loss_by_loop: list[float]
    """Nats a token. Of an adapter: on the full-precision base, as it will run."""
    accuracy_by_loop_before: list[float]
    accuracy_by_loop: list[float]
    ece_before: float
    """Expected calibration error of the confidence over all loops; half of the held-out tokens
    calibrate, the other half are counted."""
    ece: float
    quantised_loss: float | None
    """Of a quantised base with its adapter, at the last loop; against `loss_by_loop[-1]` it is
    the gap that moving the adapter to the full-precision base leaves."""
    answers: HeldOutAnswers | None = None
    """To held-out prompts; None where the data has none."""
    flops: float = 0.0
    """Of the training, forward and backward."""
    control: Control | None = None
    """The same training without loops, where it was asked for."""


@dataclass
class Prepared:
    """A run that can start: nothing is written yet, and what could be wrong with the input was
    found."""

    config: FinetuneConfig
    base: LoadedModel
    """Its model is quantised, frozen and adapted, as the settings say."""
    data: Sequence[str]
    batches: ExampleData
    chat_template: str | None
    peft: PeftModel | None
    before: LoopEvaluation | None
    """Of the base as it came; None for a run that is only planned."""
    trainable: int
    parameters: int
    base_bytes: int

    @property
    def origin(self) -> dict[str, str]:
        """Fingerprints of what the run is made from."""
        return {
            "data": self.batches.fingerprint,
            "model": fingerprint(self.base.folder),
            "tokenizer": tokenizer_fingerprint(self.base.tokenizer),
        }

    @property
    def loops(self) -> int:
        return self.config.max_loops or self.base.config.max_loops


def prepare(
    config: FinetuneConfig,
    *,
    base: Path,
    data: Sequence[str],
    until: int | None = None,
    judge: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> Prepared:
    """Read the model folder `base` and the examples, and make the model ready to train.

    data: as for `read_examples`. until: as for `fit`. judge: evaluate the base too, which a run
    needs and a plan does not. report: called with lines of one fact each.

    Raises `MissingError` where bitsandbytes can't run, `UsageError` for a target module that
    matches nothing, a model that is ternary or examples that are too long, `DataError` for
    unusable data or models.
    """
    loaded = as_float(load_model(base, dtype=torch.float32))
    model = loaded.model
    if config.seq_len > loaded.config.max_seq_len:
        raise UsageError(
            f"`seq_len` {config.seq_len} exceeds the model's context ({loaded.config.max_seq_len})"
        )
    kind = loaded.config.linear
    if kind == "packed" or (kind == "ternary" and config.adapts):
        can = "" if kind == "packed" else ", or finetune all of it"
        raise UsageError(
            f"{base}: its weights are ternary, with no float weights to "
            f"{'train' if kind == 'packed' else 'put an adapter beside'}; finetune the model that "
            f"it was made from, then looptx convert --to-bitnet{can}"
        )
    if config.lora_layers == "later" and config.loops is None and config.loop_schedule != "fixed":
        config = replace(config, loops=2)  # one loop has nothing to train
    schedule = LoopSchedule(config, loaded.config.max_loops)  # refuses impossible loops
    if schedule.deepest == 1 < loaded.config.max_loops:
        report(
            f"loops: only the first of the model's {loaded.config.max_loops} is trained; raise "
            "`max_loops`, or `loops` where their number is fixed, to train later ones too"
        )
    check_teacher(config.teacher, loaded.config, tokenizer_fingerprint(loaded.tokenizer))
    parameters = sum(p.numel() for p in model.trunk_parameters())
    if config.adapts:
        targets(model, config.target_modules)
    config, batches, chat_template = _data(config, loaded, data, until, report)
    before = _measured(model, batches, schedule.max_loops) if judge else None
    torch.manual_seed(config.seed)
    if config.qlora:
        quantise(model, config.quantization)
    base_bytes = stored_bytes(model)
    peft = attach(model, config) if config.adapts else None
    trainable = sum(p.numel() for p in model.trunk_parameters() if p.requires_grad)
    report(epochs_told(config, until or config.steps, len(batches.train)))
    report(
        f"trained: {trainable:,} of {parameters:,} parameters ({trainable / parameters:.1%}), "
        "and the confidence head"
    )
    return Prepared(
        config, loaded, data, batches, chat_template, peft, before, trainable, parameters,
        base_bytes,
    )  # fmt: skip


def _measured(
    model: LoopedTransformer, batches: L.LightningDataModule, loops: int
) -> LoopEvaluation:
    """What it does on the held-out examples."""
    return on_best_device(model, lambda: evaluate_all(model, batches.val_dataloader(), loops))


def finetune(
    prepared: Prepared,
    *,
    folder: Path,
    resume: bool = False,
    until: int | None = None,
    callbacks: Sequence[L.Callback] = (),
    report: Callable[[str], object] = lambda line: None,
    watch: Callable[[str], object] | None = None,
) -> FinetuneResult | None:
    """Finetune in `folder`, and write `folder`/final: an adapter's folder or a model's.

    None in a run's other processes: the first one has the result.

    The other arguments, and the errors, are those of `looptx_core.training.run.fit`.
    """
    started = time.monotonic()
    config, loaded, batches = prepared.config, prepared.base, prepared.batches
    before = prepared.before
    assert before is not None, "a prepared run has judged its base"
    model, peft, loops = loaded.model, prepared.peft, prepared.loops
    evaluation = task_evaluation(config, loaded.tokenizer, loaded.special, report)
    module, steps = fit(
        model, batches, config, folder=folder, advice=resuming("finetune", folder), resume=resume,
        until=until, callbacks=[*callbacks, *evaluation], report=report, watch=watch,
    )  # fmt: skip
    if not is_first():
        return None
    facts = descended(
        loaded.facts,
        loaded.name,
        data=[Path(item).name for item in prepared.data],
        method=config.method,
        steps=steps,
        seed=config.seed,
    )
    bundled = list(prepared.data) == [str(bundled_questions())]
    own = OwnData.of("records", () if bundled else prepared.data, asdict(config))
    files = {OWN_DATA: own.to_dict()}
    final = folder / "final"
    quantised_loss = None
    trained = model
    if peft is not None:
        if config.qlora:
            quantised_loss = _measured(model, batches, loops).loss_by_loop[-1]
        save_adapter(final, peft, loaded, exit_settings=loaded.exit, facts=facts,
                     chat_template=prepared.chat_template, files=files,
                     from_second=config.lora_layers == "later")  # fmt: skip
        # As it will run: on the full-precision base, merged where it can be.
        trained = load_adapter(load_model(loaded.folder, dtype=torch.float32), final).model
    after = _measured(trained, batches, loops)
    least = LoopSchedule(config, loaded.config.max_loops).first_read(config.loss_at)
    exit_settings = calibrate(replace(loaded.exit, min_loops=least), after)
    facts["loss_by_loop"] = [round(loss, 4) for loss in after.loss_by_loop]
    if peft is not None:
        update_generation_config(final, exit_settings)
    else:
        save_model(final, trained, loaded.tokenizer, exit_settings=exit_settings, facts=facts,
                   overwrite=True, chat_template=prepared.chat_template, files=files,
                   special=loaded.special)  # fmt: skip
    plot_run(read_metrics(folder / "metrics.jsonl"), {}, folder / "curves.png")
    answers = answer_held_out(trained, loaded, exit_settings, batches.val.examples)
    if answers is not None:
        update_facts(folder, exact_match=answers.share, answered=answers.records)
    return FinetuneResult(
        folder=folder,
        model_folder=final,
        base=loaded.folder,
        method=config.method,
        steps=steps,
        seconds=time.monotonic() - started,
        trainable=prepared.trainable,
        parameters=prepared.parameters,
        base_bytes=prepared.base_bytes,
        loss_by_loop_before=before.loss_by_loop,
        loss_by_loop=after.loss_by_loop,
        accuracy_by_loop_before=before.accuracy_by_loop,
        accuracy_by_loop=after.accuracy_by_loop,
        ece_before=held_out_ece(before, loaded.exit),
        ece=held_out_ece(after, replace(exit_settings, stated=())),
        quantised_loss=quantised_loss,
        answers=answers,
        flops=float(module.flops),
    )


def held_out_ece(found: LoopEvaluation, settings: ExitSettings) -> float:
    """ECE of the stated confidence on half of the tokens, over the loops where one may stop.

    settings: without `stated` it is calibrated on the other half.
    """
    half, first = found.logit.shape[1] // 2, min(settings.min_loops, len(found.logit)) - 1
    parts = [part[first:] for part in (found.hit, found.logit, found.top_log_odds)]
    if not settings.stated:
        settings = replace(settings, stated=fit_odds(*(part[:, :half] for part in parts)))
    hit, logit, sharp = (part[:, half:] for part in parts)
    return calibration_error(reported_confidence(logit, sharp, settings), hit)


def _data(
    config: FinetuneConfig,
    loaded: LoadedModel,
    data: Sequence[str],
    until: int | None,
    report: Callable[[str], object],
) -> tuple[FinetuneConfig, ExampleData, str | None]:
    """The settings with their steps, batches, and the chat template to store."""
    examples = read_examples(
        data,
        loaded.tokenizer,
        seq_len=config.seq_len,
        too_long=config.too_long,
        train_on_prompt=config.train_on_prompt,
        skip_bad=config.skip_bad,
        config=loaded.config,
        columns=config.columns,
        chat=loaded.chat,
        end=loaded.end,
    )
    train, val = split_packed(
        examples.kept,
        loaded.tokenizer,
        loaded.config,
        seq_len=config.seq_len,
        val_fraction=config.val_fraction,
        seed=config.seed,
        augment=config.augment,
    )
    config = in_steps(config, len(train))
    batches = ExampleData(
        train,
        val,
        micro_batch=config.micro_batch_size,
        batches=(until or config.steps) * config.accumulation,
        val_batches=config.val_batches,
        seed=config.seed,
        workers=config.workers,
    )
    report_unlabelled(unlabelled(examples.kept), report)
    lost = f"; dropped {examples.dropped}, truncated {examples.truncated} as too long"
    report(
        f"examples: {len(train.examples):,} to train on, {len(val.examples):,} held out, packed "
        f"into {counted(len(train), 'sequence')}, {train.fill:.0%} full"
        + "".join(f"; {count:,} {MEDIA[name].plural}" for name, count in examples.media.items())
        + (lost if examples.dropped or examples.truncated else "")
        + (f"; left out {examples.skipped} that can't be used" if examples.skipped else "")
    )
    ours = examples.chat and loaded.chat is None
    return config, batches, TEMPLATE if ours else loaded.chat_template
