"""The number type that a run says is the one that it computes in."""

from __future__ import annotations

import torch

from looptx_core.training.hardware import choose_precision


def test_zero_on_a_cpu_says_that_it_computes_in_float32() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == ("bf16", "asked for")
    for stage in ("zero2", "zero3"):
        precision, why = choose_precision("bf16", cpu, stage)
        assert precision == "float32" and "not the bf16 that was asked for" in why
        assert "asked for" not in choose_precision("auto", cpu, stage)[1]
    assert choose_precision("bf16", torch.device("cuda"), "zero3") == ("bf16", "asked for")
