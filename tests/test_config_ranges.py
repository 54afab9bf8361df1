"""Every number has its range, which is checked before a run's folder is made."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from looptx_cli.main import main
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.inspection import InspectConfig
from looptx_core.config.ranges import RANGES
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError
from looptx_core.training.optimizer import clip_by_part

SCHEMAS = {
    TrainConfig: {},
    FinetuneConfig: {},
    ConvertConfig: {"dtype": "bf16"},
    InspectConfig: {},
    TokenizeConfig: {},
}


def numbers(schema: type) -> list[str]:
    hints = get_type_hints(schema)
    kinds = {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in fields(schema)}
    return [name for name, kind in kinds.items() if int in kind or float in kind]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_has_a_range(schema: type) -> None:
    for name in numbers(schema):
        low, high = (float(part) for part in RANGES[name][1:-1].split(", "))
        wrong: list[Any] = [] if math.isinf(low) else [low - 1]
        wrong += [low] if RANGES[name][0] == "(" else []
        wrong += [] if math.isinf(high) else [high + 1 if high < 1e9 else int(high)]
        wrong += [high] if RANGES[name][-1] == ")" else []
        wrong += [math.nan]
        for value in wrong:
            with pytest.raises(UsageError, match=f"^`{name}` must "):
                schema(**SCHEMAS[schema], **{name: value})


FLAGS = ["--clip -1", "--seed -1", "--workers -1", "--beta2 1", "--deeper-share 2", "--warmup 1.5",
         "--min-lr -1", "--max-minutes 0", "--micro-batch 0", "--loops 0", "--mean-loops 0",
         "--weight-decay -1", "--explore 2", "--lr inf"]  # fmt: skip


@pytest.mark.parametrize("flags", [*FLAGS, "--lora-dropout 1.5", "--lora-rank 0"])
def test_no_folder_is_made(flags: str, workplace: Path, capsys: pytest.CaptureFixture) -> None:
    command = "finetune" if "lora" in flags else "train"
    assert main([command, *flags.split()]) == 2
    err = capsys.readouterr().err.splitlines()
    # YAML and flags take no infinite number at all, before any range is looked at.
    assert len(err) == 1 and ("expected a number" if "inf" in flags else "must ") in err[0]
    assert not list(workplace.iterdir())


def test_a_clip_of_0_clips_nothing() -> None:
    from test_training_objective import MODEL

    from looptx_core.model.loop import LoopedTransformer

    model = LoopedTransformer(MODEL)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    norm = clip_by_part(model, 0.0)
    assert norm > 1 and all(bool((p.grad == 3).all()) for p in model.parameters())
    clip_by_part(model, 1.0)
    trunk = [p.grad.norm() for p in model.trunk_parameters()]
    assert torch.stack(trunk).norm() == pytest.approx(1, abs=1e-3)
