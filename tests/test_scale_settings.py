"""What is asked of several processes and of ZeRO, and what is refused in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from looptx_cli.main import main
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.processes import is_first, starter
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError

if sys.platform != "linux":
    pytest.skip("DeepSpeed runs on Linux", allow_module_level=True)

from looptx_core.parallel.deepspeed.library import TESTED, version_obstacle

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
    assert not Path("runs").exists()


NEEDS = {  # what is not here, and a word of the line that says so
    "another DeepSpeed": (["--zero3"], "tested with 0.1.0 alone; pip install deepspeed==0.1.0"),
    "no GPU": (["--attention", "flash"], "it needs a CUDA GPU"),
}


@pytest.mark.parametrize("case", NEEDS)
def test_what_is_missing_is_told_before_there_is_a_folder(
    case: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("looptx_core.parallel.deepspeed.library.TESTED", ("0.1.0",))
    flags, message = NEEDS[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["train", "--data", str(shards), "--precision", "float32", "--quiet", *flags]) == 3
    err = capsys.readouterr().err
    assert err.count("looptx: error") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_the_tested_deepspeed_is_the_one_that_is_asked_for() -> None:
    assert version_obstacle() is None
    root = Path(__file__).parent.parent
    assert f'"deepspeed=={TESTED[-1]}; ' in (root / "pyproject.toml").read_text()
    assert f"deepspeed=={TESTED[-1]}\n" in (root / "constraints.txt").read_text()


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
    assert (config.micro_batch_size, config.world_size, config.accumulation) == (8, 4, 1)
    assert config.sharding == "ddp" and TrainConfig(zero3=True).sharding == "zero3"


@pytest.mark.parametrize("text", ["{", "[1]", '{"train_batch_size": 8}'])
def test_a_dry_run_reads_deepspeeds_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(text)
    flags = ["--zero3", "--dry-run", "--deepspeed-config", str(tmp_path / "ds.json")]
    assert main(["train", *flags]) == 2
    assert f"{tmp_path / 'ds.json'}: " in capsys.readouterr().err
