"""GGUF files that are written: read back they are the model, and llama.cpp gives its logits."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import MOBY
from test_conversion_gguf import SPECIAL, TEMPLATE, made_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from looptx_cli.main import main
from looptx_core.checkpoint.folder import LoadedModel, load_model, save_model
from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.config.generation import ExitSettings
from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.model import ModelConfig
from looptx_core.config.rope import RopeScaling
from looptx_core.conversion.memory import with_memory
from looptx_core.conversion.onnx_folder import graph_depth
from looptx_core.conversion.ternary import pack_model, to_ternary
from looptx_core.errors import UsageError
from looptx_core.model.loop import LoopedTransformer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SHAPE = ModelConfig(
    vocab_size=328, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, activation="silu",
    qk_norm=False, injection="none", prelude_layers=0, core_layers=2, coda_layers=0, loops=1,
    max_loops=4, max_seq_len=128, rope_theta=50_000.0,
)  # fmt: skip
AROUND = {"prelude_layers": 1, "coda_layers": 1}
SANDWICH = {"norm_position": "both", "activation": "gelu_tanh", "qk_norm": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "one loop": ("llama", {**AROUND, "tie_embeddings": False, "head_dim": 16}),
    "the first loop before a bridge": ("llama", {**AROUND, "injection": "bridge"}),
    "the first loop before half steps": ("llama", {**AROUND, "injection": "half_steps"}),
    "Llama 3's RoPE": ("llama", {"scaled_rope": RopeScaling(
        "llama3", 8.0, original_max_position_embeddings=2048)}),
    "linear RoPE": ("llama", {"scaled_rope": RopeScaling("linear", 4.0)}),
    "biases": ("qwen2", {"qkv_bias": True}),
    "a norm of heads": ("qwen3", {"qk_norm": True, "head_dim": 16}),
    "norms after": ("olmo2", {"qk_norm": True, "qk_norm_over": "all", "norm_position": "after"}),
    "a looped core alone": ("nanbeige", {"loops": 3}),
    "a norm between loops": ("nanbeige", {"loops": 3, "injection": "norm"}),
    "the first loop before a norm": ("llama", {"coda_layers": 1, "injection": "norm"}),
    "Gemma 3's layers": ("gemma3", {**AROUND, **SANDWICH, "tie_embeddings": True,
        "scaled_rope": RopeScaling("linear", 4.0), "local_attention": LocalAttention(8, 3)}),
    "all within a window": ("gemma3", {**SANDWICH, "tie_embeddings": False, "head_dim": 16,
        "local_attention": LocalAttention(8, 0)}),
    "loops written out": ("qwen3", {**AROUND, "qk_norm": True, "loops": 3}),
}  # fmt: skip
TOKENIZER = made_tokenizer()
TOKENS = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(3))


def drawn(**changes: Any) -> LoopedTransformer:
    """A model whose weights are far from their beginnings."""
    torch.manual_seed(1)
    model = LoopedTransformer(replace(SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return model


def loaded(model: LoopedTransformer) -> LoadedModel:
    special = SpecialTokens("<|im_start|>", "<|im_end|>", "<|endoftext|>", (0, 2))
    return LoadedModel(model, model.config, TOKENIZER, ExitSettings(), {},
                       Path("small"), TEMPLATE, special)  # fmt: skip


def written(source: LoadedModel, out: Path, kind: str = "F32") -> tuple[Any, Any]:
    """The file, and what was read back from it."""
    from looptx_core.conversion.gguf_export import gguf_stack, write_gguf

    found = write_gguf(out, source, source.model, gguf_stack(source, None), lambda _: {}, kind=kind,
                       exact=kind == "F32", tokens=TOKENS)  # fmt: skip
    [file] = out.glob("*.gguf")
    return file, found


@pytest.mark.parametrize("shape", SHAPES)
def test_read_back_it_is_the_model_bit_for_bit(shape: str, tmp_path: Path) -> None:
    from looptx_core.conversion.gguf_file import GGUF

    architecture, changes = SHAPES[shape]
    model = drawn(**changes)
    file, found = written(loaded(model), tmp_path / "out")
    read = GGUF(file)
    # What is folded into other weights is rounded once more.
    folded = {"norm": 1e-6, "none": 1e-5 if architecture == "gemma3" else 0}
    within = folded.get(model.config.injection, 0)
    assert read.architecture == architecture and found.logit_difference <= within
    with torch.no_grad():
        expected = model(TOKENS).logits
        gap = (found.model(TOKENS).logits - expected).abs().max()
        assert gap <= within * expected.abs().max()
        if architecture == "nanbeige":
            config = found.model.config
            assert (config.core_layers, config.loops, config.max_loops) == (2, 3, 3)
            assert len(read.stored) - 2 * 9 == 2 + (not config.tie_embeddings), (
                "the weights stand in it once"
            )
            assert (model(TOKENS, 2).logits - expected).abs().max() > 0.1, "the depth counts"
        else:  # transformers' code gives the same, too
            theirs = read.in_transformers()(TOKENS).logits
            assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_writes_the_same_tokens(shape: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install xllamacpp")
    architecture, changes = SHAPES[shape]
    model = drawn(**changes)
    # Its GELU on CPUs is a table of float16.
    tolerance = 2e-3 if architecture == "gemma3" else 1e-4
    file, _ = written(loaded(model), tmp_path / "out")
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 128, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.verbosity = False, 0
    server = llama_cpp.Server(settings)

    # Its answers leave out ends and what is no whole character, so neither may be written.
    tokens = [TOKENIZER.id_to_token(number) or "é" for number in range(SHAPE.vocab_size)]
    banned = [n for n, token in enumerate(tokens) if n < 3 or not token.lstrip("Ġ").isascii()]

    def check(prompt: str | list[int], ids: list[int]) -> int:
        answer = server.handle_completions({
            "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 10,
            "logit_bias": [[number, False] for number in banned],
        })  # fmt: skip
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        [theirs] = answer["choices"][0]["logprobs"]["content"]
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        for top in theirs["top_logprobs"]:
            assert top["logprob"] == pytest.approx(float(ours[top["id"]]), abs=tolerance)
        ours[banned] = -torch.inf
        assert theirs["id"] == int(ours.argmax())
        return theirs["id"]

    for text in ("Call me Ishmael. 1851, it's\n\n  über  naïve — 鯨!", MOBY[5_000:5_100]):
        ids = TOKENIZER.encode(text).ids
        check(text, ids)
    for _ in range(12):
        ids.append(check(ids, ids))


def test_number_types(tmp_path: Path) -> None:
    from looptx_core.conversion.gguf_export import gguf_stack, stored_bytes
    from looptx_core.conversion.gguf_file import GGUF

    source = loaded(drawn(d_ff=48))  # rows that are no whole blocks of Q8_0
    bits, gaps = {}, {}
    for kind in ("F32", "BF16", "F16", "Q8_0"):
        file, found = written(source, tmp_path / kind, kind)
        stack = gguf_stack(source, None)
        assert found.memory == stored_bytes(stack, source.model, kind)
        bits[kind], gaps[kind] = found.bits_per_weight, found.logit_difference
        assert GGUF(file).types[0] == kind and file.name == f"small-{kind}.gguf"
    assert bits["F32"] == 32 and bits["BF16"] == bits["F16"] == 16 and 8.5 < bits["Q8_0"] < 12
    with torch.no_grad():
        source.model.embedding.weight[0, 0] = 1e5
    with pytest.raises(UsageError, match=r"token_embd.weight holds 1e\+05, and F16 ends at 65504"):
        written(source, tmp_path / "beyond", "F16")
    assert not (tmp_path / "beyond").exists()
    assert 0 == gaps["F32"] < gaps["F16"] < gaps["BF16"] < 0.05 and 0 < gaps["Q8_0"] < 0.05


def other(**parts: Any) -> Tokenizer:
    """The tokenizer with some parts replaced."""
    tokenizer = made_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def convert(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, flags)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def save(folder: Path, model: LoopedTransformer, tokenizer: Tokenizer = TOKENIZER) -> Path:
    source = loaded(model)
    save_model(folder, model, tokenizer, exit_settings=ExitSettings(), facts={},
               chat_template=TEMPLATE, special=source.special)  # fmt: skip
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "few.txt").write_text(MOBY[:30_000], "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_and_the_way_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(place / "a", drawn(**AROUND, injection="bridge", loops=2))
    common = ("--data", "few.txt", "--to-gguf", "--model", "a")
    code, _, error = convert(capsys, *common)
    assert code == 2 and "--loops 1" in error and not Path("a-gguf").exists()
    code, shown, error = convert(capsys, *common, "--loops", 1, "--dry-run", "--json")
    assert code == 0 and "architecture llama, type F32" in shown, error
    planned = json.loads(shown)["bytes_after"]
    code, shown, error = convert(capsys, *common, "--loops", 1, "--json")
    assert code == 0, error
    found = json.loads(shown)
    assert found["out"] == "a-gguf" and found["loops"] == 1 and found["logit_difference"] == 0
    assert found["loss_after"] == found["loss_before"]
    assert planned < Path("a-gguf/a-F32.gguf").stat().st_size < planned + 20_000
    card = Path("a-gguf/README.md").read_text()
    assert "llama-cli -m a-F32.gguf" in card and "Every token runs 1 loop." in card
    assert "| loops | 1 |" in card and "| 1 + 2 x 1 + 1 |" in card and "exit" not in card
    # Only its own is replaced, and looptx itself does not take it for a model of its own.
    code, shown, error = convert(capsys, *common, "--loops", 1, "--dtype", "int8", "--out",
                                 "a-gguf", "--overwrite")  # fmt: skip
    assert code == 0 and "replaces a-gguf" in error and "llama-cli -m a-gguf/a-Q8_0" in error
    assert "the file, read back, against 1 loop of the model" in shown
    assert main(["generate", "a", "--model", "a-gguf"]) == 4
    assert "looptx-gguf" in capsys.readouterr().err.splitlines()[-1]
    # Lines to copy take names as they are.
    Path("a").rename("it's a")
    _, _, error = convert(capsys, *common[:-1], "it's a", "--loops", 1, "--out", "b & c")
    line = shlex.split(error.splitlines()[-1])
    assert line[line.index("-m") + 1] == "b & c/it's a-F32.gguf"
    card = Path("b & c/README.md").read_text()
    use = card.split("```sh\n")[1].split("```")[0].splitlines()
    assert shlex.split(use[0])[:3] == ["llama-cli", "-m", "it's a-F32.gguf"]
    assert shlex.split(use[1])[2] == "it's a-F32.gguf" and "ollama create it-s-a -f" in use[1]
    Path("it's a").rename("a")
    code, _, error = convert(capsys, "--from-gguf", "b & c/it's a-F32.gguf", "--data", "few.txt",
                             "--out", "c")  # fmt: skip
    assert code == 0 and error.splitlines()[-1].endswith("--model c --show-iterations"), error
    before, after = load_model("a"), load_model("c")
    with torch.no_grad():
        assert torch.equal(after.model(TOKENS).logits, before.model(TOKENS, 1).logits)
    assert after.chat_template == before.chat_template
    assert before.special.ends == (0, 2) and after.special == replace(before.special, ends=(2, 0))


def test_what_llama_cpp_has_not_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from looptx_core.conversion import gguf_export
    from looptx_core.conversion.gguf_export import gguf_stack

    models = {
        "injection of the kind decay": drawn(injection="decay"),
        "injection of the kind streams": drawn(injection="streams"),
        "order of windows like that of several loops": drawn(
            **SANDWICH, loops=2, local_attention=LocalAttention(8)
        ),
        "layers that attend within": drawn(local_attention=LocalAttention(8)),
        "gate with gelu": drawn(activation="gelu"),
        "norms and biases together": drawn(qk_norm=True, qkv_bias=True),
        "qwen2 whose heads together are not as wide": drawn(qkv_bias=True, head_dim=16),
        "qwen3 with Llama 3's scaled RoPE": drawn(qk_norm=True, scaled_rope=RopeScaling("llama3")),
        "stack of 514 layers": drawn(loops=257, max_loops=257),
        "encoder of pictures": drawn(vision_layers=1, vision_width=32),
        "a memory": with_memory(drawn(), "delta", 16, 8),
        "ternary weights": pack_model(to_ternary(drawn(), [{"tokens": TOKENS}])),
    }
    for what, model in models.items():
        with pytest.raises(UsageError, match=f"small: llama.cpp has no .*{what}") as error:
            gguf_stack(loaded(model), None)
        if "to_onnx" in str(error.value):  # which then takes it
            graph_depth(loaded(model), None)
    with monkeypatch.context() as patch:  # a part that came later
        patch.setattr(gguf_export, "_KNOWN", gguf_export._KNOWN - {"rope_theta"})
        with pytest.raises(UsageError, match="has no place for rope_theta"):
            gguf_stack(loaded(drawn()), None)
    folder = save(place / "a", drawn(injection="decay"))
    code, _, error = convert(capsys, "--to-gguf", "--model", folder, "--out", "x", "--quiet")
    assert code == 2 and "a: llama.cpp has no injection" in error and "--to-onnx" in error
    assert len(error.splitlines()) == 1 and not Path("x").exists()
    # What it can't split is named before anything is measured.
    folder = save(place / "words", drawn(), other(normalizer=normalizers.Lowercase()))
    code, _, error = convert(capsys, "--to-gguf", "--model", folder, "--dry-run", "--quiet")
    assert code == 2 and "splits words in a way of its own" in error
    folder = save(place / "fine", drawn())
    refused = {
        ("--loops", 5): "runs at most 4",
        ("--to-onnx",): "two steps",
        ("--to-bitnet",): "two steps",
        ("--shard-size", "5MB"): "--shard-size is not for --to-gguf",
        ("--out", "x.gguf"): "leave .gguf out",
    }
    for flags, what in refused.items():
        code, _, error = convert(capsys, "--to-gguf", "--model", folder, *flags)
        assert code == 2 and what in error.splitlines()[-1], (flags, error)
    code, _, error = convert(capsys, "--to-gguf", "--from-hf", folder)
    assert code == 2 and "looptx convert --to-gguf --model FOLDER" in error
    # Without a model, the newest run that it can express is taken.
    for age, name in enumerate(("fine", "a", "words")):
        shutil.copytree(name, f"runs/{name}/final")
        Path(f"runs/{name}/config.yaml").write_text("")
        os.utime(f"runs/{name}/final/config.json", (age, age))
    code, shown, error = convert(capsys, "--to-gguf", "--data", "few.txt", "--dry-run")
    assert code == 0 and "as a GGUF file" in shown, error
    chosen = next(line for line in error.splitlines() if line.startswith("model: "))
    assert "model: runs/fine/final, newest" in chosen and "words in a way of its own" in chosen
    assert "runs/a/final: llama.cpp has no injection" in chosen and "--to-onnx" in chosen
    code, _, error = convert(capsys, "--to-gguf", "--data", "few.txt", "--loops", 11)
    assert code == 2 and "--loops 11: runs/fine/final runs at most" in error


def test_without_the_package(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, error = convert(capsys, "--to-gguf", "--model", save(place / "a", drawn()))
    assert code == 3 and "--to-gguf needs the package gguf; pip install 'looptx[gguf]'" in error


def test_tokenizers() -> None:
    from looptx_core.conversion.gguf_tokenizer import read_gguf_tokenizer, tokenizer_values

    def words(digits: str) -> pre_tokenizers.PreTokenizer:
        pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
                   + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cases = {
        "smollm": other(),
        "gpt-2": other(pre_tokenizer=plain),
        "llama-bpe": other(pre_tokenizer=words(r"\p{N}{1,3}")),
        "qwen2": other(pre_tokenizer=words(r"\p{N}"), normalizer=normalizers.NFC()),
    }
    special = SpecialTokens("<|im_start|>", "<|im_end|>", None, (0, 2))
    for name, tokenizer in cases.items():
        values = tokenizer_values(tokenizer, special, 322, Path("m"))
        assert values["tokenizer.ggml.pre"] == name
        assert values["tokenizer.ggml.tokens"][:3] == SPECIAL
        assert values["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
        assert values["tokenizer.ggml.tokens"][320:] == ["[PAD320]", "[PAD321]"]
        _, found, _ = read_gguf_tokenizer(values, "m")
        assert (found.bos, found.eos, found.ends) == (special.bos, special.eos, (2, 0))
    refused = {
        "no byte-level BPE": Tokenizer(models.WordLevel({"a": 0}, "a")),
        "splits words in a way of its own": other(pre_tokenizer=words(r"\p{N}{1,2}")),
    }
    for what, tokenizer in refused.items():
        with pytest.raises(UsageError, match=what):
            tokenizer_values(tokenizer, special, 320, Path("m"))
    with pytest.raises(UsageError, match="no token that ends a text"):
        tokenizer_values(other(), SpecialTokens(), 320, Path("m"))
    with pytest.raises(UsageError, match="4 tokens end"):
        tokenizer_values(other(), SpecialTokens(ends=(0, 1, 2, 3)), 320, Path("m"))
