"""What a GPU alone can show: the commands from end to end on one, and the CPU's numbers there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looptx_core.checkpoint.folder import load_model
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.shards import open_shards
from looptx_core.training.evaluate import evaluate_loops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BUNDLED = Path(__file__).parent.parent / "looptx_core" / "assets" / "model"
FEW = ("--steps", "12", "--val-every", "12", "--val-batches", "2", "--batch-size", "16")


def looptx(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = "from looptx_cli.main import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def last_loss(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["train_loss"] for r in records if "train_loss" in r][-1]


def test_losses_are_the_cpus() -> None:
    loaded = load_model(BUNDLED)
    shards = open_shards(bundled_shards(loaded.config.vocab_size))
    stream = torch.from_numpy(shards.tokens("val").read(0, 8 * 129)).long().view(8, 129)
    here = evaluate_loops(loaded.model, stream, 10)
    there = evaluate_loops(loaded.model.to("cuda"), stream, 10)
    assert there.loss_by_loop == pytest.approx(here.loss_by_loop, abs=1e-4)
    assert there.accuracy_by_loop == pytest.approx(here.accuracy_by_loop, abs=2e-3)


def test_the_bundled_model_writes_the_same(tmp_path: Path) -> None:
    texts, notes = [], []
    for env in ({"CUDA_VISIBLE_DEVICES": ""}, {}):
        done = looptx(tmp_path, "generate", "Call me", "--temperature", "0", "--json", **env)
        document = json.loads(done.stdout)
        texts.append([(t["id"], t["loops"]) for t in document["tokens"]])
        notes.append(done.stderr)
    assert texts[0] == texts[1]
    assert "CUDA graphs" in notes[1] and "CUDA graphs" not in notes[0]


def test_train_resume_generate_inspect(tmp_path: Path) -> None:
    done = looptx(tmp_path, "train", *FEW, "--save-every", "6", "--out", "a")
    assert "precision: bf16" in done.stderr and "attention: flash" in done.stderr
    looptx(tmp_path, "train", *FEW, "--out", "b", "--compile")
    assert last_loss(tmp_path / "a") == pytest.approx(last_loss(tmp_path / "b"), rel=0.02)
    looptx(tmp_path, "generate", "Call me", "--model", "a", "--precision", "bf16", "--json")
    looptx(tmp_path, "inspect-loops", "--model", "a", "--val-batches", "2", "--out", "report")
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("method", [("--lora",), ("--qlora",)])
def test_finetune(method: tuple[str, ...], tmp_path: Path) -> None:
    lines = [{"prompt": f"{n} + 1 =", "response": f"{n + 1}"} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    looptx(tmp_path, "finetune", "--data", "sums.jsonl", "--steps", "6", "--out", "t", *method)
    looptx(tmp_path, "generate", "3 + 1 =", "--adapter", "t", "--json")


@pytest.mark.parametrize(
    "more",
    [
        ("--zero3",),
        ("--zero3", "--offload", "cpu"),
        ("--strategy", "zero2"),
        ("--strategy", "fsdp"),
    ],
)
def test_sharded(more: tuple[str, ...], tmp_path: Path) -> None:
    """One process each; the same loss as the plain run's, within what bf16 loses."""
    looptx(tmp_path, "train", *FEW, "--optimizer", "adamw", "--lr", "3e-3", "--out", "plain")
    looptx(tmp_path, "train", *FEW, "--optimizer", "adamw", "--lr", "3e-3", "--out", "cut", *more)
    looptx(tmp_path, "generate", "Call me", "--model", "cut", "--json")
    assert last_loss(tmp_path / "cut") == pytest.approx(last_loss(tmp_path / "plain"), rel=0.02)
