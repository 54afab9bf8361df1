"""The control of a looped training: the same model trained on without loops, for as many FLOPs.

Without it a gain from loops can't be told from one that more training alone would have brought.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.data.sample import sample_text
from looptx_core.training.evaluate import evaluate_loops
from looptx_core.training.objective import training_flops
from looptx_core.training.teacher import FIRST_LOOP

_LOOKED_AT = 8  # batches, for the share of targets that count


@dataclass(frozen=True)
class Control:
    """What the control reached, on the same held-out data."""

    folder: str
    steps: int
    flops: float
    loss: float
    """Nats a token."""
    accuracy: float
    """Of the next token."""
    exact_match: float | None = None
    """Share of the held-out answers that are right; None where the data has none."""
    text_loss_before: tuple[float, ...] = ()
    """On the bundled text, which shows what was forgotten: by loop, of the base. Nats a token."""
    text_loss_by_loop: tuple[float, ...] = ()
    """The same, of the looped model."""
    text_loss: float | None = None
    """The same, of the control."""


def text_loss(loaded: LoadedModel, loops: int) -> tuple[float, ...]:
    """On some of the bundled text, by loop; nats a token."""
    tokens = sample_text(loaded.tokenizer, loaded.config.max_seq_len)
    return tuple(evaluate_loops(loaded.model.float().eval(), tokens, loops).loss_by_loop)


def counted_share(batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The share of targets that count, by the first batches."""
    shares = [
        1.0 if "weights" not in batch else float((batch["weights"] > 0).float().mean())
        for batch in itertools.islice(batches, _LOOKED_AT)
    ]
    return sum(shares) / max(1, len(shares))


def control_changes(
    config: RunConfig, model: ModelConfig, flops: float, counted: float
) -> dict[str, object]:
    """What differs in the settings of the control, by key.

    flops: of the looped training. counted: the share of targets that count.
    """
    step = config.batch_size * config.seq_len * training_flops(
        model, config.seq_len, 1, 1, counted
    )  # fmt: skip
    changes: dict[str, object] = {
        "loop_schedule": "fixed", "loops": 1, "max_loops": 1, "control": False, "epochs": None,
        "max_minutes": None, "steps": max(1, round(flops / step)),
    }  # fmt: skip
    if config.teacher == FIRST_LOOP:
        changes["teacher"] = None
    if getattr(config, "lora_per_loop", False):
        changes |= {"lora_per_loop": False, "lora": True}
    if getattr(config, "lora_layers", "all") == "later":
        changes["lora_layers"] = "core"
    return changes
