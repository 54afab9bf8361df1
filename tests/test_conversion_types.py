"""Conversion: the types that weights are stored in, and what a dry run tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_conversion import SHAPE, TOKENS, drawn, model

from looptx_cli.main import main
from looptx_core.checkpoint.folder import as_float, load_model, save_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.conversion.run import convert
from looptx_core.conversion.ternary import pack_model
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model.storage import to_int8

__all__ = ["model"]


def test_number_types(model: Path, shards: Path, tmp_path: Path) -> None:
    result = convert(
        ConvertConfig(model=str(model), dtype="bf16", data=(str(shards),), out=str(tmp_path / "b"))
    )
    assert result.bits_per_weight == 16 and result.rise < 0.01
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_dry_run_tells_what_would_be_written(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base = load_model(model)
    save_model(Path("m8"), to_int8(base.model), base.tokenizer, exit_settings=base.exit, facts={})
    command = ["convert", "--dry-run", "--data", str(shards), "--json", "--model"]
    assert main([*command, str(model), "--dtype", "int8"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = load_file("m8/model.safetensors").values()
    assert found["bytes_after"] == sum(t.numel() * t.element_size() for t in stored)
    assert found["seconds"] is None and found["out"] == "small-int8"
    monkeypatch.setattr("looptx_core.training.trial.fit", lambda *_, **how: _steps(how))
    assert main([*command, "m8", "--to-bitnet", "--finetune-steps", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "train 7 steps" in found["does"][1] and found["seconds"] == pytest.approx(7 * 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["m8"]


def _steps(how: dict[str, Any]) -> None:
    how["callbacks"][0].ends = [1.0, 1.5, 2.0]


def test_int8_is_stored_and_runs(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the bytes, for a loss that moves by little; back in floats it is the same."""
    monkeypatch.setattr("looptx_core.conversion.source.BATCH", 4)
    monkeypatch.setattr("looptx_core.conversion.source.VAL_BATCHES", 1)
    out, again = tmp_path / "m8", tmp_path / "floats"
    common = {"data": (str(shards),)}
    result = convert(ConvertConfig(model=str(model), dtype="int8", out=str(out), **common))
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.int8, torch.float32}
    assert "head.weight" not in stored, "tied matrices are stored once"
    floats = sum(t.numel() for name, t in load_file(model / "model.safetensors").items())
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 4 * floats / 2.5
    assert 8 < result.bits_per_weight < 10 and abs(result.rise) < 0.01
    assert result.memory_after < result.memory_before / 2

    whole, small = load_model(model), load_model(out)
    assert small.config.linear == "int8" and small.model.head.weight.dtype == torch.int8
    with torch.no_grad():
        logits = [m.model(TOKENS, 4).logits for m in (whole, small)]
    gap = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < gap < 0.1
    # What the kernel makes of float weights by --precision int8 are the same numbers.
    ask = GenerationOptions(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    engines = [Engine(whole.model, whole.tokenizer, whole.exit, precision="int8"),
               Engine(small.model, small.tokenizer, whole.exit)]  # fmt: skip
    texts = [[step.id for step in e.complete(["Call"], ask)[0].tokens] for e in engines]
    assert texts[0] == texts[1]
    assert engines[1].kernel == "native, int8 weights, a scale for each row"

    convert(ConvertConfig(model=str(out), dtype="float32", out=str(again), **common))
    back = load_model(again).model
    with torch.no_grad():
        assert (back(TOKENS, 4).logits - logits[1]).abs().max() < 1e-5
    ternary = replace(SHAPE, linear="ternary")
    save_model(tmp_path / "t", pack_model(drawn(ternary)), whole.tokenizer,
               exit_settings=whole.exit, facts={})  # fmt: skip
    with pytest.raises(UsageError, match="ternary, smaller than int8"):
        convert(ConvertConfig(model=str(tmp_path / "t"), dtype="int8", **common))
    engine = Engine(load_model(tmp_path / "t").model, whole.tokenizer)
    assert engine.kernel == "native, ternary weights, two bits each"


def test_an_int8_base_takes_adapters(model: Path, tmp_path: Path) -> None:
    """In floats, as the adapter's own numbers are."""
    from looptx_core.finetuning.adapters import attach, load_adapter, save_adapter

    out, whole = tmp_path / "m8", load_model(model)
    save_model(out, to_int8(whole.model), whole.tokenizer, exit_settings=whole.exit, facts={})
    base = as_float(load_model(out))
    peft = attach(base.model, FinetuneConfig(lora=True))
    save_adapter(tmp_path / "fit", peft, base, exit_settings=base.exit, facts={})
    loaded = load_adapter(load_model(out), tmp_path / "fit")
    with torch.no_grad():
        gap = loaded.model(TOKENS, 4).logits - load_model(out).model(TOKENS, 4).logits
    assert loaded.config.linear == "float" and gap.abs().max() < 1e-5
