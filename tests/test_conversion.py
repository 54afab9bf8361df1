"""Conversion: folders that transformers opens, merged adapters, number types, bad input."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.conversion.huggingface import exported_sources, from_huggingface
from looptx_core.conversion.pretrained import open_plain
from looptx_core.conversion.run import convert
from looptx_core.conversion.source_check import transformers_or_none
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError, Interrupted, UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

# Widths that fill no byte of four weights, and d_ff and d_model that differ.
SHAPE = ModelConfig(
    vocab_size=400, d_model=30, n_heads=3, n_kv_heads=1, head_dim=10, d_ff=50, core_layers=1,
    loops=2, max_loops=4, max_seq_len=128,
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
    found["logits/plain"] = model(ids).logits
    found["logits/auto"] = model(ids, loops="auto").logits
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
        for loops, name in ((1, "1"), (3, "3"), (None, "plain"), (2, "plain"), (4, "auto")):
            gap = found[f"logits/{name}"] - loaded.model(TOKENS, loops).logits
            assert gap.abs().max() < 1e-5
        logits = loaded.model(TOKENS).logits[:, :-1]
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
        assert roots <= {"torch", "numpy", "transformers", "tokenizers", "flash_attn"}
    sources = {"_".join(file.relative_to(root).parts): file for file in root.rglob("*.py")}
    for name in names - {"modeling_looptx.py"}:
        source = sources[name]
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
    (folder / "config.json").write_text(json.dumps(settings | {"bos_token_id": 1e-05}))
    with pytest.raises(DataError, match=r"does not open the source: .*bos_token_id"):
        transformers_or_none(lambda: open_plain(folder))
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


BAD = {
    "nothing": ([], 2, "nothing to convert"),
    "direct alone": (["--direct", "--dtype", "bf16"], 2, "--to-bitnet"),
    "int8 for others": (["--dtype", "int8", "--to-hf"], 2, "leave out --to-bitnet and --to-hf"),
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
