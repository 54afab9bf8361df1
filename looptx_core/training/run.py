"""One training run, from settings to a model folder. Finetuning uses `fit` too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from looptx_core.atomic import remove_partial
from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.model import ModelConfig
from looptx_core.config.processes import is_first
from looptx_core.config.run import RunConfig, TrainConfig
from looptx_core.data.datamodule import TokenData
from looptx_core.data.mixture import MixedData
from looptx_core.data.records import read_records
from looptx_core.errors import Interrupted, LooptxError, UsageError, remedy
from looptx_core.machine.device import best_device
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.media.registry import MEDIA, media_for
from looptx_core.model import fused
from looptx_core.model.attention import choose_backend
from looptx_core.model.code_rows import share_code_rows
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.deepspeed.checkpoint import Checkpoint
from looptx_core.parallel.ranks import lost_peer
from looptx_core.parallel.strategy import (
    FinalCheckpoint,
    check_strategy,
    choose_strategy,
    own_environment,
    shards_optimizer,
)
from looptx_core.training.callbacks import (
    AtSetup,
    BestWeights,
    JsonLines,
    StopCleanly,
    lost_worker,
    processes_of,
    resume_point,
    step_of,
    verify_checkpoint,
)
from looptx_core.training.compiled import compile_forward, uncompile_forward
from looptx_core.training.finish import TrainResult, finish_training
from looptx_core.training.frozen import cast_frozen
from looptx_core.training.hardware import choose_precision
from looptx_core.training.kernel_trial import enable_kernels
from looptx_core.training.memory_check import check_memory_use
from looptx_core.training.module import LoopedLM, ShardedLM, quiet_lightning
from looptx_core.training.optimizer import learning_rate_factor
from looptx_core.training.profile import WARM_STEPS, Profile
from looptx_core.training.start import copy_weights
from looptx_core.training.task_evaluation import check_tasks, task_evaluation
from looptx_core.training.trackers import Tracker, asked, check_trackers
from looptx_core.training.trainer import build_trainer
from looptx_core.words import counted, quoted

_log = logging.getLogger(__name__)
"""Of reasons, which few need."""


def fit_vocabulary(model: ModelConfig, vocab_size: int, asked: bool) -> ModelConfig:
    """The model's configuration with a vocabulary that fits the data.

    vocab_size: the tokenizer's; the codes of media that the model writes follow it. asked: whether
    the user gave `model.vocab_size`. Raises `UsageError` if that differs.
    """
    size = vocab_size
    for medium in media_for(model):
        if codes := medium.codes(model):
            model, size = medium.with_codes(model, size), size + codes
    if asked and model.vocab_size != size:
        raise UsageError(
            f"model.vocab_size {model.vocab_size} is not the tokenizer's {size}; "
            "leave it out, or tokenise again by looptx tokenize --vocab-size N"
        )
    return replace(model, vocab_size=size)


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    *,
    data: Path | Sequence[Path],
    records: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    folder: Path,
    init: LoadedModel | None = None,
    resume: bool = False,
    until: int | None = None,
    callbacks: Sequence[L.Callback] = (),
    report: Callable[[str], object] = lambda line: None,
    watch: Callable[[str], object] | None = None,
) -> TrainResult | None:
    """Train a model on the shards `data`, with its run in `folder`, and write `folder`/final.

    data: a folder of shards, or several of one tokenizer. folder: of the run.
    records: files of records with media, as for `read_records`; `model_config` has these media.
    weights: of each folder of shards and then of each item of records; absent: the shards are one
    folder, and `config.mix` weighs it against all records. init: the model whose weights are the
    first ones; the shards have its tokenizer, and `model_config` its shape, perhaps with further
    media. The other arguments, and the errors, are those of `fit`. Returns None in all processes
    of the run but the first.
    """
    started = time.monotonic()
    config.check_hidden_shares(bool(records))
    config.check_context(model_config.max_seq_len)
    batching: dict[str, Any] = {
        "seq_len": config.seq_len,
        "micro_batch": config.micro_batch_size,
        "batches": (until or config.steps) * config.accumulation,
        "val_batches": config.val_batches,
        "seed": config.seed,
        "workers": config.workers,
        "document_mask": config.document_mask,
    }
    for name in config.hidden_shares:
        model_config = MEDIA[name].enable_head(model_config)
    batches: TokenData | MixedData
    folders = [data] if isinstance(data, Path) else list(data)
    if records or weights:
        groups = [[item] for item in records] if weights else [records]
        read = [read_records(group, config.skip_bad) for group in groups]
        batches = MixedData(
            folders, read, model_config, mix=weights or config.weights, skip_bad=config.skip_bad,
            augment=config.augment, direction=config.direction, **batching,
        )  # fmt: skip
        for found in read:
            left_out = f", {found.skipped} left out" if config.skip_bad else ""
            what = ", ".join(medium.plural for medium in found.media)
            report(f"{what}: {counted(len(found.records), 'record')}{left_out}")
        report_unlabelled(batches.unlabelled, report)
    else:
        batches = TokenData(folders[0], **batching)
    if config.bitnet:
        model_config = replace(model_config, linear="ternary")
    torch.manual_seed(config.seed)
    model = LoopedTransformer(model_config)
    if init is not None:
        new = copy_weights(model, init)
        news = f"; new are {', '.join(new[:3])}{' and others' if new[3:] else ''}" if new else ""
        report(f"weights: those of {init.name}{news}")
    special = init.special if init else None
    evaluation = task_evaluation(config, batches.shards.tokenizer, special, report)
    learned = {section.codec for section in init.config.written} if init else ()
    share_code_rows(model, learned)
    module, steps = fit(
        model, batches, config, folder=folder, advice=resuming("train", folder), resume=resume,
        until=until, callbacks=[*callbacks, *evaluation], report=report, watch=watch,
    )  # fmt: skip
    if not is_first():
        return None
    return finish_training(
        module.model, module, batches, config, folders, records, folder, steps, started, init,
        weights,
    )  # fmt: skip


def report_unlabelled(counts: Mapping[str, int], report: Callable[[str], object]) -> None:
    """Tell of items that the encoders' own losses leave out. counts: by medium."""
    for name, count in counts.items():
        what = f"the texts of {count} are too long for the encoder's own loss"
        report(f"{MEDIA[name].plural}: {what}")


def check(config: RunConfig, folder: Path) -> None:
    """Check a run before it has a folder.

    Raises what `fit` would: `MissingError` for a package or hardware that is missing, `UsageError`
    for a strategy that does not fit the settings and for a task that there is not.
    """
    device = best_device()
    precision, _ = choose_precision(config.precision, device, config.sharding)
    choose_backend(
        config.attention, device, torch.bfloat16 if precision == "bf16" else torch.float32
    )
    check_strategy(config, folder)
    check_trackers(config.log)
    check_tasks(config)


def resuming(command: str, folder: Path) -> str:
    """A message that says how to resume a stopped run."""
    return f"go on with looptx {command} --resume {quoted(folder)}"


def fit(
    model: LoopedTransformer,
    batches: L.LightningDataModule,
    config: RunConfig,
    *,
    folder: Path,
    advice: str,
    resume: bool = False,
    until: int | None = None,
    callbacks: Sequence[L.Callback] = (),
    report: Callable[[str], object] = lambda line: None,
    watch: Callable[[str], object] | None = None,
) -> tuple[LoopedLM, int]:
    """Train the parameters of `model` that are not frozen, with checkpoints and logs in `folder`.

    Returns the module and the number of steps done. The module's model is `model` itself, unless
    FSDP sharded it. It is in evaluation mode on the CPU, complete in the run's first process, and
    its configuration's `loops` is the deepest depth that was trained. After a run in bf16 without
    sharding the matrices of its frozen linear layers are bf16: they are to be taken from where the
    model was loaded.

    Args:
        advice: how to resume after a stop, for messages.
        resume: continue from the newest checkpoint in `folder`.
        until: the last step, if a finished run continues beyond its configured steps; the learning
            rate stays at its final value.
        callbacks: Lightning's, such as a progress display.
        report: called with a line for each choice ("attention: sdpa, ...").
        watch: called with each line of metrics.jsonl.

    Raises `Interrupted` after a Ctrl-C (the state is saved), `NotFinite` for a loss that is NaN or
    infinite, `DataError` for unusable data or checkpoints, `LooptxError` if a checkpoint can't be
    written or another process is gone.
    """
    check_memory_use(model.config, config, report)
    # A short run gets at least one line of metrics and one validation.
    config = replace(
        config,
        log_every=min(config.log_every, config.steps),
        val_every=min(config.val_every, config.steps),
    )
    last_step = until or config.steps
    device = best_device()
    precision, why = choose_precision(config.precision, device, config.sharding)
    _log.info("precision: %s, %s", precision, why)
    backend = choose_backend(
        config.attention, device, torch.bfloat16 if precision == "bf16" else torch.float32
    )
    _log.info("attention: %s, %s", backend.name, backend.reason)
    model.attend = backend.attend
    gathered = None
    if config.sharding == "fsdp":
        from looptx_core.parallel.fsdp import Gathered

        module: LoopedLM = ShardedLM(model, config)
        gathered = Gathered()
    else:
        module = LoopedLM(model, config)
    if precision == "bf16" and config.sharding == "none":
        cast_frozen(model, torch.bfloat16)
    # One that was loaded would have no dropout, and its encoders no loss of their own.
    module.train()

    checkpoints, metrics = folder / "checkpoints", JsonLines(folder / "metrics.jsonl", watch)
    start_from = None
    if resume:
        start_from, logged = resume_point(
            checkpoints,
            metrics.file,
            log_every=config.log_every,
            val_every=config.val_every,
            save_every=config.save_every,
            last_step=last_step,
        )
        if not logged:
            report(f"resumed: {metrics.file.name} lost records, so it has a gap")
        if start_from is not None and is_first():  # others start later, or end with this one
            verify_checkpoint(start_from)
    strategy = choose_strategy(
        model,
        config,
        folder=folder,
        device=device,
        bf16=precision == "bf16",
        report=report,
        advice=advice,
    )
    sharded = shards_optimizer(config)
    if sharded and config.optimizer == "muon":
        report("optimizer: adamw, as muon needs the whole matrices that are cut here")
    begin_at = step_of(start_from) if start_from else 0
    if start_from is not None:
        report(f"resumed: at step {begin_at}, from {start_from}")
        _report_other_world_size(start_from, config, report)
    elif resume:
        report("resumed: no checkpoint yet, so from the start")

    trackers = [Tracker(name, folder, report) for name in asked(config.log)]

    def begin() -> None:
        for tracker in trackers:
            tracker.begin({**asdict(config), "model": model.config.to_dict()}, resume)
        metrics.begin(begin_at if resume else None)
        if config.steps <= begin_at < last_step:
            last_lr = config.lr * learning_rate_factor(config)(config.steps)
            metrics.mark_stretch(begin_at, last_step, last_lr)
        remove_partial(checkpoints)

    stop, final = StopCleanly(checkpoints, config.max_minutes), FinalCheckpoint(checkpoints)
    best = BestWeights(checkpoints / "best", metrics.file) if config.keep_best else None
    at_end = [gathered] if gathered else [final] if sharded else []
    ours = [*callbacks, stop, AtSetup(begin), *at_end, *([best] if best else [])]
    if config.profile:
        if last_step - begin_at <= WARM_STEPS:
            report(f"profile: none, as a run's first {WARM_STEPS} steps are left out")
        ours.append(Profile(folder / "profile", config.profile, begin_at))
    with quiet_lightning(), own_environment(folder):
        trainer = build_trainer(
            config, last_step, folder, precision, device, strategy, ours, metrics, trackers
        )
        chosen = f"precision: {precision}; attention: {backend.name}"
        if device.type == "cpu":
            wanted = not config.compile
            kernels = enable_kernels(model.config, config, folder, wanted, resume, precision)
            _log.info("kernels: %s", kernels)
            chosen += f"; kernels: {'fused' if kernels.startswith('fused') else 'plain torch'}"
        report(chosen)
        if config.compile:
            compile_forward(model)
        try:
            with freed_memory_kept() if device.type == "cpu" else nullcontext():
                trainer.fit(module, datamodule=batches, ckpt_path=start_from, weights_only=True)
        except Exception as error:
            if stop.reason == "worker" or lost_worker(error):
                saved = max((step_of(file) for file in checkpoints.glob("step-*.ckpt")), default=0)
                raise Interrupted(
                    f"a process that reads data was killed (no memory left?); saved at step "
                    f"{saved} of {last_step}; {advice}"
                ) from error
            if isinstance(error, OSError):
                raise LooptxError(
                    f"cannot save to {checkpoints}: {error.strerror or error}; {remedy(error)}, "
                    f"and {advice}"
                ) from error
            if lost_peer(error):
                raise LooptxError(f"another process of this run is gone; {advice}") from error
            raise
        finally:
            stop.restore_signals()
            if swap := getattr(strategy, "swap", None):
                swap.close()
            fused.enable_fused(False)
            uncompile_forward(model)
    if stop.reason == "interrupted":
        left = (last_step - trainer.global_step) * (time.monotonic() - stop.begun)
        left /= max(1, trainer.global_step - begin_at)
        raise Interrupted(
            f"stopped and saved at step {trainer.global_step} of {last_step}; {advice} "
            f"(about {left / 60:.1f} minutes left)"
        )
    if final.saved is not None and trainer.is_global_zero:
        from looptx_core.parallel.deepspeed.zero import make_plain

        make_plain(module, Checkpoint(final.saved).weights())
    if gathered:
        model = module.model = gathered.model(model)
    else:
        model.to(torch.device("cpu"))
    if best and (found := best.load(module)):
        module.best_step = found
        report(f"best: step {found}, held-out loss {best.lowest:.4f}; the model is made of it")
    module.swapped, module.begun_at = final.swapped, begin_at
    model.config = replace(model.config, loops=module.schedule.deepest)
    model.eval()
    return module, trainer.global_step


def _report_other_world_size(
    checkpoint: Path, config: RunConfig, report: Callable[[str], object]
) -> None:
    """Report if another number of processes saved the checkpoint."""
    before = processes_of(checkpoint)
    if before not in (None, config.world_size):
        report(
            f"resumed: {counted(before or 0, 'process', 'processes')} saved and "
            f"{config.world_size} go on; weights, moments "
            "and the place in the data are the same, but sums over processes are ordered anew, and "
            "dropout and depths by loss are drawn anew, so the run is another to the last bits"
        )
