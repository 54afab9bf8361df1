"""Graphs for onnxruntime: equal to the model at any depth, with padding and a cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conversion import SHAPE, TOKENS, drawn, model

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.rope import RopeScaling
from looptx_core.conversion import export, onnx_folder
from looptx_core.conversion.memory import with_memory
from looptx_core.conversion.onnx_folder import Session, logit_difference
from looptx_core.conversion.ternary import pack_model, to_ternary
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import TokenPrompt
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import to_int8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

__all__ = ["model"]

SHAPES: dict[str, dict[str, Any]] = {
    "decay": {},
    "bridge, with all parts": {"injection": "bridge", "prelude_layers": 1, "coda_layers": 1,
                               "core_layers": 2, "tie_embeddings": False},
    "half steps": {"injection": "half_steps"},
    "norm": {"injection": "norm", "loops": 3, "max_loops": 3},
    "none, no norm of heads, biases": {"injection": "none", "qk_norm": False, "qkv_bias": True},
    "add, norms after, of all heads": {"injection": "add", "norm_position": "after",
                                       "qk_norm_over": "all", "activation": "silu"},
    "no groups, scaled RoPE": {"n_kv_heads": 3, "scaled_rope": RopeScaling(
        "llama3", 8.0, original_max_position_embeddings=64)},
    "local layers, norms in both places": {"local_attention": LocalAttention(4, 2, 500.0),
                                           "norm_position": "both", "activation": "gelu_tanh"},
}  # fmt: skip


def session_of(looped: LoopedTransformer, loops: int, place: Path) -> Session:
    from looptx_core.conversion.onnx_graph import build_graph, save_graph

    graph = build_graph(looped, loops)
    onnx.checker.check_model(graph, full_check=True)
    save_graph(graph, place / "model.onnx", apart=False)
    return Session(place / "model.onnx", looped, loops)


@pytest.mark.parametrize("kind", SHAPES)
def test_onnxruntime_gives_the_models_logits(kind: str, tmp_path: Path) -> None:
    looped = drawn(replace(SHAPE, **SHAPES[kind]))
    session = session_of(looped, 3, tmp_path)
    rows = torch.cat([TOKENS, TOKENS.flip(0)])  # four, three of them padded
    assert logit_difference(session, looped, 3, rows) < 1e-5
    assert logit_difference(session, looped, 2, rows) > 1e-3, "the depth counts"


def test_the_weights_stand_in_it_once(tmp_path: Path) -> None:
    looped = drawn(replace(SHAPE, d_ff=500))
    sizes = {}
    for loops in (1, 4):
        found = session_of(looped, loops, tmp_path).session
        sizes[loops] = (tmp_path / "model.onnx").stat().st_size
        layers = range(loops + 2)
        pairs = [f"{n}.{part}" for n in layers for part in ("key", "value")]
        assert [x.name for x in found.get_inputs()] == [
            "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in pairs)
        ]  # fmt: skip
        assert [x.name for x in found.get_outputs()] == ["logits", *(f"present.{p}" for p in pairs)]
    weights = 4 * sum(p.numel() for p in looped.trunk_parameters())
    assert weights < sizes[1] < sizes[4] < sizes[1] + 20_000 < 1.2 * weights


def convert(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    code = main(["convert", "--to-onnx", *map(str, flags)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_writes_what_genai_opens(
    model: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", model, "--data", shards, "--loops", 3)
    code, shown, err = convert(capsys, *given, "--out", "a", "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert 0 < found["logit_difference"] < 1e-5 and found["loops"] == 3
    assert found["bits_per_weight"] == 32
    assert found["loss_after"] == pytest.approx(found["loss_before"], abs=1e-4)
    genai = json.loads(Path("a/genai_config.json").read_text())["model"]
    assert genai["decoder"]["num_hidden_layers"] == 5 and genai["type"] == "decoder"
    assert genai["eos_token_id"] == load_model(model).special.ends[0]
    assert json.loads(Path("a/config.json").read_text())["loops"] == 3
    card = Path("a/README.md").read_text()
    assert "Every token runs 3 loops" in card and "| loops | 3 |" in card
    assert "is run 3 times for every token" in card and "exit" not in card
    assert "exit" not in json.loads(Path("a/generation_config.json").read_text())
    assert Path("a/tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    # Only its own is replaced, and looptx itself does not take it for a model of its own.
    code, shown, err = convert(capsys, *given, "--out", "a", "--overwrite")
    assert code == 0 and "replaces a: " in err, err
    assert "onnxruntime at 3 loops against the model" in shown and "a/README.md" in err
    assert main(["generate", "a", "--model", "a"]) == 4
    assert "looptx-onnx" in capsys.readouterr().err.splitlines()[-1]
    code, shown, err = convert(capsys, *given, "--dry-run", "--json")
    assert code == 0 and "unroll 3 loops" in shown and not Path("small-onnx").exists()


def test_genai_writes_the_same_tokens(
    model: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, and in a batch that it pads on the left."""
    genai = pytest.importorskip("onnxruntime_genai")
    code, _, err = convert(capsys, "--model", model, "--data", shards, "--loops", 3, "--out", "a")
    assert code == 0, err
    looped = load_model(model)
    opened = genai.Model("a")
    tokenizer = genai.Tokenizer(opened)
    texts = ["Call me", "The whale, which", "a"]

    def continued(tokens: Any, rows: int, length: int) -> list[list[int]]:
        options = genai.GeneratorParams(opened)
        options.set_search_options(max_length=length + 8, batch_size=rows)
        generator = genai.Generator(opened, options)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return [[*map(int, generator.get_sequence(row))][length:] for row in range(rows)]

    prompts = [[*map(int, tokenizer.encode(text))] for text in texts]
    assert prompts == [looped.tokenizer.encode(text).ids for text in texts]
    batch = continued(tokenizer.encode_batch(texts), 3, max(map(len, prompts)))
    alone = [continued(prompt, 1, len(prompt))[0] for prompt in prompts]
    engine = Engine(looped.model, looped.tokenizer, ends=looped.special.ends)
    options = GenerationOptions(loops=3, temperature=0, max_new_tokens=8)
    ours = engine.complete([TokenPrompt(tuple(prompt)) for prompt in prompts], options)
    for expected, one, padded in zip(ours, alone, batch, strict=True):
        ids = [step.id for step in expected.tokens]
        assert len(one) > 2 and ids[: len(one)] == one
        assert padded[: len(one)] == one[: len(padded)]


def test_int8_is_onnxruntimes_own(
    model: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Here with the weights in a file of their own, as those of large models stand."""
    monkeypatch.setattr(onnx_folder, "APART", 0)
    given = ("--model", model, "--data", shards)
    sizes = {}
    for kind in ("float32", "int8"):
        code, shown, err = convert(capsys, *given, "--dtype", kind, "--json", "--loops", 1)
        assert code == 0, err
        found = json.loads(shown)
        out = Path(found["out"])
        assert out == Path(f"small-{kind}-onnx")
        sizes[kind] = (out / "model.onnx.data").stat().st_size
        names = {path.name for path in out.iterdir()}
        assert not {name for name in names if name.startswith("float32")}, names
    assert 8 < found["bits_per_weight"] < 10 and sizes["int8"] < 0.6 * sizes["float32"]
    assert 1e-5 < found["logit_difference"] < 0.2
    assert found["loss_after"] == pytest.approx(found["loss_before"], rel=0.05)
    # What stands in the folder was measured with its own weights, at its own depth.
    facts = json.loads((out / "config.json").read_text())["facts"]
    assert facts["loss"] == round(found["loss_after"], 4) and facts["loss_before"] != facts["loss"]
    assert not {key for key in facts if "_by_loop" in key} and "int8" in facts["quantised"]
    assert "validation loss" not in (out / "README.md").read_text()


def test_what_it_cannot_express_is_named(
    model: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = load_model(model)
    batch = {"tokens": TOKENS}
    others = {
        "remembers": with_memory(drawn(), "delta", 16, 8),
        "ternary": pack_model(to_ternary(drawn(), [batch])),
        "sees": LoopedTransformer(replace(SHAPE, vision_layers=1, vision_width=20)),
        "streams": drawn(replace(SHAPE, injection="streams")),
        "int8": to_int8(drawn()),
    }
    for name, other in others.items():
        save_model(Path(name), other, base.tokenizer, exit_settings=base.exit, facts={})
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--model", "remembers"), 2, "no place for a memory"),
        (("--model", "ternary"), 2, "no ternary weights"),
        (("--model", "sees"), 2, "no encoder of pictures"),
        (("--model", "streams"), 2, "no streams between loops"),
        (("--model", model, "--loops", 5), 2, "--loops 5: "),
        (("--model", model, "--loops", 0), 2, "--loops must"),
        (("--model", model, "--dtype", "bf16"), 2, "float32 or int8, not bf16"),
        (("--model", model, "--shard-size", "1MB"), 2, "--shard-size is not for --to-onnx"),
        (("--model", model, "--to-hf"), 2, "--to-onnx and --to-hf are two steps"),
        (("--model", model, "--memory", "delta"), 2, "two steps"),
        (("--from-hf", "a"), 2, "--from-hf and --to-onnx are two steps"),
        (("--from-gguf", "a"), 2, "then run looptx convert --to-onnx --model FOLDER"),
    ]
    for flags, code, what in cases:
        found, shown, err = convert(capsys, *flags, "--data", shards, "--out", "x")
        line = err.splitlines()[-1]
        assert found == code and what in line and line.startswith("looptx: error:"), err
        assert shown == "" and not Path("x").exists()
    assert main(["convert", "--dtype", "bf16", "--loops", "2"]) == 2
    assert "--loops is the depth of --to-onnx" in capsys.readouterr().err
    # Without a model, the newest run that it can express is taken.
    for age, name in enumerate(("int8", "streams", "sees")):
        run_folder = Path("runs", name)
        shutil.copytree(name, run_folder / "final")
        (run_folder / "config.yaml").write_text("")
        os.utime(run_folder / "final/config.json", (age, age))
    code, _, err = convert(capsys, "--data", shards, "--out", "x")
    assert code == 0, err  # whose rows become floats again
    chosen = next(line for line in err.splitlines() if "model: runs" in line)
    assert "model: runs/int8/final, newest" in chosen and "runs/sees/final: an ONNX" in chosen
    assert "no streams between loops, which this model has" in chosen


def test_what_goes_wrong_writes_nothing(
    model: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    def refused(code: int, what: str) -> None:
        given = ("--model", model, "--data", shards, "--out", "x", "--quiet")
        found, shown, err = convert(capsys, *given)
        assert found == code and what in err and len(err.splitlines()) == 1, err
        assert shown == "" and list(Path().iterdir()) == []

    with monkeypatch.context() as changed:
        changed.setattr(onnx_folder, "MOST_DIFFERENCE", 1e-12)
        refused(1, "logits differ by")
    with monkeypatch.context() as changed:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : opset 17\nis too new")

        changed.setattr(onnxruntime, "InferenceSession", fail)
        refused(1, "opset 17 is too new; pip install --upgrade onnxruntime")
    with monkeypatch.context() as changed:
        evaluate = export.evaluate_all

        def meanwhile(*given: Any) -> Any:
            Path("x").mkdir()
            Path("x", "notes.txt").write_text("mine")
            return evaluate(*given)

        changed.setattr(export, "evaluate_all", meanwhile)
        given = ("--model", model, "--data", shards, "--out", "x", "--quiet")
        found, _, err = convert(capsys, *given)
        assert found == 2 and "x" in err and [p.name for p in Path("x").iterdir()] == ["notes.txt"]
        shutil.rmtree("x")
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, name, None)
            refused(3, f"the package {name}; pip install 'looptx[onnx]'")
    broken = tmp_path_factory.mktemp("broken")
    (broken / "onnx.py").write_text("raise ImportError('DLL load failed:\\nnot found')")
    with monkeypatch.context() as changed:
        changed.delitem(sys.modules, "onnx")
        changed.syspath_prepend(broken)
        refused(3, "imported here (DLL load failed: not found); pip install 'looptx[onnx]'")
