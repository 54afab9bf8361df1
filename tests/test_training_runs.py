"""Whole runs: what they leave, a resumed run that is the same run, and bad input."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked_commands import looptx, start
from safetensors.torch import load_file
from test_training_objective import MODEL

from looptx_core.checkpoint.folder import read_exit
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.training.callbacks import read_metrics
from looptx_core.training.curves import verdict
from looptx_core.training.run import train

SETTINGS = {
    "steps": 12, "seq_len": 32, "batch_size": 8, "micro_batch": 4, "save_every": 4, "val_every": 6,
    "val_batches": 1, "log_every": 1, "lr": 0.003, "precision": "float32",
    "model": {**MODEL.to_dict(), "dropout": 0.1},
}  # fmt: skip


def test_the_verdict_follows_the_figures() -> None:
    assert "nothing" in verdict([2.0, 2.0, 2.001])
    assert "10.0%" in verdict([2.0, 1.8, 1.85])


def run(folder: Path, shards: Path, settings: dict, *flags: str, wait: bool = True):
    """looptx train in a process of its own."""
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    command = ["train"]
    if "--resume" not in flags:
        command += ["--config", str(file), "--data", str(shards), "--out", str(folder)]
    process = start([*command, *flags])
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(folder: Path) -> list[dict]:
    """The metrics, but for the clock's."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(
    scope="module",
    params=[(0, "float32"), (2, "float32"), (0, "bf16")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def uninterrupted(request, tmp_path_factory, shards) -> tuple[Path, dict]:
    workers, precision = request.param
    settings = SETTINGS | {"workers": workers, "precision": precision}
    folder = tmp_path_factory.mktemp("run") / "whole"
    code, _, err = run(folder, shards, settings)
    assert code == 0, err
    return folder, settings


def test_a_run_leaves_what_it_should(uninterrupted) -> None:
    folder, _ = uninterrupted
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "final/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    lines = records(folder)
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 13))
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [6, 12]
    assert len(validations[0]["val_loss_by_loop"]) == 10
    assert json.loads((folder / "final/config.json").read_text())["loops"] == 10
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["origins"]["seed"] == "default"


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, shards) -> None:
    whole, settings = uninterrupted
    folder = tmp_path / "killed"
    process = run(folder, shards, settings, wait=False)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "final").exists()
    code, _, err = run(folder, shards, settings, "--resume", str(folder))
    assert code == 0, err
    assert records(folder) == records(whole)
    ours, theirs = (load_file(f / "final/model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, shards) -> None:
    folder = tmp_path / "stopped"
    settings = SETTINGS | {"steps": 4000, "save_every": 1000, "val_every": 1000}
    process = run(folder, shards, settings, wait=False)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--resume {folder}" in err.splitlines()[-1] and "minutes left" in err
    assert len(list(folder.glob("checkpoints/*.ckpt"))) == 1


def test_signals_are_put_back_after_a_run(tmp_path, shards) -> None:
    """What comes after the training, as a calibration, ends by a signal as before it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    given = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        settings = TrainConfig(steps=1, seq_len=16, batch_size=1, val_batches=1)
        shape = ModelConfig(d_model=16, n_heads=1, n_kv_heads=1, head_dim=16, d_ff=16, max_loops=1)
        train(settings, shape, data=shards, folder=tmp_path / "run")
        assert [signal.getsignal(n) for n in numbers] == [signal.default_int_handler] * 3
    finally:
        for number, handler in zip(numbers, given):
            signal.signal(number, handler)


def test_a_loss_of_nan_stops_and_keeps_the_checkpoint(tmp_path, shards) -> None:
    folder = tmp_path / "nan"
    settings = SETTINGS | {"lr": 1e30, "clip": 1e30, "save_every": 1}
    code, _, err = run(folder, shards, settings)
    assert code == 1, err
    assert "not finite at step" in err.splitlines()[-1]
    assert "a new run with a lower --lr" in err, "a resumed run repeats the same step"
    assert list((folder / "checkpoints").glob("*.ckpt"))


def test_a_full_disk_at_a_checkpoint(tmp_path, shards) -> None:
    """The system refuses more than so many bytes a file: one line, nothing half-written."""
    folder = tmp_path / "full"
    settings = SETTINGS | {"save_every": 4}
    process = run(folder, shards, settings, wait=False)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "cannot save to" in (last := err.splitlines()[-1]) and f"--resume {folder}" in last
    assert not list((folder / "checkpoints").iterdir())
    code, _, err = run(folder, shards, settings, "--resume", str(folder))
    assert code == 0 and (folder / "final").exists(), err


def test_a_short_run_has_its_records(tmp_path, shards) -> None:
    settings = SETTINGS | {"steps": 2, "log_every": 10, "val_every": 200, "save_every": 100}
    code, _, err = run(tmp_path / "short", shards, settings)
    assert code == 0, err
    keys = [set(record) & {"train_loss", "val_loss"} for record in records(tmp_path / "short")]
    assert sorted(map(sorted, keys)) == [["train_loss"], ["val_loss"]]


def test_accumulation_logs_the_whole_batch(tmp_path, shards) -> None:
    settings = SETTINGS | {"steps": 1, "loop_schedule": "fixed", "loops": 2}
    settings["model"] = settings["model"] | {"dropout": 0.0}
    first = []
    for micro in (2, 8):
        code, _, err = run(tmp_path / f"by{micro}", shards, settings | {"micro_batch": micro})
        assert code == 0, err
        first.append(records(tmp_path / f"by{micro}")[0])
    assert first[0]["train_loss"] == pytest.approx(first[1]["train_loss"], abs=1e-5)
    assert first[0]["mean_loops"] == first[1]["mean_loops"] == 2
    # Read at its last two loops by default, here the first and the second.
    assert read_exit(tmp_path / "by8" / "final").min_loops == 1
    assert json.loads((tmp_path / "by8/final/config.json").read_text())["loops"] == 2
    code, _, err = run(tmp_path / "last", shards, settings | {"loss_at": "last"})
    assert code == 0, err
    assert read_exit(tmp_path / "last" / "final").min_loops == 2


def test_json_lines_end_with_a_summary(tmp_path, shards) -> None:
    code, out, _ = run(tmp_path / "json", shards, SETTINGS | {"steps": 2}, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["step"] == 1
    assert len(lines[-1]["summary"]["loss_by_loop"]) == 10


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--preset", "nanno"], 2, "did you mean 'nano'"),
        (["--seq-len", "100000"], 2, "--seq-len"),
        (["--data", "no/such/file.txt"], 4, "no/such/file.txt"),
        (["--resume", "no/such/run"], 4, "not a run"),
        (["--batch-size", "10", "--micro-batch", "3"], 2, "--micro-batch"),
    ],
)
def test_bad_input(flags, code, word, tmp_path, shards) -> None:
    extra = [] if "--data" in flags or "--resume" in flags else ["--data", str(shards)]
    done = looptx(["train", *flags, *extra, "--out", str(tmp_path / "out"), "--quiet"])
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("looptx: error: ") and done.stderr.count("\n") == 1
    assert word in done.stderr


def test_dry_run(tmp_path) -> None:
    done = looptx(["train", "--preset", "7b", "--dry-run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7,1" in done.stdout and "does not fit" in done.stdout
    assert not list(tmp_path.iterdir())
