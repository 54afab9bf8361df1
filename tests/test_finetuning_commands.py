"""looptx finetune as its user sees it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_cases import QUICK, SHAPE
from safetensors.torch import save_file

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.checkpoint.registry import resolve_adapter, resolve_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.resolve import read_resolved
from looptx_core.conversion.ternary import pack_model
from looptx_core.data.example import Example
from looptx_core.data.tokenizer import end_id
from looptx_core.finetuning.adapters import attach
from looptx_core.finetuning.answers import Answer, answer_held_out
from looptx_core.finetuning.quiet_peft import without_bitsandbytes
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.epochs import in_steps

FLAGS = ["--steps", "2", "--seq-len", "64", "--batch-size", "4", "--precision", "float32"]


def test_finetune_then_generate(tiny, questions, workplace, capsys) -> None:
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--lora", *FLAGS]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "calibration error" in out and "runs/finetune-1" in out
    assert "try next: looptx generate" in err.splitlines()[-1]
    # The newest run is an adapter's: its base and itself.
    found = resolve_model(None)
    assert found.folder == tiny.resolve() and found.adapter == Path("runs/finetune-1/final")
    assert resolve_adapter("runs/finetune-1").adapter == found.adapter
    ask = ["generate", "map ab", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    texts = []
    for extra in ([], ["--adapter", "runs/finetune-1"],
                  ["--model", str(tiny), "--adapter", "runs/finetune-1/final"]):  # fmt: skip
        assert main([*ask, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] == texts[2]
    # An adapter is no base to finetune or to train an adapter of.
    assert main([*command[:1], "--model", "runs/finetune-1", *command[3:]]) == 4
    assert "merge it first" in capsys.readouterr().err
    assert main(["finetune", "--data", str(questions), *FLAGS]) == 0  # so the bundled model's
    assert "bundled model" in capsys.readouterr().err


def resolved_steps() -> int:
    return read_resolved("runs/finetune-1/config.yaml", FinetuneConfig).values["steps"]


def test_json_lines_end_with_a_summary(tiny, questions, workplace, capsys) -> None:
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--qlora", "--json"]
    assert main([*command, "--epochs", "0.4", *FLAGS[2:]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = lines[-1]["summary"]
    assert len(last["loss_by_loop"]) == 3
    # The run's own settings say in steps how long it is.
    steps = last["steps"]
    assert resolved_steps() == steps == lines[-2]["step"] > 1
    answers = last["answers"]
    assert answers["records"] == answers["of"] > 1 and answers["exact"] == 0
    shown = answers["shown"]
    texts = {
        (q["prompt"], q["response"]) for q in map(json.loads, questions.read_text().splitlines())
    }
    assert {(a["prompt"], a["expected"]) for a in shown} <= texts and len(shown) > 1
    assert json.loads(Path("runs/finetune-1/run.json").read_text())["exact_match"] == 0.0
    assert 0 <= last["ece"] <= 1 and 0 <= last["ece_before"] <= 1
    assert last["quantised_loss"] == pytest.approx(last["loss_by_loop"][-1], rel=0.1)


def test_a_dry_run_makes_nothing(tiny, questions, workplace, capsys) -> None:
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--lora", "--dry-run"]
    assert main([*command, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 and 0 < found["trainable"] < found["parameters"]
    assert found["total"] == sum(found["bytes"].values()) > found["bytes"]["weights"]
    assert found["seconds"] == pytest.approx(2 * found["seconds_per_step"]) and found["seconds"] > 0
    assert not list(workplace.iterdir())


def test_plain_adapters_leave_bitsandbytes_out(tiny: Path, monkeypatch) -> None:
    """It takes seconds to import, and writes to the terminal."""
    from peft.import_utils import is_bnb_available

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    base = load_model(tiny)
    with without_bitsandbytes():
        assert not is_bnb_available()
    attach(base.model, FinetuneConfig(lora=True))
    assert "bitsandbytes" not in sys.modules and is_bnb_available()


def test_held_out_answers_are_asked_as_in_training(tiny: Path) -> None:
    """An example that the model knows by heart is exact; a text has no answer."""
    base = load_model(tiny)
    encode, end = base.tokenizer.encode, end_id(base.tokenizer)
    prompt, answer = encode("map ab: Where ends a").ids, encode("b d").ids

    def example(ids: list[int], counted: int) -> Example:
        learned = np.arange(len(ids)) >= len(ids) - counted
        return Example(np.array(ids, np.int32), learned)

    given = example([*prompt, *answer, end], len(answer) + 1)
    text = example([*prompt, end], len(prompt) + 1)
    found = answer_held_out(base.model, base, ExitSettings(), [given, text])
    assert found is not None and (found.records, found.of, found.exact) == (1, 1, 0)
    (shown,) = found.shown
    assert (shown.prompt, shown.expected) == ("map ab: Where ends a", "b d")
    assert answer_held_out(base.model, base, ExitSettings(), [text]) is None
    assert Answer("p", " b d", "b d ").exact and not shown.exact
    # What it does say is what is expected, once a record says so.
    said = encode(shown.given).ids
    again = answer_held_out(
        base.model, base, ExitSettings(), [example([*prompt, *said, end], len(said) + 1)]
    )
    assert again is not None and again.shown[0].expected == shown.given


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (0.3, 1), (2.0, 5), (0.01, 1)])
def test_epochs_in_steps(epochs: float, steps: int) -> None:
    config = in_steps(FinetuneConfig(epochs=epochs, batch_size=4), sequences=10)
    assert config.steps == steps
    assert in_steps(FinetuneConfig(steps=7), sequences=10).steps == 7


BAD_INPUT = {
    "no target": (["--lora", "--target-modules", "q_prj"], 2, "there are down_proj, gate_proj"),
    "tied head": (["--lora", "--target-modules", "head"], 2, "shares its weights"),
    "too long": (["--seq-len", "8"], 2, "--too-long drop or truncate"),
    "two lengths": (["--epochs", "2", "--steps", "3"], 2, "--epochs and --steps each say how long"),
    "beyond the context": (["--seq-len", "500"], 2, "exceeds the model's context"),
    "beyond the loops": (["--max-loops", "9"], 2, "exceeds the model's max_loops"),
    "rank": (["--lora-rank", "0"], 2, "--lora-rank must be at least 1"),
    "both": (["--dora", "--lora-per-loop"], 2, "leave one out"),
    "int8 and DoRA": (["--dora", "--qlora", "--quantization", "int8"], 2, "use --quantization nf4"),
    "no data": (["--data", "none.jsonl"], 4, "none.jsonl: no such file"),
    "a data set": (["--data", "hf:a/b"], 3, "the package datasets is not installed"),
    "unknown type": (["--qlora", "--quantization", "fp3"], 2, "nf4 or int8"),
    "no run": (["--resume", "none"], 4, "not a run of looptx finetune"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, tiny, questions, workplace, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    flags, code, word = BAD_INPUT[case]
    command = ["finetune", *flags]
    if case != "no run":
        command += ["--model", str(tiny)]
        command += [] if "--data" in flags else ["--data", str(questions)]
    assert main(command) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("looptx: error: ")]
    assert out == "" and len(errors) == 1 and word in errors[0], err
    assert not list(workplace.iterdir())


def test_a_bitsandbytes_that_is_not_here(tiny, questions, workplace, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--qlora"]
    assert main(command) == 3
    assert "--qlora needs bitsandbytes" in capsys.readouterr().err


def test_a_bitsandbytes_that_cannot_run(tiny, questions, workplace, capsys, monkeypatch) -> None:
    import bitsandbytes

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    assert main(["finetune", "--model", str(tiny), "--data", str(questions), "--qlora"]) == 3
    assert "can't run nf4 here (no kernel for this device)" in capsys.readouterr().err


def test_bad_adapters(tiny, questions, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 1}), lora=True)
    final = finetune(prepare(config, base=tiny, data=[str(questions)]), folder=tmp_path / "run")
    ask = ["generate", "map", "--adapter"]

    def refused(folder: Path, *flags: str) -> str:
        assert main([*ask, str(folder), *flags]) == 4
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "looptx: error" in x]
        return line

    other = load_model(tiny)
    torch.manual_seed(1)
    save_model(tmp_path / "other", LoopedTransformer(SHAPE), other.tokenizer,
               exit_settings=ExitSettings(), facts={})  # fmt: skip
    folder = final.model_folder
    assert "of another base" in refused(folder, "--model", str(tmp_path / "other"))
    assert "no adapter" in refused(tiny)

    weights = folder / "adapter_model.safetensors"
    torch.save({}, pickled := folder / "adapter_model.bin")
    kept = weights.rename(tmp_path / "kept")
    assert "a pickle can run code" in refused(folder)
    pickled.rename(weights)
    assert "a pickle can run code" in refused(folder)
    weights.unlink()
    assert "adapter_model.safetensors is missing" in refused(folder)
    save_file({"x": torch.ones(2)}, weights)
    shutil.copy(kept, weights)
    assert main([*ask, str(folder), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("linear", ["ternary", "packed"])
def test_a_ternary_base(linear: str, tiny, questions, workplace, capsys) -> None:
    shape = ModelConfig(**(SHAPE.to_dict() | {"linear": "ternary"}))
    model = LoopedTransformer(shape)
    save_model(Path("ternary"), pack_model(model) if linear == "packed" else model,
               load_model(tiny).tokenizer, exit_settings=ExitSettings(), facts={})  # fmt: skip
    command = ["finetune", "--model", "ternary", "--data", str(questions), *FLAGS]
    assert main([*command, "--lora"]) == 2
    assert "its weights are ternary" in capsys.readouterr().err
    # Latent float weights can be trained on; packed ones can't.
    assert main([*command, "--out", "all"]) == (2 if linear == "packed" else 0)


def test_nothing_is_lost_to_bad_data(tiny, questions, workplace, capsys) -> None:
    """--overwrite removes the old run only once the new one can start."""
    command = ["finetune", "--model", str(tiny), "--lora", *FLAGS, "--out", "kept", "--data"]
    assert main([*command, str(questions)]) == 0
    assert main([*command, "none.jsonl", "--overwrite"]) == 4
    assert Path("kept/final/adapter_config.json").exists()


def test_a_merged_model_tells_base_and_adapter_apart(tiny: Path, tmp_path: Path) -> None:
    """Its data and steps are the adapter's; what the adapter's file adds beside them is not taken
    over."""
    from looptx_core.checkpoint.folder import load_model
    from looptx_core.config.finetune import FinetuneConfig
    from looptx_core.finetuning.adapters import attach, load_adapter, save_adapter
    from looptx_core.finetuning.merge import merge

    base = load_model(tiny)
    peft = attach(base.model, FinetuneConfig(lora=True))
    facts = {"data": ["qa.jsonl"], "method": "LoRA", "steps": 7, "base": "x", "facts": 1, "kept": 2}
    save_adapter(tmp_path / "fit", peft, base, exit_settings=base.exit, facts=facts)
    found = merge(tiny, tmp_path / "fit").facts
    shown = load_adapter(load_model(tiny), tmp_path / "fit").facts
    assert shown == facts, "what is shown of an adapter is its own training"
    assert found.pop("lineage") == [{"name": "tiny"}]
    assert found == {"base": "tiny", "adapter": "fit", "method": "LoRA, merged",
                     "data": ["qa.jsonl"], "steps": 7}  # fmt: skip
