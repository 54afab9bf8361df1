"""Paths are printed as they are, LOOPTX_MODEL is followed, and flags that are named exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from looptx_cli.main import main

QUICK = ["--steps", "1", "--seq-len", "16", "--batch-size", "2", "--val-batches", "1"]
MODEL = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16, "max_loops": 2,
         "core_layers": 1}  # fmt: skip


@pytest.mark.parametrize("name", ["x[/y]", "run [bold]", "a:smile:b"])
def test_a_path_is_no_markup(
    name: str, tiny: Path, shards: Path, questions: Path, workplace: Path, capsys
) -> None:
    text = str(shards.parent / "0.txt")
    Path("tiny.yaml").write_text(json.dumps({"model": MODEL}))
    commands = {
        "train": ["--config", "tiny.yaml", "--data", str(shards), *QUICK],
        "finetune": ["--model", str(tiny), "--lora", "--data", str(questions), *QUICK,
                     "--seq-len", "64"],
        "convert": ["--dtype", "bf16", "--model", str(tiny), "--data", text],
        "inspect-loops": ["--model", str(tiny), "--data", text, "--seq-len", "16",
                          "--batch-size", "2", "--val-batches", "1", "--decode-tokens", "0"],
        "tokenize": [text, "--tokenizer", str(shards)],
    }  # fmt: skip
    for command, flags in commands.items():
        out = f"{command} {name}"
        assert main([command, *flags, "--out", out]) == 0, capsys.readouterr().err
        assert out in capsys.readouterr().out.splitlines()[-1]


def test_the_model_of_the_environment(tiny: Path, workplace: Path, capsys, monkeypatch) -> None:
    Path("mine").symlink_to(tiny)
    monkeypatch.setenv("LOOPTX_MODEL", "mine")
    assert main(["generate", "a", "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    monkeypatch.setenv("LOOPTX_MODEL", "nowhere")
    for command in (["generate", "a"], ["inspect-loops"], ["finetune"], ["convert", "--to-hf"]):
        assert main(command) == 4
        assert "nowhere: no such run or model folder" in capsys.readouterr().err
    assert main(["generate", "a", "--max-new-tokens", "1", "--json", "--model", "mine"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny", "a flag wins"


def test_a_small_text_names_a_flag_that_there_is(workplace: Path, capsys) -> None:
    Path("small.txt").write_text("A whale, a sea and a ship. " * 40, "utf-8")
    assert main(["train", "--data", "small.txt", *QUICK]) == 4
    error = capsys.readouterr().err
    command = re.search(r"looptx tokenize --vocab-size \d+", error)
    assert command and error.count("--vocab-size") == 1
    made = command[0].split()[1:]
    assert main([*made, "small.txt", "--val-fraction", "0.5", "--out", "shards", "--quiet"]) == 0
    assert main(["tokenize", "small.txt", "--vocab-size", "900"]) == 4
    assert "; use --vocab-size" in capsys.readouterr().err
