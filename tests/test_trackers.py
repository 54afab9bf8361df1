"""`train --log`: what a tracker gets, before and after a resume, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_training_resume import TRAIN, place, trained  # noqa: F401

from looptx_cli.main import main
from looptx_core.training import trackers
from looptx_core.training.callbacks import read_metrics

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A tracker in trackio's place, and what it was asked. It fails at step 4."""
    asked: Calls = []

    def open_run(folder: Path, id: str | None, settings: Mapping[str, Any]) -> trackers.Opened:
        asked.append(("open", folder.name, id, settings["lr"], settings["model"]["d_model"]))

        def log(figures: dict[str, float], step: int) -> None:
            asked.append(("log", step, figures))
            if step == 4 and id is None:
                raise ConnectionError("gone\nfor good")

        return trackers.Opened(id or "the-id", log, lambda well: asked.append(("close", well)))

    monkeypatch.setitem(trackers.TRACKERS, "trackio", (open_run, "check it"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: pytest)  # any that has an origin
    monkeypatch.setattr(pytest, "origin", "here", raising=False)
    return asked


def test_a_tracker_gets_the_metrics_and_fails_alone(
    place: Path,  # noqa: F811
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TRAIN[:3], *TRAIN[4:], "shards", "--steps", "4", "--log", "trackio"]) == 0
    assert calls[0] == ("open", "run", None, 0.003, 16)
    log = {r["step"]: r["train_loss"] for r in read_metrics(Path("run/metrics.jsonl"))
           if "train_loss" in r}  # fmt: skip
    got = {call[1]: call[2]["train_loss"] for call in calls
           if call[0] == "log" and "train_loss" in call[2]}  # fmt: skip
    assert got == log and [*got] == [1, 2, 3, 4]
    assert calls[-1][:2] == ("log", 4), "nothing more is sent, and the run goes on"
    assert "trackio: left out from here on (gone)" in capsys.readouterr().err

    Path("run/run.json").write_text(Path("run/run.json").read_text().replace("finished", "other"))
    for file in Path("run/checkpoints").glob("step-*4.ckpt"):
        file.unlink()
    calls.clear()
    assert json.loads(Path("run/trackers.json").read_text()) == {"trackio": "the-id"}
    assert main(["train", "--resume", "run", "--quiet"]) == 0
    assert calls[0][2] == "the-id" and calls[-1] == ("close", True)
    Path("run/trackers.json").write_text('{"trackio": 3}')
    assert main(["train", "--resume", "run", "--steps", "6", "--quiet"]) == 4
    assert "trackers.json: an id is not a text; remove it" in capsys.readouterr().err


def test_a_tracker_that_cannot_begin_is_one_line(
    place: Path,  # noqa: F811
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> trackers.Opened:
        raise RuntimeError("no key")

    monkeypatch.setitem(trackers.TRACKERS, "trackio", (refuse, "log in"))
    assert main([*TRAIN, "shards", "--log", "trackio"]) == 1
    assert "--log trackio can't begin (no key); log in, or leave it out" in capsys.readouterr().err
    assert main([*TRAIN[:4], "--out", "other", "--data", "shards", "--log", "mlflaw"]) == 2
    assert "expected a list of tensorboard or wandb" in capsys.readouterr().err
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main([*TRAIN[:4], "--out", "other", "--data", "shards", "--log", "wandb"]) == 3
    err = capsys.readouterr().err
    assert "--log wandb needs the package; pip install 'looptx[wandb]'" in err
    assert not Path("other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_trackers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Those that are installed, without a network: two runs, and their second parts."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        lines: list[str] = []
        versions = set()
        for resume in (False, True):
            tracker = trackers.Tracker(name, folder, lines.append)
            tracker.begin({"lr": 0.1, "model": {"d_model": 16}}, resume)
            versions.add(tracker.version)
            figures = {"train_loss": 2.0, "val_loss/1": 3.0, "epoch": 0}
            tracker.log_metrics(figures, step=int(resume))
            tracker.finalize("success")
        assert len(versions) == 1 and len(lines) == 2, lines
        where = tmp_path if name == "trackio" else folder
        files = [file.name for file in where.rglob("*") if file.is_file()]
        assert any(file.endswith((".wandb", ".db")) for file in files), files
    assert "Creating it" not in caplog.text  # Lightning's own line
