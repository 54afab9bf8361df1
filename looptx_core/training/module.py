"""The LightningModule: a looped model, its objective, its optimizer, and what it logs."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import re
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from looptx_core.config.run import RunConfig
from looptx_core.errors import DataError, LooptxError
from looptx_core.media.batch import from_entries, hide
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.strategy import Swapped, shards_optimizer
from looptx_core.training.evaluate import LoopEvaluation, evaluate_batch
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import (
    build_adamw,
    build_optimizer,
    clip_by_part,
    learning_rate_factor,
)
from looptx_core.training.teacher import Teacher


class LoopedLM(L.LightningModule):
    """Trains a `LoopedTransformer` in any Lightning Trainer.

    A batch is a mapping with `tokens`, (batch, length + 1) ids, and `ids`, (batch,) sample numbers.
    It may have `documents`, (batch, length), within which attention stays, `weights`, (batch,
    length), how much each target counts, and items of media as in `media.batch.to_entries`.

    After a validation `evaluation` holds loss, accuracy and confidence by loop. Checkpoints leave
    out frozen parameters.
    """

    def __init__(self, model: LoopedTransformer, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.schedule = LoopSchedule(config, model.config.max_loops)
        self.teacher = Teacher(config.teacher) if config.teacher else None
        self.evaluation: LoopEvaluation | None = None
        self.swapped: Swapped | None = None
        self.begun_at = 0  # the step that a resumed run went on from
        self.best_step: int | None = None  # whose weights were kept as the best
        self.flops: Tensor
        self.register_buffer("flops", torch.zeros((), dtype=torch.float64))
        self._parts: list[LoopEvaluation] = []
        self._micro_batches: list[Tensor] = []  # what each micro-batch of this step logs
        self._begun = self._tokens = 0.0
        self.strict_loading = not self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if not p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without frozen parameters and their quantisation."""
        state, frozen = super().state_dict(*args, **kwargs), self._frozen()
        # A quantised weight has further entries, such as `weight.absmax` and `SCB`.
        quantised = tuple(
            name.removesuffix("weight") for name, p in frozen.items() if not p.is_floating_point()
        )
        for key in [key for key in state if key in frozen or key.startswith(quantised)]:
            del state[key]
        return state

    def configure_optimizers(self) -> Any:
        build = build_adamw if shards_optimizer(self.config) else build_optimizer
        optimizer = build(self.model, self.config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(self.config))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        self._begun, self._tokens = time.monotonic(), 0.0

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        tokens, ids = batch["tokens"], batch["ids"]
        # Seeded by step and sample, so that a resumed run draws the same dropout masks.
        torch.manual_seed(hash((self.config.seed, self.global_step, int(ids[0]))) % 2**63)
        media = hide(from_entries(batch), self.config.hidden_shares)
        result = loop_loss(
            self.model,
            tokens,
            self.schedule,
            self.global_step,
            ids,
            documents=batch.get("documents"),
            weights=batch.get("weights"),
            media=media,
            loss_at=self.config.loss_at,
            loss_prior=self.config.loss_prior,
            recompute=self.config.grad_checkpointing,
            progress=self.global_step / max(1, self.config.steps),
            teacher=self.teacher,
            teacher_weight=self.config.teacher_weight,
        )
        loss = result.loss + result.confidence_loss
        if not math.isfinite(loss.item()):
            raise NotFinite(self.global_step + 1)
        self._tokens += tokens[:, 1:].numel() * self.trainer.world_size
        self.flops += result.flops * self.trainer.world_size
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._micro_batches = []
        figures = (result.deepest, result.mean_loops, result.confidence_error)
        self._micro_batches.append(torch.tensor([float(value) for value in figures]))
        if result.restored is not None:
            self.log("restored", result.restored, sync_dist=True)
        for name, value in result.by_labels.items():
            self.log(f"{name}_loss", value, sync_dist=True)
        names = ("train_loss", "mean_loops", "confidence_error")
        means = torch.stack(self._micro_batches).mean(0).to(self.device)
        self.log_dict(dict(zip(names, means)), prog_bar=True, sync_dist=True)
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if hasattr(self.trainer.strategy, "trunk_norm"):
            return  # ZeRO has the whole gradient only inside its own step, and clips it there
        norm = clip_by_part(self.model, self.config.clip)
        self.log("gradient_norm", norm)

    def on_train_batch_end(self, *_: Any) -> None:
        norm = getattr(self.trainer.strategy, "trunk_norm", None)
        if norm is not None:
            self.log("gradient_norm", norm)
        seconds = time.monotonic() - self._begun
        self.log("tokens_per_second", self._tokens / max(seconds, 1e-9), prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        self.log("flops", self.flops.float())

    def on_validation_epoch_start(self) -> None:
        self._parts = []

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        try:
            self._parts.append(evaluate_batch(self.model, batch, self.schedule.max_loops))
        except DataError as error:
            raise NotFinite(self.global_step) from error

    @property
    def validated(self) -> LoopEvaluation:
        """What the batches of a validation that is under way have shown."""
        return functools.reduce(operator.add, self._parts)

    def on_validation_epoch_end(self) -> None:
        total = self.validated
        self.evaluation, self._parts = total, []
        self.log("val_loss", total.loss_by_loop[-1], prog_bar=True, sync_dist=True)
        by_loop = {
            f"{name}/{loop}": value
            for name, values in (
                ("val_loss", total.loss_by_loop),
                ("val_accuracy", total.accuracy_by_loop),
                ("state_norm", total.norm_by_loop),
            )
            for loop, value in enumerate(values, start=1)
        }
        self.log_dict(by_loop, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain numbers only, so that loading needs no pickle.
        checkpoint["looptx"] = {
            "step": self.global_step,
            "processes": self.trainer.world_size,
            "accumulation": self.trainer.accumulate_grad_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rescale Lightning's counts of batches.

        They are counted in one process, and with another number of processes an optimizer step
        takes more or fewer of them.
        """
        if self._trainer is None:  # loaded without training
            return
        now = self.trainer.accumulate_grad_batches
        factor = now / checkpoint["looptx"].get("accumulation", now)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counters = [progress["total"], progress["current"]]
        counters += [v for v in checkpoint.values() if isinstance(v, dict) and "batches" in v]
        for counts in counters:
            for key in counts:
                counts[key] = round(counts[key] * factor)


class ShardedLM(LoopedLM):
    """A `LoopedLM` whose weights FSDP shards over the processes, once these are connected."""

    def configure_model(self) -> None:
        from looptx_core.parallel.fsdp import shard

        shard(self.model, self.device_mesh)


class NotFinite(LooptxError):
    """The loss became NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the loss is not finite at step {step}; checkpoints before it are kept; start "
            "a new run with a lower `lr` or another `seed`"
        )
        self.step = step


@contextlib.contextmanager
def quiet_lightning() -> Any:
    """Silence Lightning's tips and banners, which this project's users can't act on."""
    import logging
    import warnings

    names = ("lightning", "lightning.pytorch", "lightning.fabric")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for module in ("lightning", "deepspeed", "torch.distributed", "torch.utils.checkpoint"):
            warnings.filterwarnings("ignore", module=re.escape(module))
        yield
    for name, level in zip(names, levels):
        logging.getLogger(name).setLevel(level)
