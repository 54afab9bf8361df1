"""looptx runs: each run with its figures, damaged ones among them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from looptx_cli.main import main
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.checkpoint.run_facts import begin_run, update_facts
from looptx_core.checkpoint.run_summary import list_runs, read_run
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.resolve import resolve, write_resolved
from looptx_core.config.run import TrainConfig
from looptx_core.errors import DataError

pytestmark = pytest.mark.fast


def make_run(folder: Path, finished: bool = True, **flags: object) -> Path:
    """A run's small files, as `train` leaves them."""
    folder.mkdir(parents=True)
    begin_run(folder, "train")
    flags = {"steps": 20, "data": ["a/b.txt"], **flags}
    resolved = resolve(TrainConfig, {"model": ModelConfig}, flags=flags, env={})
    write_resolved(folder / "config.yaml", resolved, omit={"out", "max_minutes"})
    records = [
        {"step": 10, "train_loss": 3.0, "tokens_per_second": 100.0},
        {"step": 10, "val_loss": 2.5, "val_loss_by_loop": [2.75, 2.5]},
        {"step": 20 if finished else 15, "train_loss": 2.0, "tokens_per_second": 140.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        (folder / "final").mkdir()
        facts = {"steps": 20, "tokens": 640, "training_flops": 1e9,
                 "loss_by_loop": [2.5, 2.25], "bits_per_byte_by_loop": [2.0, 1.8]}  # fmt: skip
        config = {"model_type": "looptx", "facts": facts}
        (folder / "final/config.json").write_text(json.dumps(config))
    return folder


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b", finished=False)
    found = {run.name: run for run in list_runs(tmp_path / "runs")}
    a, b = found["a"], found["b"]
    assert (a.state, a.command, a.data) == ("finished", "train", ("a/b.txt",))
    assert (a.steps, a.planned_steps, a.best_loss, a.best_bits_per_byte) == (20, 20, 2.25, 1.8)
    files = [file for file in (tmp_path / "runs/a").rglob("*") if file.is_file()]
    assert a.bytes == sum(file.stat().st_size for file in files)
    assert (b.state, b.steps, b.planned_steps) == ("unfinished", 15, 20)
    assert (b.best_loss, b.best_bits_per_byte) == (2.5, None)


def test_the_runs_of_a_sweep_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "sweep-grid/lr-1-seed-0")
    assert [run.name for run in list_runs(tmp_path)] == ["a"], "some other folder of runs"
    (tmp_path / "sweep-grid/sweep.json").write_text("{}")
    found = {run.name: run.folder for run in list_runs(tmp_path)}
    assert found.keys() == {"a", "sweep-grid/lr-1-seed-0"}
    assert found["sweep-grid/lr-1-seed-0"] == tmp_path / "sweep-grid/lr-1-seed-0"


def test_a_run_that_is_to_go_on_is_not_finished(tmp_path: Path) -> None:
    update_facts(make_run(tmp_path / "a"), finished=20, until=40)
    summary = read_run(tmp_path / "a").summary
    assert (summary.state, summary.planned_steps) == ("unfinished", 40)


def test_an_adapter_is_a_run_of_finetune(tmp_path: Path) -> None:
    (tmp_path / "f/final").mkdir(parents=True)
    settings = resolve(FinetuneConfig, flags={"model": "base", "lora": True}, env={})
    write_resolved(tmp_path / "f/config.yaml", settings)
    (tmp_path / "f/final/adapter_config.json").write_text("{}")
    (tmp_path / "f/final/looptx.json").write_text('{"facts": {"steps": 400}}')
    summary = read_run(tmp_path / "f").summary
    assert (summary.command, summary.state, summary.data) == ("finetune", "finished", ())


DAMAGE = {
    "facts of wrong types": lambda run: update_facts(run, finished="x"),
    "facts out of range": lambda run: update_facts(run, until=-2),
    "no settings": lambda run: (run / "config.yaml").unlink(),
    "settings cut": lambda run: (run / "config.yaml").write_text("steps: [1"),
    "settings of bytes": lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    "settings of no schema": lambda run: (run / "config.yaml").write_text("stepz: 4\n"),
    "facts cut": lambda run: (run / "run.json").write_text('{"command": "tr'),
    "model cut": lambda run: (run / "final/config.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_runs_are_listed(
    damage: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/good"))
    DAMAGE[damage](make_run(Path("runs/bad")))
    with pytest.raises((DataError, ValueError)):
        read_run(Path("runs/bad"))
    assert main(["runs", "--json"]) == 0
    states = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states["good"]["state"] == "finished"
    assert states["bad"]["state"] == "damaged" and states["bad"]["problem"]
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert "damaged" in out and "runs/bad is damaged" in err


def test_a_folder_without_settings_and_facts_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "a")
    assert [run.name for run in list_runs(tmp_path)] == ["a"]


def test_an_unfinished_run_is_resumed_by_the_command_that_began_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/f")
    run.mkdir(parents=True)
    begin_run(run, "finetune")
    write_resolved(run / "config.yaml", resolve(FinetuneConfig, env={}))
    assert main(["train", "--resume", "runs/f"]) == 2
    err = capsys.readouterr().err
    assert "runs/f: a run of looptx finetune" in err and "looptx finetune --resume runs/f" in err
    with pytest.raises(DataError, match="not finished; resume it by looptx finetune --resume"):
        resolve_model(run)
    with pytest.raises(DataError, match="not finished; resume it by looptx train --resume"):
        resolve_model(make_run(Path("runs/t"), finished=False))


def test_wrong_values_are_no_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text('5\n{"step": "x"}\n{"step": 3, "val_loss": "low"}\n{"st')
    (run / "final/config.json").write_text('{"facts": {"loss_by_loop": [null, true, "x"]}}')
    summary = read_run(run).summary
    assert (summary.steps, summary.best_loss, summary.best_bits_per_byte) == (3, None, None)


def test_the_table(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert "looptx train" in capsys.readouterr().err
    make_run(Path("runs/train-1"))
    make_run(Path("runs/train-2"), finished=False)
    Path("runs/tokenize-1").mkdir()
    Path("runs/tokenize-1/manifest.json").write_text("{}")
    Path("runs/notes.txt").write_text("mine")
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    first, second = sorted(line.split() for line in out.splitlines()[1:])
    assert first[:6] == ["train-1", "train", "b.txt", "20", "1.800", "bits/byte"]
    assert second[:6] == ["train-2", "train", "b.txt", "15/20", "2.500", "nats"]
    assert "finished" in first and "unfinished" in second
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out and "compare" not in err  # one finished run alone


def test_no_name_is_broken(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sweep-grid/model.core_layers-2-lr-0.003-loop_schedule-sampled-seed-0"
    data = ["a/a long name.txt", "b/another_long_name.txt", "c.txt", "d.txt"]
    make_run(Path("runs", name), data=data)
    Path("runs/sweep-grid/sweep.json").write_text("{}")
    make_run(Path("runs/it's"))
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3 and all(line == line.rstrip() for line in lines)
    row = next(line for line in lines if line.startswith(name))
    assert "a long name.txt, another_long_name.txt, 2 more" in row and "finished" in row
    assert shlex.split(err.splitlines()[-1])[-2:] in (
        [f"runs/{name}", "runs/it's"], ["runs/it's", f"runs/{name}"],
    )  # fmt: skip
    # On a narrow terminal a name has a line of its own.
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["runs"]) == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert name in plain and "it's" in plain and len(plain) == 6
    assert len({line.index(word) for line, word in zip(plain[1::2], ("steps", "20", "20"))}) < 3
