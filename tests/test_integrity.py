"""A flipped bit is found at first use, in one line, and looking for it costs once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.data.datamodule import TokenData
from looptx_core.errors import DataError
from looptx_core.machine import integrity

OLD = 1_700_000_000  # seconds: long before the tests


def flip(file: Path, place: int = -3) -> None:
    """One bit, with the size as it was; the file's times change, as at a copy."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to be hashed."""
    names: list[str] = []
    whole = integrity.sha256_of

    def count(file: Path) -> str:
        names.append(file.name)
        return whole(file)

    monkeypatch.setattr(integrity, "sha256_of", count)
    return names


def refused(command: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--quiet"]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert name in line and "its hash is wrong" in line


def test_a_flipped_bit_of_a_shard(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(shards, tmp_path / "s")
    flip(folder / "train-00000.bin", 0)
    command = ["train", "--steps", "2", "--batch-size", "2", "--data", "s", "--out", "run"]
    refused(command, "train-00000.bin", capsys)


def test_a_flipped_bit_of_a_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "m")
    flip(folder / "model.safetensors")
    refused(["generate", "Call me", "--model", str(folder)], "model.safetensors", capsys)
    (folder / integrity.FILE).unlink()
    load_model(folder)  # as others write it


def settle(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file be old."""
    os.utime(file, (OLD, OLD))
    later = file.stat().st_ctime + 10
    monkeypatch.setattr(integrity.time, "time", lambda: later)


def test_it_costs_once(
    shards: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPTX_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(shards, tmp_path / "s")

    def read() -> list[str]:
        hashed.clear()
        TokenData(folder, seq_len=32, micro_batch=2, batches=1)
        return sorted(hashed)

    files = sorted(folder.glob("*.bin"))
    assert read() == read() == [file.name for file in files], "which may still change"
    for file in files:
        settle(file, monkeypatch)
    assert len(read()) == len(files) and read() == []
    flip(files[0], 0)
    with pytest.raises(DataError, match="its hash is wrong"):
        read()
    assert files[0].name in hashed


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda file: file.write_text('{"sha256": 5}'), "must name files"),
        (lambda file: file.write_text('{"sha256": {}}'), "lacks"),
        (lambda file: file.write_text("{"), "digests.json"),
    ],
)
def test_a_damaged_note(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "m")
    damage(folder / integrity.FILE)
    with pytest.raises(DataError, match=told):
        load_model(folder)


def test_a_flipped_bit_of_a_checkpoint(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Resuming refuses it, and goes on from the one before once it is gone."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--steps", "4", "--save-every", "2", "--batch-size", "2", "--seq-len",
                 "16", "--val-batches", "1", "--data", str(shards), "--out", "run", "--quiet",
                 "--set", "model.d_model=32"]) == 0  # fmt: skip
    newest = tmp_path / "run/checkpoints/step-0000004.ckpt"
    names = {file.name for file in newest.parent.iterdir()}
    assert names == {f"step-000000{n}.ckpt{end}" for n in (2, 4) for end in ("", ".sha256")}
    flip(newest, newest.stat().st_size // 2)
    more = ["train", "--resume", "run", "--steps", "6"]
    refused(more, newest.name, capsys)
    newest.unlink()
    assert main([*more, "--quiet"]) == 0


def test_doctor_finds_what_is_damaged(
    shards: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model and of tokenised data; whole ones are told as whole."""
    for source, name in ((shards, "train-00000.bin"), (tiny, "model.safetensors")):
        folder = shutil.copytree(source, tmp_path / name)
        assert main(["doctor", "--path", str(folder)]) == 0
        assert "whole" in capsys.readouterr().out
        flip(folder / name)
        assert main(["doctor", "--path", str(folder), "--json"]) == 4
        told = capsys.readouterr()
        found = json.loads(told.out)
        assert found["damaged"] == 1 and name in found["parts"][0]["detail"]
        assert "damaged" in told.err and "Traceback" not in told.err


def test_doctor_looks_at_each_checkpoint_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for step in (1, 2):
        file = folder / f"checkpoints/step-000000{step}.ckpt"
        torch.save({"looptx": {"processes": 1}}, file)
        integrity.note_digest(file)
    flip(file, 80)
    assert main(["doctor", "--path", str(folder), "--json"]) == 4
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [(Path(p["path"]).name, p["state"]) for p in parts] == [
        ("run", "damaged"), ("step-0000001.ckpt", "ok"), ("step-0000002.ckpt", "damaged"),
    ]  # fmt: skip
