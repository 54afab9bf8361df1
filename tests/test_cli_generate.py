"""looptx generate as its user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looptx_core.checkpoint.folder import save_model
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.model.loop import LoopedTransformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=280, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=32, max_seq_len=32
    )
    place = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(["Call me Ishmael. Some years ago.\n" * 4], 280)
    exit_settings = ExitSettings()
    save_model(place, LoopedTransformer(config), tokenizer, exit_settings=exit_settings, facts={})
    return place


def run(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "looptx_cli.main", "generate", "--model", str(folder)]
    return subprocess.run(
        [*command, "--max-new-tokens", "5", *arguments],
        input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_stdout_is_clean_when_piped(folder: Path) -> None:
    done = run(folder, "Call me", "--show-iterations", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and "loops a token" in lines[-1]
    loops, confidence = lines[0].split()[:2]
    assert loops == "10" and 0 <= float(confidence) <= 1


def test_one_document_for_several_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Some"}\n')
    done = run(folder, "Call me", "--prompts-file", str(tmp_path / "p.jsonl"), "--json")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert [result["prompt"] for result in document["results"]] == ["Call me", "Some"]


def test_standard_input_is_the_prompt(folder: Path) -> None:
    done = run(folder, "--json", stdin="/loops 1\nSome years\n")  # no command of a chat
    assert json.loads(done.stdout)["prompt"] == "/loops 1\nSome years"


def test_depths_side_by_side(folder: Path) -> None:
    done = run(folder, "Call me", "--compare-loops", "1,4", "--json")
    assert [result["loops"] for result in json.loads(done.stdout)["results"]] == [1, 4]
    table = run(folder, "Call me", "--compare-loops", "1,4")
    assert table.returncode == 0 and "continuation" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["Call me " * 40], 2, "context"),
        (["a", "--exit", "never"], 2, "--exit"),
        (["a", "--loops", "many"], 2, "--loops"),
        (["a", "--loops", "0"], 2, "--loops"),
        (["a", "--top-p", "2"], 2, "--top-p"),
        (["a", "--attention", "flash"], 3, "GPU"),
        (["a", "--compare-loops", "1,x"], 2, "--compare-loops"),
        (["--prompts-file", "no-such-file"], 4, "no-such-file"),
        (["a", "--model", "no-such-folder"], 4, "no-such-folder"),
    ],
)
def test_bad_input(folder: Path, arguments: list[str], code: int, word: str) -> None:
    done = run(folder, "--quiet", *arguments)
    assert done.returncode == code, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("looptx: error: ") and done.stderr.count("\n") == 1
    assert word in done.stderr


def test_a_word_takes_no_import_that_it_does_not_need(tmp_path: Path) -> None:
    program = """
import gc, sys
from looptx_cli.main import main
assert main(["generate", "Call me", "--max-new-tokens", "1", "--quiet"]) == 0
heavy = {"torch._dynamo", "lightning", "transformers", "peft", "matplotlib"}
print(sorted(heavy & set(sys.modules)), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[] True True", done.stderr
