"""The command inspect-loops: what it loads, what it measures by default, and bad input."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from looptx_cli.main import main
from looptx_core.config.inspection import InspectConfig
from looptx_core.errors import DataError, UsageError
from looptx_core.inspection import report


def test_to_look_needs_no_trainer() -> None:
    program = (
        "import sys, looptx_core.inspection.report; "
        "print({'lightning', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_who_looks_at_a_text_does_not_wait_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def stop(loaded: object, data: object, config: InspectConfig, **how: object) -> None:
        measured.append((config.val_batches, config.decode_tokens))
        raise DataError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "inspect_loops", stop)
    command = importlib.import_module("looptx_cli.inspect_loops")
    monkeypatch.setattr(command, "_data", lambda *given: (tmp_path, ""))
    for line in ([], ["--prompt", "a"], ["--text", "a", "--val-batches", "5"],
                 ["--prompt", "a", "--target-loss-increase", "1%"]):  # fmt: skip
        assert main(["inspect-loops", "--quiet", *line]) == 4
    assert measured == [(16, 1920), (2, 0), (5, 0), (16, 1920)]


def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, said in (
        (["--target-loss-increase", "half"], "0.5%"),
        (["--text", "a", "--prompt", "b"], "one of them"),
        (["--seq-len", "100000"], "--seq-len"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--model", "nowhere"], "nowhere"),
    ):
        assert main(["inspect-loops", "--quiet", *line]) in (2, 4)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError):
        InspectConfig(max_loops=0)
    with pytest.raises(UsageError, match="decode_tokens` must"):
        InspectConfig(decode_tokens=-5)
