"""Conversion: ternary layers against their formula, folders that transformers opens, bad input."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.huggingface import exported_sources, from_huggingface
from looptx_core.conversion.run import convert
from looptx_core.conversion.ternary import WarmUp, bits_per_weight, pack_model, to_ternary
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError, Interrupted, UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model import bitnet
from looptx_core.model.bitnet import BitLinear, PackedBitLinear, pack, ternary, unpack
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.run import train

# Widths that fill no byte of four weights, and d_ff and d_model that differ.
SHAPE = ModelConfig(
    vocab_size=400, d_model=30, n_heads=3, n_kv_heads=1, head_dim=10, d_ff=50, core_layers=1,
    max_loops=4, max_seq_len=128,
)  # fmt: skip
TOKENS = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(3))


def drawn(config: ModelConfig = SHAPE) -> LoopedTransformer:
    """A model whose weights are far from their small beginnings."""
    torch.manual_seed(1)
    model = LoopedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    exit_settings = ExitSettings(confidence=0.05, gain=-1.0)
    tokenizer = open_shards(shards).tokenizer
    save_model(folder, drawn(), tokenizer, exit_settings=exit_settings, facts={})
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, shards: Path) -> Path:
    out = model.parent / "small-hf"
    convert(ConvertConfig(model=str(model), to_hf=True, data=(str(shards),), out=str(out)))
    return out


# Ternary layers


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

    warm_up, trainer = WarmUp(4), Trainer()
    for trainer.global_step in range(6):
        warm_up.on_train_batch_start(trainer, layer, None, 0)  # type: ignore[arg-type]
        shares.append(layer.quantised)
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    layer.quantised = 0.5
    warm_up.on_train_end(trainer, layer)  # type: ignore[arg-type]
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

    assert torch.equal(bitnet._whole_product(Values(values), weights).long(), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("loops", [1, 4])
def test_a_packed_model_computes_the_same(loops: int) -> None:
    latent = drawn(replace(SHAPE, linear="ternary")).double()
    packed = pack_model(latent)
    assert {type(m) for m in packed.core.modules()} & {torch.nn.Linear, BitLinear} == set()
    with torch.no_grad():
        expected = latent(TOKENS, loops).logits
        torch.testing.assert_close(packed(TOKENS, loops).logits, expected, atol=1e-9, rtol=1e-9)
        packed.join()
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


def test_a_packed_folder_is_small_and_generates(model: Path, shards: Path, tmp_path: Path) -> None:
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
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        *("loss_before", "loss_after", "out"),
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


def test_a_ctrl_c_writes_nothing(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("stopped and saved")

    monkeypatch.setattr("looptx_core.conversion.run.fit", stopped)
    config = ConvertConfig(model=str(model), to_bitnet=True, data=(str(shards),),
                           out=str(tmp_path / "x"))  # fmt: skip
    with pytest.raises(Interrupted, match="was not written"):
        convert(config)
    assert not (tmp_path / "x").exists()


# transformers


CLEAN = """
import sys
sys.modules["looptx_core"] = sys.modules["looptx_cli"] = None  # as if they were not installed
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor(json.loads(sys.stdin.read()))
found = {}
with torch.no_grad():
    for loops in (1, 3):
        found[f"logits/{loops}"] = model(ids, loops=loops).logits
    found["logits/full"] = model(ids).logits
    padded = torch.cat([torch.full((1, 5), tokenizer.pad_token_id), ids[1:, 5:]], 1)
    both, mask = torch.cat([ids[:1], padded]), torch.ones_like(ids)
    mask[1, :5] = 0
    found["padded"] = model(both, attention_mask=mask, loops=3).logits[1, 5:]
    found["short"] = model(ids[1:, 5:], loops=3).logits[0]
greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
for name, loops in (("fixed", {"loops": 3}), ("auto", {})):
    for row in (0, 1):
        found[f"{name}/{row}"] = model.generate(ids[row:row + 1], **greedy, **loops)
    found[f"{name}/batch"] = model.generate(both, attention_mask=mask, **greedy, **loops)
    found[f"{name}/alone"] = model.generate(ids[1:, 5:], **greedy, **loops)
found["uncached"] = model.generate(ids[:1], use_cache=False, loops=3, **greedy)
beams = {"num_beams": 3, "loops": 2, **greedy}
found["beams"] = model.generate(ids, **beams)
found["beams/uncached"] = model.generate(ids, use_cache=False, **beams)
loss = model(ids, labels=ids).loss
loss.backward()
found["loss"] = loss.detach()
model.save_pretrained(out + "/again"), tokenizer.save_pretrained(out + "/again")
torch.save(found, out + "/found.pt")
"""


def run_clean(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(folder), str(out)],
        input=json.dumps(TOKENS.tolist()), capture_output=True, text=True,
        env={"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(out / "found.pt", weights_only=True)


def test_transformers_alone_opens_it(model: Path, exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run_clean(exported, tmp_path)
    loaded = load_model(model)
    with torch.no_grad():
        for loops, name in ((1, "1"), (3, "3"), (4, "full")):
            gap = found[f"logits/{name}"] - loaded.model(TOKENS, loops).logits
            assert gap.abs().max() < 1e-5
        logits = loaded.model(TOKENS, 4).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    assert abs(found["loss"] - expected) < 1e-5
    assert (found["padded"] - found["short"]).abs().max() < 1e-4
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    depths = set()
    for name, loops in (("fixed", 3), ("auto", "auto")):
        options = GenerationOptions(loops=loops, temperature=0, max_new_tokens=10, ignore_eos=True)
        ours = engine.complete(TOKENS.tolist(), options)
        for row, generation in enumerate(ours):
            assert found[f"{name}/{row}"][0, 17:].tolist() == [s.id for s in generation.tokens]
            depths |= {(name, step.loops) for step in generation.tokens[1:]}
        assert torch.equal(found[f"{name}/batch"][:1], found[f"{name}/0"])
        assert torch.equal(found[f"{name}/batch"][1, 5:], found[f"{name}/alone"][0])
    assert len({loops for name, loops in depths if name == "auto"}) > 1  # it does exit early
    assert torch.equal(found["uncached"], found["fixed/0"])
    assert torch.equal(found["beams"], found["beams/uncached"])
    # Saved again by transformers, it comes back whole.
    for folder in (exported, tmp_path / "again"):
        back = from_huggingface(folder)
        assert back.config == loaded.config and back.exit == loaded.exit
        theirs, ours = back.model.state_dict(), loaded.model.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_ternary_model_in_transformers(model: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "hf"
    convert(
        ConvertConfig(model=str(model), to_bitnet=True, direct=True, to_hf=True,
                      data=(str(shards),), out=str(out), shard_size="40KB")
    )  # fmt: skip
    assert len(list(out.glob("*.safetensors"))) > 1
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    back = from_huggingface(out)
    assert back.config.linear == "packed"
    with torch.no_grad():
        gap = theirs(TOKENS, loops=3).logits - back.model(TOKENS, 3).logits
    assert gap.abs().max() < 1e-5


def test_the_exported_code_is_the_models_own(exported: Path) -> None:
    root = Path(importlib.import_module("looptx_core").__file__ or "").parent
    names = {file.name for file in exported.glob("*.py")}
    assert names == set(exported_sources()) and {"modeling_looptx.py", "model_loop.py"} <= names
    # Nothing that comes without transformers; Pillow, for one, does not.
    for text in exported_sources().values():
        trees = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
        outer = {alias.name for node in trees for alias in node.names}
        outer |= {node.module or "" for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.ImportFrom) and not node.level}  # fmt: skip
        roots = {name.split(".")[0] for name in outer} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "transformers", "tokenizers", "flash_attn"}
    for name in names - {"modeling_looptx.py"}:
        parts = name.removesuffix(".py").split("_", 1)
        source = root.joinpath(*parts).with_suffix(".py")
        theirs, ours = (file.read_text().splitlines() for file in (exported / name, source))
        changed = [(a, b) for a, b in zip(theirs, ours, strict=True) if a != b]
        for new, old in changed:
            match = re.fullmatch(r"\s*from looptx_core\.([\w.]+) (import .+)", old)
            assert match and new.strip() == f"from .{match[1].replace('.', '_')} {match[2]}"
    settings = json.loads((exported / "config.json").read_text())
    assert len(settings["tested_with_transformers"]) == 2
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card and "looptx generate" not in card
    assert f"transformers {settings['tested_with_transformers'][0]} to" in card


def test_other_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, "looptx_core.conversion.modeling_looptx", raising=False)
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    with pytest.raises(ImportError, match=r"tested with transformers .* not 6.1.0; pip install"):
        importlib.import_module("looptx_core.conversion.modeling_looptx")


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_plain_model_becomes_one_loop(kind: str, shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
        rope_theta=50_000.0, max_position_embeddings=64, tie_word_embeddings=kind == "Qwen3",
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "plain"
    theirs.save_pretrained(folder)
    open_shards(shards).tokenizer.save(str(folder / "tokenizer.json"))
    out = tmp_path / "ours"
    assert (
        main(["convert", "--from-hf", str(folder), "--data", str(shards), "--out", str(out)]) == 0
    )
    ours = load_model(out)
    assert (ours.config.prelude_layers, ours.config.core_layers) == (1, 3)
    with torch.no_grad():
        gap = ours.model(TOKENS, 1).logits - theirs(TOKENS).logits
    assert gap.abs().max() < 1e-4
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    with pytest.raises(DataError, match="no place for"):
        from_huggingface(folder)


# Adapters, number types, bad input


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Callable[..., Path]:
    from looptx_core.finetuning.adapters import attach, save_adapter

    def make(**how: bool) -> Path:
        base = load_model(model)
        peft = attach(base.model, FinetuneConfig(**how))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        save_adapter(tmp_path / "adapter", peft, base, exit_settings=base.exit, facts={})
        return tmp_path / "adapter"

    return make


def test_an_adapter_is_merged(
    model: Path, shards: Path, tmp_path: Path, adapter: Callable[..., Path]
) -> None:
    from looptx_core.finetuning.merge import merge_adapter

    folder = adapter(lora=True)
    out = tmp_path / "merged"
    args = ["convert", "--merge-adapter", "--adapter", str(folder), "--data", str(shards)]
    assert main([*args, "--out", str(out)]) == 0
    merged, expected = load_model(out).model, merge_adapter(model, folder)
    with torch.no_grad():
        gap = merged(TOKENS, 4).logits - expected(TOKENS, 4).logits
        moved = merged(TOKENS, 4).logits - load_model(model).model(TOKENS, 4).logits
    assert gap.abs().max() < 1e-5 < 1e-2 < moved.abs().max()


def test_a_merge_that_would_lose_something(
    model: Path, shards: Path, tmp_path: Path, adapter: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = ["convert", "--merge-adapter", "--data", str(shards), "--out", str(tmp_path / "x")]
    folder = adapter(lora_per_loop=True)
    assert main([*args, "--adapter", str(folder)]) == 2
    assert "an adapter for each of 4 loops" in capsys.readouterr().err
    other = tmp_path / "other"
    tokenizer = load_model(model).tokenizer
    save_model(other, LoopedTransformer(SHAPE), tokenizer, exit_settings=ExitSettings(), facts={})
    folder = adapter(lora=True)
    assert main([*args, "--adapter", str(folder), "--model", str(other)]) == 4
    assert "another base" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_number_types(model: Path, shards: Path, tmp_path: Path) -> None:
    result = convert(
        ConvertConfig(model=str(model), dtype="bf16", data=(str(shards),), out=str(tmp_path / "b"))
    )
    assert result.bits_per_weight == 16 and result.rise < 0.01
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {
        torch.bfloat16
    }


BAD = {
    "nothing": ([], 2, "nothing to convert"),
    "direct alone": (["--direct", "--dtype", "bf16"], 2, "--to-bitnet"),
    "adapter alone": (["--adapter", "a", "--dtype", "bf16"], 2, "go together"),
    "two sources": (["--from-hf", "a", "--model", "b"], 2, "leave --model"),
    "no such folder": (["--from-hf", "nowhere"], 4, "check --from-hf"),
    "not ours": (["--from-hf", "bert"], 4, "what --to-hf wrote"),
    "a pickle": (["--to-hf", "--model", "pickled"], 4, "safetensors.torch.save_file"),
    "a pickle of transformers": (["--from-hf", "llama"], 4, "safetensors.torch.save_file"),
    "taken": (["--to-hf", "--model", "small", "--out", "bert"], 2, "--overwrite"),
    "no model": (
        ["--to-hf", "--model", "small", "--out", "text", "--overwrite"],
        2,
        "not replaced",
    ),
    "steps": (["--to-bitnet", "--finetune-steps", "0"], 2, "must be above 0"),
    "shards": (
        ["--to-hf", "--model", "small", "--out", "x", "--shard-size", "much"],
        2,
        "shard_size",
    ),
    "exported": (["--to-hf", "--model", "small-hf"], 4, "convert --from-hf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, model: Path, exported: Path, shards: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(model)
    Path("small-hf").symlink_to(exported)
    Path("bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    Path("text").mkdir()
    Path("text/a.txt").write_text("mine")
    for name in ("pickled", "llama"):
        Path(name).mkdir()
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                Path(name, file.name).write_bytes(file.read_bytes())
        torch.save({}, Path(name) / "pytorch_model.bin")
    plain = {
        "model_type": "llama", "vocab_size": 400, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "intermediate_size": 8, "head_dim": 8,
    }  # fmt: skip
    Path("llama/config.json").write_text(json.dumps(plain))
    flags, code, what = BAD[case]
    assert main(["convert", *flags, "--data", str(shards)]) == code
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert what in line and line.startswith("looptx: error:") and out == ""
    assert Path("text/a.txt").read_text() == "mine"


def test_names_of_what_was_done() -> None:
    assert ConvertConfig(to_bitnet=True).suffix == "bitnet"
    assert ConvertConfig(to_bitnet=True, to_hf=True, dtype="bf16").suffix == "bitnet-bf16-hf"
    with pytest.raises(UsageError):
        ConvertConfig()


def test_packed_layers_say_what_they_are() -> None:
    assert "2 bits a weight" in repr(PackedBitLinear(5, 3, torch.nn.Identity()))
