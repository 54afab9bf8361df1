"""What sharded runs keep on a disk: folders to swap to, and checkpoints in pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looptx_core.errors import DataError, LooptxError, UsageError

if sys.platform != "linux":
    pytest.skip("DeepSpeed runs on Linux", allow_module_level=True)

from looptx_core.parallel.deepspeed.checkpoint import Checkpoint, Group, TensorShard, commit, write
from looptx_core.parallel.deepspeed.nvme import SwapFolder, clear_stale

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no memory file system")
def test_memory_is_no_place_to_swap(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in memory"):
        SwapFolder(Path("/dev/shm"), tmp_path)


def test_swap_folders_are_per_run_and_cleared(tmp_path: Path) -> None:
    one, other = SwapFolder(tmp_path, tmp_path / "a"), SwapFolder(tmp_path, tmp_path / "b")
    one.open()
    other.open()
    assert one.folder != other.folder and clear_stale(tmp_path) == []
    with pytest.raises(UsageError, match="in use"):
        SwapFolder(tmp_path, tmp_path / "a").open()
    other.close()
    assert one.folder.is_dir() and not other.folder.exists()

    # A process that was killed holds no lock, and leaves its files.
    code = (
        "import os, sys; from pathlib import Path\n"
        "from looptx_core.parallel.deepspeed.nvme import *\n"
        "s = SwapFolder(Path(sys.argv[1]), Path('c')); s.open()\n"
        "(s.folder / 'x.swp').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    left = [f for f in tmp_path.glob("looptx-*") if f.is_dir() and f != one.folder]
    assert len(left) == 1 and (left[0] / "x.swp").exists()
    later = SwapFolder(tmp_path, tmp_path / "d")
    later.open()
    assert not left[0].exists() and one.folder.is_dir()
    later.close()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_a_swap_path_without_room(tmp_path: Path) -> None:
    with pytest.raises(LooptxError, match="free some space"):
        SwapFolder(None, tmp_path / "run", needed=1 << 60).open()
    assert not (tmp_path / "run/swap").exists()


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="are free"):
        write(tmp_path, 0, [], needed=1 << 60)


def test_pieces_of_any_cut_are_one_parameter(tmp_path: Path) -> None:
    """As three ranks wrote them, the last with padding; read whole, and for two ranks."""
    whole = torch.arange(10.0)
    partial = tmp_path / "step-0000001.ckpt.partial"
    partial.mkdir()
    for rank in range(3):
        piece = torch.nn.functional.pad(whole, (0, 2))[4 * rank : 4 * rank + 4]
        tensors = {"": piece, "exp_avg": piece + 1, "exp_avg_sq": piece + 2}
        write(partial, rank, [Group([TensorShard("w", 4 * rank, tensors)], step=7)], 0)
    commit(partial, tmp_path / "step-0000001.ckpt", {"global_step": 7}, {"w": [2, 5]}, 3)
    saved = Checkpoint(tmp_path / "step-0000001.ckpt")
    assert dict(saved.weights())["w"].tolist() == whole.view(2, 5).tolist()
    assert saved.read("w", "exp_avg", 5, 10).tolist() == (whole[5:] + 1).tolist()
    assert saved.read("w", "", 8, 12).tolist() == [8, 9, 0, 0]
    assert saved.step == 7 and saved.common()["global_step"] == 7
    (saved.folder / "rank-00001-group-000.safetensors").unlink()
    with pytest.raises(DataError, match="lacks a part"):
        Checkpoint(saved.folder).read("w")
