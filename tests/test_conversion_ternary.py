"""Ternary layers against their formula, packed models, and training through the rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_conversion import SHAPE, TOKENS, drawn

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.run import convert
from looptx_core.conversion.ternary import WarmUp, bits_per_weight, pack_model, to_ternary
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError
from looptx_core.generation.engine import Engine
from looptx_core.model import bitnet
from looptx_core.model.bitnet import BitLinear, TernaryLinear, pack, ternary, unpack
from looptx_core.training.run import train


@pytest.mark.parametrize("width", range(1, 10))
def test_packing_is_undone(width: int) -> None:
    values = torch.randint(-1, 2, (7, width))
    packed = pack(values)
    assert packed.shape == (7, -(-width // 4)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, width).long(), values)


def test_a_bitlinear_is_its_formula() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(6, 3, torch.nn.Identity()).double(), torch.randn(2, 6).double()
    expected = torch.zeros(2, 3).double()
    mean = sum(abs(float(w)) for w in layer.weight.detach().flatten()) / 18
    for row in range(2):
        most = max(abs(float(v)) for v in x[row])
        for out in range(3):
            for place in range(6):
                weight = max(-1, min(1, round(float(layer.weight.detach()[out, place]) / mean)))
                level = round(float(x[row, place]) * 127 / most)
                expected[row, out] += weight * mean * level * most / 127
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def test_gradients_go_straight_through_the_rounding() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(6, 3, torch.nn.Identity()), torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    weights, scale = ternary(layer.weight.detach())
    torch.testing.assert_close(x.grad, (weights * scale).sum(0).expand(2, 6))
    values, level = bitnet.int8_by_token(x.detach())
    torch.testing.assert_close(layer.weight.grad, (values * level).sum(0).expand(3, 6))


def test_a_warm_up_begins_at_the_float_layer() -> None:
    layer, x = BitLinear(6, 3, torch.nn.Identity()), torch.randn(2, 6)
    layer.quantised = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    shares = []

    class Trainer:
        global_step = 0

    warm_up, trainer = WarmUp(4), cast(Any, Trainer())
    for trainer.global_step in range(6):
        warm_up.on_train_batch_start(trainer, cast(Any, layer), None, 0)
        shares.append(layer.quantised)
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    layer.quantised = 0.5
    warm_up.on_train_end(trainer, cast(Any, layer))
    assert layer.quantised == 1.0


def test_whole_number_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = torch.full((3, 4096), 127.0), torch.ones(16, 4096, dtype=torch.int8)
    expected = torch.full((3, 16), 127 * 4096)
    assert torch.equal(bitnet._whole_product(values, weights).long(), expected)

    class Elsewhere:
        """A device with no product of whole numbers."""

        type = "mps"

    class Values:
        def __init__(self, of: torch.Tensor) -> None:
            self.of, self.device = of, Elsewhere()

        def __len__(self) -> int:
            return len(self.of)

        def float(self) -> torch.Tensor:
            return self.of

    found = bitnet._whole_product(cast(Any, Values(values)), weights)
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("loops", [1, 4])
def test_a_packed_model_computes_the_same(loops: int) -> None:
    latent = drawn(replace(SHAPE, linear="ternary")).double()
    packed = pack_model(latent)
    assert {type(m) for m in packed.core.modules()} & {torch.nn.Linear, BitLinear} == set()
    with torch.no_grad():
        expected = latent(TOKENS, loops).logits
        torch.testing.assert_close(packed(TOKENS, loops).logits, expected, atol=1e-9, rtol=1e-9)
        packed.fuse_projections()
        joined = packed(TOKENS, loops).logits
        torch.testing.assert_close(joined, expected, atol=1e-9, rtol=1e-9)
    # With a gradient asked for, as an adapter's training does, there are float products.
    packed.embedding.weight.requires_grad_()
    torch.testing.assert_close(packed(TOKENS, loops).logits, expected, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        assert packed.float()(TOKENS, loops).logits.dtype == torch.float32


def test_rounding_keeps_the_size_of_outputs(shards: Path) -> None:
    float_model = drawn()
    batch = {"tokens": TOKENS}
    latent = to_ternary(float_model, [batch])
    assert latent.config.linear == "ternary"
    for layer in latent.modules():
        if isinstance(layer, BitLinear):
            layer.quantised = 0.0
    with torch.no_grad():
        new, old = latent(TOKENS, 4).logits, float_model(TOKENS, 4).logits
    # What is left are the new norms, which start at the mean size of their input.
    assert 0.8 < float(new.std() / old.std()) < 1.25
    assert float((new - old).norm() / old.norm()) < 0.5
    weights = [latent.get_parameter(name) for name in ("core.0.mlp.down_proj.norm.weight",)]
    assert all(len(weight.unique()) == 1 and weight[0] != 1 for weight in weights)


def test_a_packed_folder_is_small_and_generates(shards: Path, tmp_path: Path) -> None:
    latent = drawn(replace(SHAPE, linear="ternary"))
    packed = pack_model(latent)
    tokenizer = open_shards(shards).tokenizer
    folder = save_model(
        tmp_path / "a", packed, tokenizer, exit_settings=ExitSettings(), facts={},
        dtype=torch.bfloat16,
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert tensors["core.0.attention.q_proj.packed"].dtype == torch.uint8
    assert tensors["embedding.weight"].dtype == torch.bfloat16
    assert not any(name.endswith("proj.weight") for name in tensors)
    loaded = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        gap = loaded.model(TOKENS, 3).logits - packed(TOKENS, 3).logits
    assert gap.abs().max() < 0.2  # of bf16
    exact = save_model(tmp_path / "b", packed, tokenizer, exit_settings=ExitSettings(), facts={})
    engines = [Engine(m, tokenizer) for m in (latent, load_model(exact).model)]
    options = GenerationOptions(loops=3, temperature=0, max_new_tokens=12, ignore_eos=True)
    one, two = (engine.complete(["the sea", "a"], options) for engine in engines)
    assert [[s.id for s in g.tokens] for g in one] == [[s.id for s in g.tokens] for g in two]
    # Floats where bytes are expected.
    tensors["core.0.attention.q_proj.packed"] = tensors["core.0.attention.q_proj.packed"].float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"asks for torch\.uint8"):
        load_model(folder)


def test_training_through_the_rounding_repairs(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(
        TrainConfig(steps=20, seq_len=64, batch_size=16, val_batches=1, precision="float32"),
        replace(SHAPE, d_model=64, head_dim=32, n_heads=2, d_ff=128, max_loops=2),
        data=shards,
        folder=tmp_path,
    ).model_folder
    common = ["convert", "--to-bitnet", "--model", str(trained), "--data", str(shards), "--json"]
    out = {}
    for name, flags in (("direct", ["--direct"]), ("trained", ["--finetune-steps", "12"])):
        assert main([*common, "--out", str(tmp_path / name), *flags]) == 0
        captured = capsys.readouterr()
        out[name] = json.loads(captured.out)
    assert ("loss rose by" in captured.err) == (out["trained"]["loss_after"]
                                                > 1.1 * out["trained"]["loss_before"])  # fmt: skip
    assert set(out["direct"]) == {
        *("schema_version", "bytes_before", "bytes_after", "bits_per_weight"),
        *("loss_before", "loss_after", "out", "core", "spans", "loops", "logit_difference"),
        *("injection", "half_steps"),
    }
    for found in out.values():
        assert found["bits_per_weight"] < 2.1 and found["bytes_after"] < found["bytes_before"]
        assert found["loss_before"] == out["direct"]["loss_before"]
    assert out["trained"]["loss_after"] < out["direct"]["loss_after"] - 0.1
    loaded = load_model(tmp_path / "trained")
    assert loaded.config.linear == "packed" and loaded.facts["ternary"] == "trained 12 steps"
    assert abs(loaded.facts["loss_by_loop"][-1] - out["trained"]["loss_after"]) < 1e-3
    again = ["convert", "--to-bitnet", "--model", str(tmp_path / "trained"), "--out", "x"]
    assert main(again) == 2
    assert "ternary already" in capsys.readouterr().err


def test_training_ternary_from_scratch(shards: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=8, seq_len=64, batch_size=4, val_batches=1, bitnet=True)
    result = train(config, SHAPE, data=shards, folder=tmp_path)
    loaded = load_model(result.model_folder)
    assert loaded.config.linear == "ternary"
    assert bits_per_weight(loaded.model) == 32
    packed = convert(
        ConvertConfig(
            model=str(tmp_path), to_bitnet=True, data=(str(shards),), out=str(tmp_path / "p")
        )
    )
    # It is ternary by training: packing it changes nothing, and needs no training.
    assert packed.steps == 0 and bits_per_weight(load_model(packed.out).model) < 2.4
    for before, after in zip(packed.loss_by_loop_before, packed.loss_by_loop):
        assert abs(before - after) < 1e-4


def test_packed_layers_say_what_they_are() -> None:
    assert "2 bits a weight" in repr(TernaryLinear(5, 3, torch.nn.Identity()))
