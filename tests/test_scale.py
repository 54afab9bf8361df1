"""Runs over several processes and by ZeRO: equal to plain ones, resumable, and ending together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from forked_commands import Started
from safetensors.torch import load_file

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import DataError

if sys.platform != "linux":
    pytest.skip("DeepSpeed runs on Linux", allow_module_level=True)

from looptx_core.parallel.deepspeed import ops
from looptx_core.parallel.deepspeed.checkpoint import Checkpoint
from looptx_core.training.callbacks import processes_of
from looptx_core.training.run import train

ROOT = Path(__file__).parent.parent
MODEL = {
    "vocab_size": 400, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 128,
    "prelude_layers": 1, "core_layers": 1, "coda_layers": 1, "max_loops": 4,
}  # fmt: skip
SETTINGS = {
    "steps": 10, "seq_len": 32, "batch_size": 8, "micro_batch": 4, "save_every": 4,
    "val_every": 10, "val_batches": 1, "log_every": 1, "lr": 0.003, "precision": "float32",
    "optimizer": "adamw", "loop_schedule": "sampled",
}  # fmt: skip
LARGE = {  # of which DeepSpeed swaps the blocks' matrices; not what is smaller, nor the embedding
    **MODEL, "vocab_size": 2048, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64,
    "d_ff": 1024,
}  # fmt: skip
DROPOUT = {**MODEL, "dropout": 0.1}
OUTSIDE = ("resume", "dies_at", "lacks_libaio")  # of a run's settings: what PROGRAM makes of it


class Dies(L.Callback):
    """Kills its process at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def train_all(runs: list[dict[str, Any]]) -> None:
    """Trainings in one process, one after another; one that `dies_at` a step is killed there."""
    for run in runs:
        if run.get("lacks_libaio"):
            ops.libaio_obstacle = lambda: "no libaio.h; apt install libaio-dev"
        folder = Path(run["folder"])
        folder.mkdir(exist_ok=True)
        result = train(
            TrainConfig(**run["settings"]), ModelConfig(**run["model"]), data=Path(run["data"]),
            folder=folder, resume=run.get("resume", False),
            report=say,
            callbacks=[Dies(run["dies_at"])] if "dies_at" in run else [],
        )  # fmt: skip
        if result is not None and result.swapped:
            io = Path("/proc/self/io").read_text().splitlines()
            written = int(dict(line.split(": ") for line in io)["write_bytes"])
            say(json.dumps({**vars(result.swapped), "system_written": written}))


def train_in_fork(runs: list[dict[str, Any]], **env: str) -> Started:
    return Started(train_all, runs, env=env)


def finish(*processes: Started, code: int = 0) -> str:
    texts = ["\n".join(process.communicate(1000)) for process in processes]
    assert all(process.returncode == code for process in processes), "\n".join(texts)[-4000:]
    return texts[0]


def run(
    folder: Path, shards: Path, model: dict[str, Any] = MODEL, **settings: Any
) -> dict[str, Any]:
    outside = {key: settings.pop(key) for key in OUTSIDE if key in settings}
    return {
        "folder": str(folder), "data": str(shards), "model": model,
        "settings": {**SETTINGS, **settings}, **outside,
    }  # fmt: skip


def two_nodes(runs: list[dict[str, Any]]) -> list[Started]:
    """One process on each of two machines, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "0",
    }  # fmt: skip
    return [
        train_in_fork(runs, **shared, RANK=str(number), GROUP_RANK=str(number))
        for number in range(2)
    ]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final/model.safetensors")


def assert_equal_runs(one: Path, other: Path, loss: float = 1e-4, weight: float = 2e-3) -> None:
    pairs = list(zip(losses(one), losses(other), strict=True))
    assert pairs and max(abs(a - b) for a, b in pairs) < loss
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < weight


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every master weight and moment, by name."""
    saved = Checkpoint(checkpoint)
    return {
        f"{name}|{kind}": saved.read(name, kind)
        for name in saved.shapes
        for kind in ("", "exp_avg", "exp_avg_sq")
    }


def assert_same_bits(one: Path, other: Path, last: str = "step-0000010.ckpt") -> None:
    """The losses, the model folder's weights, and every master weight and moment."""
    assert losses(one) == losses(other)
    left, right = weights(one), weights(other)
    assert all(torch.equal(left[key], right[key]) for key in left)
    left, right = everything(one / "checkpoints" / last), everything(other / "checkpoints" / last)
    assert left.keys() == right.keys() and len(left) > 60
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Runs of 10 steps of the same settings, in five ways; and two that were killed."""
    top = tmp_path_factory.mktemp("scale")
    finish(
        train_in_fork([
            run(top / "plain", shards),
            run(top / "zero3", shards, zero3=True),
            run(top / "zero3-cpu", shards, zero3=True, offload="cpu", grad_checkpointing=True),
            run(top / "zero2-cpu", shards, strategy="zero2", offload="cpu"),
            run(top / "dropout", shards, DROPOUT, zero3=True),
            run(top / "fsdp", shards, strategy="fsdp"),
        ])
    )  # fmt: skip
    finish(*two_nodes([
        run(top / "nodes", shards, zero3=True, nodes=2, grad_checkpointing=True),
        run(top / "nodes-zero2", shards, strategy="zero2", nodes=2),
        run(top / "nodes-fsdp", shards, strategy="fsdp", nodes=2, grad_checkpointing=True),
    ]))  # fmt: skip
    return top


@pytest.mark.parametrize(
    "name", ["zero3", "zero3-cpu", "zero2-cpu", "fsdp", "nodes", "nodes-zero2", "nodes-fsdp"]
)
def test_equal_to_the_plain_run(name: str, trained: Path) -> None:
    assert_equal_runs(trained / "plain", trained / name)


def test_the_model_folder_holds_the_master_weights(trained: Path) -> None:
    """Of each rank's part; the head is tied to the embedding and stored once."""
    for name in ("zero3", "nodes", "zero2-cpu"):
        saved, final = Checkpoint(trained / name / "checkpoints/step-0000010.ckpt"), weights(
            trained / name
        )  # fmt: skip
        assert saved.world_size == (2 if name == "nodes" else 1)
        assert {f"model.{key}" for key in final} == saved.shapes.keys()
        assert "model.head.weight" not in saved.shapes
        for key, value in saved.weights():
            assert torch.equal(value, final[key.removeprefix("model.")]), key


def test_a_killed_run_goes_on_bit_for_bit(trained: Path, shards: Path) -> None:
    """By one process to the end; and by one where two had saved, from the same place."""
    died = train_in_fork([run(trained / "killed", shards, DROPOUT, zero3=True, dies_at=6)])
    finish(died, code=-signal.SIGKILL)
    fewer = trained / "fewer"
    (fewer / "checkpoints").mkdir(parents=True)
    checkpoint = trained / "nodes/checkpoints/step-0000008.ckpt"
    checkpoint.rename(fewer / "checkpoints" / checkpoint.name)
    (fewer / "metrics.jsonl").write_text((trained / "nodes/metrics.jsonl").read_text())
    said = finish(train_in_fork([
        run(trained / "killed", shards, DROPOUT, zero3=True, resume=True),
        run(fewer, shards, strategy="zero2", resume=True),
    ]))  # fmt: skip

    assert "resumed: at step 4" in said
    assert_same_bits(trained / "dropout", trained / "killed")
    kept = sorted(file.name for file in (trained / "killed/checkpoints").iterdir())
    assert kept == [f"step-00000{step}.ckpt" for step in ("04", "08", "10")]

    assert "2 processes saved and 1 go on" in said and "resumed: at step 8" in said
    before, after = losses(trained / "nodes"), losses(fewer)
    assert before[:8] == after[:8]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < 1e-4


def test_a_killed_fsdp_run_goes_on(trained: Path, shards: Path) -> None:
    """By two processes bit for bit; by one where two had saved, from the same place."""
    whole, killed, fewer = (trained / name for name in ("nodes-fsdp", "killed-fsdp", "fewer-fsdp"))
    how = {"strategy": "fsdp", "nodes": 2, "grad_checkpointing": True}
    finish(*two_nodes([run(killed, shards, **how, dies_at=6)]), code=-signal.SIGKILL)
    assert "resumed: at step 4" in finish(*two_nodes([run(killed, shards, **how, resume=True)]))
    last = "checkpoints/step-0000008.ckpt"
    assert losses(whole) == losses(killed)
    left, right = weights(whole), weights(killed)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    one, other = (
        torch.load(top / last, weights_only=True)["optimizer_states"][0]["state"]
        for top in (whole, killed)
    )
    assert one.keys() == other.keys() and len(one) > 30
    assert all(torch.equal(one[key][kind], other[key][kind]) for key in one for kind in one[key])

    (fewer / "checkpoints").mkdir(parents=True)
    (fewer / last).write_bytes((whole / last).read_bytes())
    (fewer / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    said = finish(train_in_fork([run(fewer, shards, strategy="fsdp", resume=True)]))
    assert "2 processes saved and 1 go on" in said and "resumed: at step 8" in said
    assert_equal_runs(whole, fewer)


def test_a_checkpoint_cut_short_is_named(trained: Path, shards: Path) -> None:
    cut = trained / "cut-fsdp/checkpoints/step-0000008.ckpt"
    cut.parent.mkdir(parents=True)
    cut.write_bytes((trained / "fsdp/checkpoints/step-0000008.ckpt").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"not a whole checkpoint .*; remove it to go on"):
        processes_of(cut)


def test_a_lost_process_ends_the_others(tmp_path: Path, shards: Path) -> None:
    """With the reason, within a minute, and the run goes on from its checkpoint."""
    out = tmp_path / "lost"
    command = [
        sys.executable, "-m", "looptx_cli.main", "train", "--data", str(shards), "--out", str(out),
        "--zero3", "--devices", "2", "--steps", "3000", "--seq-len", "32", "--batch-size", "8",
        "--save-every", "1", "--val-batches", "1", "--log-every", "1", "--precision", "float32",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list((out / "checkpoints").glob("step-*.ckpt")))
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        other = [int(child) for child in children if is_python(int(child))]
        begun = time.monotonic()
        os.kill(other[0], signal.SIGKILL)
        said = first.communicate(timeout=60)[1]
    finally:
        first.kill()
    assert time.monotonic() - begun < 60 and first.returncode == 1
    errors = [line for line in said.splitlines() if "looptx: error" in line]
    assert errors and "--resume" in errors[-1]
    assert "gone" in errors[-1] or "killed by SIGKILL" in errors[-1]
    assert not any(runs(child) for child in other)
    assert Checkpoint(newest(out)).world_size == 2


def test_swapping_by_plain_files(tmp_path: Path, shards: Path) -> None:
    """Without libaio: the losses and weights of offloading to RAM, and files that are really there;
    a killed run goes on bit for bit."""
    how = {
        "zero3": True,
        "steps": 4,
        "save_every": 2,
        "batch_size": 4,
        "micro_batch": 2,
        "lacks_libaio": True,
    }
    nvme = {**how, "offload": "nvme"}
    said = finish(train_in_fork([
        run(tmp_path / "ram", shards, LARGE, **how, offload="cpu"),
        run(tmp_path / "disk", shards, LARGE, **nvme),
    ]))  # fmt: skip
    slower = [line for line in said.splitlines() if "plain files" in line]
    assert len(slower) == 1 and "slower" in slower[0] and "apt install libaio-dev" in slower[0]
    assert_equal_runs(tmp_path / "ram", tmp_path / "disk", loss=1e-6, weight=1e-6)
    counted = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    large = sum(4 * v.numel() for v in weights(tmp_path / "disk").values() if v.numel() >= 1 << 18)
    assert counted["files"] >= 15 and counted["size"] > 4 * large
    assert counted["written"] > 4 * 4 * large and counted["read"] > 4 * 4 * large
    assert not (tmp_path / "disk/swap").exists()

    died = train_in_fork([run(tmp_path / "killed", shards, LARGE, **nvme, dies_at=3)])
    finish(died, code=-signal.SIGKILL)
    left = {file.name: file.stat().st_size for file in (tmp_path / "killed/swap").rglob("*.swp")}
    assert len(left) >= 15 and min(left.values()) >= 1 << 20
    said = finish(train_in_fork([run(tmp_path / "killed", shards, LARGE, **nvme, resume=True)]))
    assert "resumed: at step 2" in said and not (tmp_path / "killed/swap").exists()
    assert_same_bits(tmp_path / "disk", tmp_path / "killed", "step-0000004.ckpt")


@pytest.mark.slow
def test_swapping_to_a_disk(tmp_path: Path, shards: Path) -> None:
    """One process and two equal the plain run; the files are seen, and the bytes counted agree with
    the system's; a killed run goes on bit for bit, and what it left is cleared."""
    swap = tmp_path / "swap"
    swap.mkdir()
    nvme = {"zero3": True, "offload": "nvme", "nvme_path": str(swap)}
    said = finish(train_in_fork([
        run(tmp_path / "plain", shards, LARGE),
        run(tmp_path / "one", shards, LARGE, **nvme),
    ]))  # fmt: skip
    assert_equal_runs(tmp_path / "plain", tmp_path / "one")
    assert list(swap.iterdir()) == []
    counted = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    # Weights of float32, and for the swapped groups masters, moments and gradients.
    large = sum(4 * v.numel() for v in weights(tmp_path / "one").values() if v.numel() >= 1 << 18)
    assert counted["files"] >= 15 and counted["size"] > 4 * large
    assert counted["written"] > 10 * 4 * large and counted["read"] > 10 * 4 * large
    assert counted["written"] <= counted["system_written"]

    died = train_in_fork([run(tmp_path / "killed", shards, LARGE, **nvme, dies_at=6)])
    finish(died, code=-signal.SIGKILL)
    left = list(swap.rglob("*.swp"))
    assert {f.name.split("_")[0] for f in left} & {"exp"} and len(left) >= 15
    # Another run may swap there at the same time; it clears what the dead one left.
    said = finish(*two_nodes([run(tmp_path / "two", shards, LARGE, **nvme, nodes=2)]))
    assert_equal_runs(tmp_path / "plain", tmp_path / "two")
    said = finish(train_in_fork([run(tmp_path / "killed", shards, LARGE, **nvme, resume=True)]))
    assert "resumed: at step 4" in said and list(swap.iterdir()) == []
    assert_same_bits(tmp_path / "one", tmp_path / "killed")


def wait_for(condition: Any, seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_python(process: int) -> bool:
    return b"looptx_cli" in Path(f"/proc/{process}/cmdline").read_bytes()


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*.ckpt"))
