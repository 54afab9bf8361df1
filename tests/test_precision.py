"""The number type that a run says is the one that it computes in."""

from __future__ import annotations

import torch

from looptx_core.backends.cpu.rounding import products_in_bf16
from looptx_core.training.hardware import choose_precision


def test_zero_on_a_cpu_says_that_it_computes_in_float32() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == ("bf16", "asked for")
    for stage in ("zero2", "zero3"):
        precision, why = choose_precision("bf16", cpu, stage)
        assert precision == "float32" and "not the bf16 that was asked for" in why
        assert "asked for" not in choose_precision("auto", cpu, stage)[1]
    assert choose_precision("bf16", torch.device("cuda"), "zero3") == ("bf16", "asked for")


def test_passes_that_overlap_leave_the_setting_as_it_was() -> None:
    matmul = torch.backends.mkldnn.matmul
    setting, first, second = matmul.fp32_precision, products_in_bf16(), products_in_bf16()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == setting
