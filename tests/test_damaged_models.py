"""Model and adapter folders that somebody damaged, or made to harm: one line, exit code 4."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from looptx_core.api import load
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.header import read_header
from looptx_core.checkpoint.registry import resolve_adapter, resolve_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError, UsageError
from looptx_core.evaluation.scoring import Scorer


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        place = folder / file
        content = json.loads(place.read_text()) if place.exists() else {}
        place.write_text(json.dumps(content | values))

    return spoil


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def fill(value: float, name: str = "core.0.mlp.up_proj.weight") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].flatten()[7] = value
        save_file(weights, folder / "model.safetensors")

    return spoil


def flip_header(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[20] ^= 0x80
    (folder / "model.safetensors").write_bytes(raw)


INDEX = "model.safetensors.index.json"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million layers": (edit("config.json", core_layers=1_000_000), "core_layers is at most"),
    "thousands of layers": (edit("config.json", core_layers=9_999), "asks for 10,0"),
    "encoder layers": (edit("config.json", vision_layers=2**31), "vision_layers is at most"),
    "patches": (edit("config.json", max_patches=10**9), "max_patches"),
    "pixels": (edit("config.json", patch_size=4096, max_patches=1024), "pixels a picture"),
    "width": (edit("config.json", d_model=10**12), "d_model is at most"),
    "a wide layer": (edit("config.json", d_ff=1 << 20), "another model's"),
    "a large vocabulary": (edit("config.json", vocab_size=1 << 24), "another model's"),
    "a loop too many": (edit("config.json", max_loops=1 << 16), "another model's|asks for"),
    "text for a number": (edit("config.json", vocab_size="many"), "vocab_size: expected a whole"),
    "2^64": (edit("config.json", max_loops=2**64), "max_loops: expected a whole number"),
    "facts": (edit("config.json", facts=[1]), "facts must hold keys"),
    "a deep file": (write("config.json", b'{"a":' * 9999), "levels deep"),
    "exit": (edit("generation_config.json", exit=[1]), "exit: expected keys and values"),
    "temperature 0": (edit("generation_config.json", exit={"temperature": 0}), "above 0"),
    "temperature -1": (edit("generation_config.json", exit={"temperature": -1}), "above 0"),
    "an index with a number": (
        edit(INDEX, weight_map={"norm.weight": 5}), "5 is missing|expected text"
    ),
    "an index that is a list": (write(INDEX, b"[]"), "expected a JSON object"),
    "an index that leads out": (
        edit(INDEX, weight_map={"norm.weight": "../m/model.safetensors"}), "is missing"
    ),
    "NaN": (fill(float("nan")), "core.0.mlp.up_proj.weight holds NaN or infinity"),
    "infinity": (fill(float("-inf")), "holds NaN or infinity"),
    "a header's bit": (flip_header, "not a whole safetensors file"),
    "a short file": (write("model.safetensors", b"\x05\0\0"), "shorter than its header"),
    "a long header": (write("model.safetensors", b"\xff" * 64), "shorter than its header says"),
    "a template": (write("chat_template.jinja", b"\xff\xfe\0"), "UTF-16"),
    "tokens": (edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": 2**31 - 1},
               "merges": []}), "largest token id|not a tokenizer|has .* tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_model_is_refused_at_once(tiny: Path, tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    folder = shutil.copytree(tiny, tmp_path / "m")
    spoil(folder)
    began = time.process_time()
    with pytest.raises(DataError, match=message) as caught:
        load_model(folder)
    assert time.process_time() - began < 5
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_that_overflow_are_told_where_they_are_used(tiny: Path, tmp_path: Path) -> None:
    """Each weight is a number, so that only what is made of them tells."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.fill_(3e38) if "mlp" in name else tensor
               for name, tensor in weights.items()}, folder / "model.safetensors")  # fmt: skip
    (folder / "digests.json").unlink(missing_ok=True)
    for kernel in ("torch", "auto"):
        model = load(folder, kernel=kernel)
        for temperature in (0.0, 1.0):
            with pytest.raises(DataError, match="logits are no numbers"):
                model.generate("a", temperature=temperature, max_new_tokens=2)
    with pytest.raises(DataError, match="loss is not finite"):
        model.evaluate("some text")
    for depth in (1, "auto"):
        scorer = Scorer(model.engine, depth, GenerationOptions(), 2)
        with pytest.raises(DataError, match="logits are no numbers"):
            scorer.score([scorer.line([0, 5], [6])])


def test_the_header_is_what_the_file_holds(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    header, weights = read_header(file), load_file(file)
    assert {name: stored.shape for name, stored in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    assert all(stored.is_float for stored in header.values())


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_file_cut_short(tiny: Path, tmp_path: Path, cut: int) -> None:
    raw = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(raw[:cut])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(raw + b"\0")
    with pytest.raises(DataError, match="bytes where its header says"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "values", [{"max_patches": 10**9}, {"n_heads": 2**30}, {"max_loops": 10**9}, {"norm_eps": -1.0}]
)
def test_a_shape_that_nobody_has(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        ModelConfig(**values)


def finished(runs: Path, name: str, model: Path) -> Path:
    final = shutil.copytree(model, runs / name / "final")
    (runs / name / "config.yaml").write_text("steps: 1\n")
    return final


DAMAGED_RUNS: dict[str, Callable[[Path], None]] = {
    "deep": write("config.json", b'{"a":' * 9999),
    "cut weights": write("model.safetensors", b"\x05"),
    "not UTF-8": write("config.json", b"\xff"),
}


@pytest.mark.parametrize("case", DAMAGED_RUNS)
def test_a_damaged_run_does_not_hide_the_others(tiny: Path, tmp_path: Path, case: str) -> None:
    finished(tmp_path, "good", tiny)
    newer = finished(tmp_path, "newer", tiny)
    DAMAGED_RUNS[case](newer)
    os.utime(newer / "config.json", (2**31, 2**31))
    found = resolve_model(None, tmp_path)
    assert found.folder == tmp_path / "good" / "final"
    assert "left out: " in found.reason and "newer" in found.reason


def adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A folder in PEFT's format with one pair of matrices of rank 2."""
    folder.mkdir()
    own = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"],
        "base_model_name_or_path": str(base), **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(own))
    stem = "base_model.model.core.0.mlp.up_proj"
    weights = load_file(base / "model.safetensors")["core.0.mlp.up_proj.weight"]
    rows, width = weights.shape
    save_file(
        {
            f"{stem}.lora_A.weight": torch.ones(2, width),
            f"{stem}.lora_B.weight": torch.ones(rows, 2),
        },
        folder / "adapter_model.safetensors",
    )
    return folder


BAD_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "an invalid expression": ({"target_modules": "("}, "doesn't fit"),
    "a huge rank": ({"r": 10**9}, "rank 1,000,000,000"),
    "a bias that no layer has": ({"lora_bias": True}, "doesn't fit"),
    "rank 0": ({"r": 0}, "rank"),
    "rank as text": ({"r": "two"}, "r: expected a whole number"),
    "modules as keys": ({"target_modules": {}}, "target_modules: expected"),
    "another method": ({"peft_type": "PROMPT_TUNING"}, "peft_type: expected LORA"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_damaged_adapter_is_refused(tiny: Path, tmp_path: Path, case: str) -> None:
    from looptx_core.finetuning.adapters import load_adapter

    settings, message = BAD_ADAPTERS[case]
    folder = adapter(tmp_path / "a", tiny, **settings)
    with pytest.raises(DataError, match=message) as caught:
        load_adapter(load_model(tiny), folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("at", [0, 3, 9, 60, 200, -1])
def test_an_adapter_with_a_flipped_or_cut_file(tiny: Path, tmp_path: Path, at: int) -> None:
    from looptx_core.finetuning.adapters import load_adapter

    folder = adapter(tmp_path / "a", tiny)
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    for content in (raw[:at], raw[: at % len(raw)] + b"\xff" + raw[at % len(raw) + 1 :]):
        file.write_bytes(content)
        if at == -1 and len(content) == len(raw):
            continue  # a value's bit, which no format shows
        with pytest.raises(DataError, match="adapter"):
            load_adapter(load_model(tiny), folder)
    file.write_bytes(raw[:-4] + b"\0\0\xc0\x7f")
    with pytest.raises(DataError, match="NaN or infinity"):
        load_adapter(load_model(tiny), folder)


def test_adapters_that_name_each_other(tiny: Path, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", tiny), adapter(tmp_path / "other", tiny)
    for folder, base in ((one, other), (other, one)):
        edit("adapter_config.json", base_model_name_or_path=str(base))(folder)
    with pytest.raises(DataError, match="is an adapter too"):
        resolve_adapter(one)
    edit("adapter_config.json", base_model_name_or_path="a\0b")(one)
    with pytest.raises(DataError, match="names no base"):
        resolve_adapter(one)


def test_a_damaged_model_that_is_named_is_not_said_to_lack_weights(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not valid JSON"):
        resolve_model(tmp_path / "model", need=frozenset({"weights"}))
