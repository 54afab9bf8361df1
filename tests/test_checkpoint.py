"""The model folder: equal logits, whole or nothing, and every bad folder in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from looptx_core.checkpoint import folder as folder_module
from looptx_core.checkpoint.folder import load_model, save_model, update_generation_config
from looptx_core.checkpoint.registry import bundled_model, next_run_dir, resolve_model
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.model.loop import LoopedTransformer

pytestmark = pytest.mark.fast

FIXTURES = Path(__file__).parent / "fixtures"
SHAPE = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 32}
TEXT = ["the whale and the sea and the ship went round and round the sea, said the whale "] * 40
FACTS = {"data": "a | b", "steps": 3, "tokens": 4096, "seed": 0, "loss_by_loop": [3.5, 3.25]}
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, 280)


@pytest.fixture
def model() -> LoopedTransformer:
    torch.manual_seed(0)
    return LoopedTransformer(ModelConfig(vocab_size=280, **SHAPE)).eval()


def save(path: Path, model: LoopedTransformer, tokenizer: Tokenizer, **options) -> Path:
    settings = {"exit_settings": ExitSettings(), "facts": FACTS} | options
    return save_model(path, model, tokenizer, **settings)


@pytest.fixture
def saved(tmp_path: Path, model: LoopedTransformer, tokenizer: Tokenizer) -> Path:
    return save(tmp_path / "m", model, tokenizer)


def logits(model: LoopedTransformer) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, loops=3).logits


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in content.items() if v != "drop"}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", 8000])
def test_equal_logits(tmp_path: Path, tokenizer: Tokenizer, tied: bool, size: int | str) -> None:
    torch.manual_seed(1)
    model = LoopedTransformer(ModelConfig(vocab_size=512, tie_embeddings=tied, **SHAPE)).eval()
    rule = ExitSettings(rule="kl", kl=0.125)
    path = save(tmp_path / "m", model, tokenizer, exit_settings=rule, max_shard_size=size)
    loaded = load_model(path)
    assert torch.equal(logits(loaded.model), logits(model))
    assert (loaded.config, loaded.exit, loaded.facts) == (model.config, rule, FACTS)
    assert loaded.tokenizer.encode("the whale").ids == tokenizer.encode("the whale").ids
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tied
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training and loaded.name == "m"

    names = [n for f in path.glob("*.safetensors") for n in load_file(f)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert (path / "model.safetensors.index.json").exists() == (size == 8000)
    assert len(list(path.glob("*.safetensors"))) > 3 or size != 8000


def test_the_folder_follows_the_conventions(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "looptx" and config["architectures"] == ["LoopedTransformer"]
    assert config["format_version"] == 3 and config["torch_dtype"] == "float32"
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0 and generation["pad_token_id"] == 1
    assert generation["exit"]["rule"] == "auto"
    assert json.loads((saved / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    with safe_open(saved / "model.safetensors", framework="pt") as data:
        assert data.metadata()["format"] == "pt"
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: looptx\n")
    assert "| steps | 3 |" in card and "| 2 | 3.2500 |" in card and "| data | a \\| b |" in card
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m"]
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1, "whoever may read one"


def test_dtypes(tmp_path: Path, model: LoopedTransformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "m", model, tokenizer, dtype=torch.bfloat16)
    assert load_model(path).model.norm.weight.dtype == torch.bfloat16
    wide = load_model(path, dtype=torch.float64).model
    assert wide.norm.weight.dtype == torch.float64
    assert torch.equal(wide.head.weight, model.head.weight.bfloat16().double())


def test_a_folder_of_format_3_loads() -> None:
    """Written by `tests/fixtures/write.py` with the first release; never write it again."""
    folder = FIXTURES / "model_v3"
    loaded = load_model(folder)
    expected = json.loads(folder.with_suffix(".json").read_text())
    assert loaded.tokenizer.encode(expected["text"]).ids == expected["ids"]
    assert (loaded.config.loops, loaded.config.max_loops) == (3, 4)
    with torch.no_grad():
        out = loaded.model(torch.tensor([expected["ids"]]))
    assert torch.allclose(out.logits[0, -1, :8], torch.tensor(expected["logits"]), atol=1e-4)
    for name in ("logit", "gain"):
        told = getattr(out.confidence, name)[0]
        assert torch.allclose(told, torch.tensor(expected[name]), atol=1e-4)
    assert loaded.exit == ExitSettings(
        rule="gain", gain=0.03, min_loops=2, temperature=1.5, confidence_offset=0.25,
        stated=(0.1, 0.5, 0.5), gain_slope=(1.0, 2.0, 3.0), gain_power=(0.5, 0.5, 0.5),
        gain_offset=(-1.0, -2.0, -3.0), kv_policy="last", kv_type="int8",
    )  # fmt: skip


def test_overwriting(saved: Path, model: LoopedTransformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="exists; pass `overwrite`"):
        save(saved, model, tokenizer)
    save(saved, model, tokenizer, overwrite=True, facts={"steps": 4})
    assert load_model(saved).facts == {"steps": 4}
    home = saved.parent / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no looptx model, so it is not replaced"):
        save(home, model, tokenizer, overwrite=True)
    assert (home / "thesis.txt").exists()


def intact(path: Path, model: LoopedTransformer) -> bool:
    return sorted(p.name for p in path.parent.iterdir()) == ["m"] and torch.equal(
        logits(load_model(path).model), logits(model)
    )


def test_a_full_disk_midway(
    saved: Path, model: LoopedTransformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(weights: dict, place: Path, **_) -> None:
        (place / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_torch_state_dict", fill)
    with pytest.raises(LooptxError, match="No space left on device; free some space") as caught:
        save(saved, model, tokenizer, overwrite=True, facts={})
    assert caught.value.exit_code == 1 and intact(saved, model)


def test_a_rename_that_fails_brings_the_old_back(
    saved: Path, model: LoopedTransformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(LooptxError, match="Input/output error"):
        save(saved, model, tokenizer, overwrite=True, facts={})
    assert intact(saved, model)


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is POSIX")
def test_the_system_refuses_to_write_more(saved: Path, model: LoopedTransformer) -> None:
    """A true refusal in the middle of a file, by a limit on its size, in a fresh process."""
    program = f"""
        import resource, torch
        from looptx_core.checkpoint.folder import load_model, save_model
        from looptx_core.errors import LooptxError
        m = load_model({str(saved)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_model({str(saved)!r}, m.model, m.tokenizer, exit_settings=m.exit, facts={{}},
                       overwrite=True)
        except LooptxError as error:
            raise SystemExit(str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr and "ulimit -f" in done.stderr
    assert intact(saved, model)


def test_exit_settings_are_replaced_alone(saved: Path, model: LoopedTransformer) -> None:
    before = json.loads((saved / "generation_config.json").read_text())
    update_generation_config(saved, ExitSettings(rule="gain", gain=0.5))
    after = json.loads((saved / "generation_config.json").read_text())
    assert load_model(saved).exit == ExitSettings(rule="gain", gain=0.5)
    assert {**after, "exit": None} == {**before, "exit": None}
    assert not list(saved.glob(".*"))


def _truncate(p: Path) -> None:
    os.truncate(p / "model.safetensors", (p / "model.safetensors").stat().st_size - 100)


def _pickle_instead(p: Path) -> None:
    (p / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, p / "pytorch_model.bin")


def _resave(p: Path, change) -> None:
    tensors = load_file(p / "model.safetensors")
    change(tensors)
    save_file(tensors, p / "model.safetensors", {"format": "pt"})


BAD = {
    "truncated weights": (_truncate, "not a whole safetensors file"),
    "foreign weights": (
        lambda p: (p / "model.safetensors").write_bytes(b"GGUF" + b"x" * 500),
        "not a whole safetensors file",
    ),
    "empty weights": (
        lambda p: (p / "model.safetensors").write_bytes(b""),
        "not a whole safetensors file",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickle": (_pickle_instead, "pytorch_model.bin: a pickle can run code"),
    "pickle under another name": (
        lambda p: torch.save({}, p / "model.safetensors"),
        "a pickle can run code",
    ),
    "old pickle under another name": (
        lambda p: (p / "model.safetensors").write_bytes(b"\x80\x04K\x01.junkjunk"),
        "a pickle can run code",
    ),
    "missing tensor": (lambda p: _resave(p, lambda t: t.pop("norm.weight")), "lack norm.weight"),
    "unexpected tensor": (
        lambda p: _resave(p, lambda t: t.update(extra=torch.zeros(1))),
        "unexpected extra",
    ),
    "mis-shaped tensor": (
        lambda p: _resave(p, lambda t: t.update({"norm.weight": torch.ones(5)})),
        "norm.weight is torch.float32 [5], but config.json asks for floats [32]",
    ),
    "integer tensor": (
        lambda p: _resave(p, lambda t: t.update({"norm.weight": torch.ones(32).int()})),
        "norm.weight is torch.int32",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "another model type": (
        lambda p: edit(p / "config.json", model_type="llama"),
        "model_type is 'llama'",
    ),
    "newer format": (
        lambda p: edit(p / "config.json", format_version=4, new_key=1),
        "format_version 4 is newer than 3",
    ),
    "a format of before the first release": (
        lambda p: edit(p / "config.json", format_version=2),
        "format_version is 2, and the first released format is 3",
    ),
    "no format": (lambda p: edit(p / "config.json", format_version="drop"), "format_version is"),
    "unknown key": (lambda p: edit(p / "config.json", windows=3), "unknown windows"),
    "wrong type": (lambda p: edit(p / "config.json", d_model="wide"), "d_model: expected a whole"),
    "impossible shape": (lambda p: edit(p / "config.json", n_heads=3, n_kv_heads=2), "n_heads (3)"),
    "smaller vocabulary": (
        lambda p: edit(p / "config.json", vocab_size=270),
        "has 280 tokens, but the model has 270",
    ),
    "another tokenizer": (
        lambda p: (p / "tokenizer.json").write_text(train_tokenizer(["ab "] * 9, 273).to_str()),
        "not the tokenizer that this model was trained with",
    ),
    "tokenizer is junk": (lambda p: (p / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no generation_config": (
        lambda p: (p / "generation_config.json").unlink(),
        "generation_config.json is missing",
    ),
    "gains of a line alone": (
        lambda p: edit(p / "generation_config.json", exit={"gain_slope": [1], "gain_offset": [0]}),
        "gain_slope as many as gain_power",
    ),
    "unknown exit key": (
        lambda p: edit(p / "generation_config.json", exit={"rul": "kl"}),
        "exit: unknown rul",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(saved: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(saved)
    with pytest.raises(DataError) as caught:
        load_model(saved)
    assert message in str(caught.value) and str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lost_shard(tmp_path: Path, model: LoopedTransformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "m", model, tokenizer, max_shard_size=8000)
    next(path.glob("model-00002*")).unlink()
    with pytest.raises(DataError, match=r"model-00002.* is missing"):
        load_model(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(DataError, match="elsewhere"):
        load_model(path)


def test_a_tokenizer_too_large_is_not_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small = LoopedTransformer(ModelConfig(vocab_size=272, **SHAPE))
    with pytest.raises(DataError, match="280 tokens, but the model has 272"):
        save(tmp_path / "m", small, tokenizer)
    assert not list(tmp_path.iterdir())


def finished(run: Path, when: int) -> Path:
    shutil.copytree(FIXTURES / "model_v3", run / "final")
    (run / "config.yaml").write_text("steps: 1\n")
    os.utime(run / "final" / "config.json", (when, when))
    return run


def test_which_model_is_meant(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    old, new = finished(runs / "b", 1000), finished(runs / "a", 2000)
    (runs / "c").mkdir()
    (runs / "c" / "config.yaml").write_text("")
    assert resolve_model(None, runs).folder == new / "final"
    assert resolve_model(old).folder == resolve_model(old / "final").folder == old / "final"
    assert load_model(resolve_model(old).folder).name == "b"
    edit(old / "final" / "config.json", vision_layers=2)
    assert resolve_model(None, runs, frozenset({"vision"})).folder == old / "final"
    (tmp_path / "w.pt").write_bytes(b"")
    for bad, message in [
        (runs / "c", "not finished"),
        (runs, "neither a run nor a model folder"),
        (tmp_path / "none", "no such run or model folder"),
        (tmp_path / "w.pt", "a pickle can run code"),
        (new / "config.yaml", "a file; give the folder"),
    ]:
        with pytest.raises(DataError, match=message):
            resolve_model(bad)
    with pytest.raises(DataError, match="no vision"):
        resolve_model(new, need=frozenset({"vision"}))
    bundled = resolve_model(None, tmp_path / "empty", frozenset({"vision"}))
    assert bundled.folder == bundled_model("picture-model") and "bundled" in bundled.reason


def test_where_a_run_goes(tmp_path: Path) -> None:
    assert next_run_dir(None, "train", False, tmp_path) == tmp_path / "train-1"
    for name in ("train-2", "train-10", "train-x", "tokenize-40"):
        (tmp_path / name).mkdir()
    assert next_run_dir(None, "train", False, tmp_path) == tmp_path / "train-11"
    assert next_run_dir(tmp_path / "train-2", "train", False) == tmp_path / "train-2"
    with pytest.raises(UsageError, match="exists; pass `overwrite`"):
        next_run_dir(tmp_path, "train", False)
    with pytest.raises(UsageError, match="no run of looptx train"):
        next_run_dir(tmp_path, "train", True)
    (tmp_path / "train-2" / "run.json").write_text('{"command": "train"}')
    assert next_run_dir(tmp_path / "train-2", "train", True) == tmp_path / "train-2"


def test_a_card_tells_what_a_model_was_made_from() -> None:
    """The base's data and steps are not its own, over two generations."""
    from looptx_core.checkpoint.card import descended, model_card

    base = {"data": ["book.txt"], "steps": 600, "training_flops": 1e15}
    tuned = descended(base, "book", data=["qa.jsonl"], method="LoRA", steps=40)
    assert tuned["lineage"] == [{"name": "book", "data": ["book.txt"], "steps": 600}]
    facts = descended(tuned, "chat", method="ternary weights, only rounded")
    assert "steps" not in facts and "data" not in facts and "training_flops" not in facts
    shape = ModelConfig(vocab_size=300, d_model=32, n_heads=2, n_kv_heads=1)
    card = model_card("small", shape, 1, ExitSettings(), facts)
    assert "| base | chat |" in card and "| method | ternary weights, only rounded |" in card
    assert "| book |  | book.txt | 600 |\n| chat | LoRA | qa.jsonl | 40 |" in card
