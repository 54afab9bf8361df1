"""What is asked of several processes and of ZeRO, and what is refused in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from looptx_cli.main import main
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.processes import is_first, starter
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError

if sys.platform != "linux":
    pytest.skip("DeepSpeed runs on Linux", allow_module_level=True)

BAD = {
    "offload alone": (["--offload", "cpu"], 2, "add --zero3"),
    "path alone": (["--nvme-path", "."], 2, "needs ZeRO"),
    "settings alone": (["--deepspeed-config", "x.json"], 2, "add --zero3"),
    "two strategies": (["--zero3", "--strategy", "ddp"], 2, "contradicts"),
    "zero2 on a disk": (["--strategy", "zero2", "--offload", "nvme"], 2, "ZeRO-2"),
    "no such path": (["--zero3", "--offload", "nvme", "--nvme-path", "none"], 2, "no such folder"),
    "no settings": (["--zero3", "--deepspeed-config", "none.json"], 2, "No such file"),
    "not JSON": (["--zero3", "--deepspeed-config", "bad.json"], 2, "not valid JSON"),
    "ours": (["--zero3", "--deepspeed-config", "ours.json"], 2, "is set by --lr"),
    "not over two": (["--devices", "2", "--batch-size", "3"], 2, "--micro-batch"),
    "unknown": (["--strategy", "zero1"], 2, "zero3"),
    "fsdp offloads nothing": (["--strategy", "fsdp", "--offload", "cpu"], 2, "needs ZeRO"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(
    case: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("ours.json").write_text('{"optimizer": {"type": "Adam"}}')
    flags, code, message = BAD[case]
    assert (
        main(["train", "--data", str(shards), "--quiet", "--precision", "float32", *flags]) == code
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("looptx: error") == 1 and message in err


def test_without_libaio(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("looptx_core.machine.compiler.try_to_build", lambda *_: "no libaio.h")
    command = ["train", "--data", str(shards), "--zero3", "--offload", "nvme", "--out", "a"]
    assert main([*command, "--preset", "nano", "--precision", "float32", "--quiet"]) == 3
    assert "apt install libaio-dev" in capsys.readouterr().err
    assert not Path("a/swap").exists()


def test_four_bit_weights_are_not_cut() -> None:
    with pytest.raises(UsageError, match="packed bytes"):
        FinetuneConfig(qlora=True, zero3=True)


def test_which_process_this_is() -> None:
    assert is_first({}) and starter({}) == ""
    assert not is_first({"LOCAL_RANK": "1", "LOOPTX_RUN": "runs/a"})
    assert not is_first({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"})
    assert is_first({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert starter({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == ""
    assert not is_first({"NODE_RANK": "1"}) and starter({"NODE_RANK": "1"}) == "hand"


def test_finetuning_by_fsdp_is_refused() -> None:
    with pytest.raises(UsageError, match="for looptx train"):
        FinetuneConfig(strategy="fsdp")


def test_batches_over_processes() -> None:
    config = TrainConfig(batch_size=32, devices=2, nodes=2)
    assert (config.rows, config.world_size, config.accumulation) == (8, 4, 1)
    assert config.sharding == "ddp" and TrainConfig(zero3=True).sharding == "zero3"
