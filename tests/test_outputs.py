"""What --overwrite may replace, for every command that has it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_commands import start
from test_training_runs import SETTINGS

from looptx_cli.main import main
from looptx_core.atomic import _machine, put_in_place, replacing, temporary_beside
from looptx_core.errors import LooptxError, UsageError
from looptx_core.outputs import (
    OUTPUTS,
    _matches,
    check_output,
)

SHORT = ["--precision", "float32", "--steps", "2", "--seq-len", "32", "--batch-size", "2",
         "--val-batches", "1", "--quiet"]  # fmt: skip


@pytest.fixture
def place(workplace: Path, tiny: Path, shards: Path, questions: Path) -> Path:
    """Short names for what the commands read."""
    for name, target in (("base", tiny), ("shards", shards), ("qa.jsonl", questions)):
        Path(name).symlink_to(target)
    Path("text.txt").write_text("the whale and the sea " * 400)
    settings = {key: SETTINGS["model"][key] for key in ("d_model", "n_heads", "n_kv_heads",
                "head_dim", "d_ff", "core_layers", "max_loops")}  # fmt: skip
    Path("tiny.yaml").write_text(json.dumps({"model": settings}))
    return workplace


COMMANDS = {
    "train": ["train", "--data", "shards", "--config", "tiny.yaml", *SHORT],
    "finetune": ["finetune", "--lora", "--data", "qa.jsonl", "--model", "base", *SHORT],
    "convert": ["convert", "--dtype", "bf16", "--model", "base", "--data", "text.txt", "--quiet"],
    "export": ["convert", "--to-hf", "--model", "base", "--data", "text.txt", "--quiet"],
    "tokenize": ["tokenize", "text.txt", "--vocab-size", "276", "--quiet"],
    "inspect-loops": ["inspect-loops", "--model", "base", "--data", "text.txt", "--seq-len", "16",
                      "--batch-size", "2", "--val-batches", "1", "--decode-tokens", "0",
                      "--quiet"],
}  # fmt: skip


def names(folder: Path | str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_only_its_own_is_replaced(name: str, place: Path, capsys) -> None:
    command = [*COMMANDS[name], "--overwrite", "--out"]
    assert main([*command, "made"]) == 0, capsys.readouterr().err
    assert OUTPUTS[command[0]].marker in names("made")
    assert main([*COMMANDS[name], "--out", "made"]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    loud = [part for part in command if part != "--quiet"]
    assert main([*loud, "made"]) == 0, capsys.readouterr().err
    err = capsys.readouterr().err
    assert "replaces made: a " in err and " files of " in err
    assert not [p for p in names() if p.startswith((".made", "made."))], "nothing stays"

    # A stranger's file inside, a stranger's folder, another command's: none is touched.
    Path("made/mine").mkdir()
    Path("made/mine/thesis.tex").write_text("years of work")
    Path("home").mkdir()
    Path("home/thesis.tex").write_text("years of work")
    other = Path("other")
    other.mkdir()
    maker = next(each for each in OUTPUTS if each != command[0])
    for each in OUTPUTS.values():
        (other / each.marker).write_text(json.dumps({"command": maker}))
    for folder, what in (("made", "thesis.tex"), ("home", "is no "), ("other", "is no ")):
        before = contents(Path(folder))
        assert main([*command, folder]) == 2
        assert what in capsys.readouterr().err.splitlines()[-1]
        assert contents(Path(folder)) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_no_working_folder_no_parent(name: str, place: Path, capsys, monkeypatch) -> None:
    """Not even where it carries the command's mark."""
    command = COMMANDS[name][0]
    for folder in (Path("d"), Path("d/e")):
        folder.mkdir()
        (folder / OUTPUTS[command].marker).write_text(json.dumps({"command": command}))
    monkeypatch.chdir("d/e")
    absolute = [str(place / part) if (place / part).exists() else part for part in COMMANDS[name]]
    before = contents(place / "d")
    for out in (".", "..", "../../d", str(place / "d")):
        assert main([*absolute, "--out", out, "--overwrite"]) == 2
        assert "working folder" in capsys.readouterr().err
    assert contents(place / "d") == before


def test_inputs_are_never_replaced(place: Path, capsys) -> None:
    def refused(*command: str) -> None:
        before = contents(Path(command[command.index("--out") + 1]))
        assert main([*command, "--overwrite"]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "not replaced" in err and "read from there" in err, err
        assert contents(Path(command[command.index("--out") + 1])) == before

    assert main([*COMMANDS["train"], "--out", "run"]) == 0
    assert main([*COMMANDS["convert"], "--out", "half"]) == 0
    assert main([*COMMANDS["tokenize"], "--out", "data"]) == 0
    again = [part if part != "tiny.yaml" else "run/config.yaml" for part in COMMANDS["train"]]
    refused(*again, "--out", "run")
    refused("convert", "--to-hf", "--model", "half", "--data", "text.txt", "--out", "half")
    refused("tokenize", "text.txt", "--tokenizer", "data", "--out", "data")
    refused("tokenize", "text.txt", "--tokenizer", "data/tokenizer.json", "--out", "data")
    Path("linked").symlink_to("half")
    refused("convert", "--to-hf", "--model", "linked", "--data", "text.txt", "--out", "half")
    refused("tokenize", "dat*/tokenizer.json", "--out", "data")


def test_the_old_run_stays_until_the_new_is_whole(place: Path) -> None:
    """Killed, failed or stopped: the old run is there, and the new one can go on."""
    assert main([*COMMANDS["train"], "--out", "run"]) == 0
    before = contents(Path("run"))
    slow = [*COMMANDS["train"], "--out", "run", "--overwrite", "--steps", "100000"]
    process = start([*slow, "--save-every", "1"])
    deadline = time.monotonic() + 120
    while not list(Path().glob("run.new/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert contents(Path("run")) == before

    failing = [*COMMANDS["train"], "--out", "run", "--overwrite", "--lr", "1e30"]
    assert main([*failing, "--clip", "1e30", "--save-every", "1", "--steps", "50"]) == 1
    assert contents(Path("run")) == before, "the killed one made way, and this one failed"

    assert main(["train", "--resume", "run.new", "--quiet"]) == 1
    stopped = [*COMMANDS["train"], "--out", "run", "--overwrite", "--seed", "3"]
    assert main(stopped) == 0
    assert contents(Path("run")) != before and not Path("run.new").exists()


def test_a_resumed_run_takes_the_place_that_it_was_to_take(place: Path, capsys) -> None:
    from looptx_core.checkpoint.run_facts import update_facts

    assert main([*COMMANDS["train"], "--out", "run"]) == 0
    assert main([*COMMANDS["train"], "--out", "run.new", "--seed", "5"]) == 0
    update_facts(Path("run.new"), replaces="run")
    for part in Path("run.new/final").iterdir():
        part.unlink()
    Path("run.new/final").rmdir()
    assert main(["train", "--resume", "run.new", "--quiet"]) == 0, capsys.readouterr().err
    assert not Path("run.new").exists()
    assert "seed: 5" in Path("run/config.yaml").read_text()


def test_names_and_numbers() -> None:
    assert set(OUTPUTS) == {
        "train", "finetune", "convert", "tokenize", "codec", "inspect-loops"
    }  # fmt: skip


def test_a_rename_that_fails_and_a_writer_that_was_killed(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    new = temporary_beside(target)
    with pytest.raises(OSError):
        put_in_place(new, target)  # which is not there
    assert names(tmp_path) == ["out"] and names(target) == ["old"]
    assert temporary_beside(target) != temporary_beside(target)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    gone = new.name.replace(f"-{os.getpid()}-", f"-{dead}-")
    new.mkdir()
    (tmp_path / gone).mkdir()
    target.rename(tmp_path / gone.replace(".tmp", ".old"))  # killed between the two renames
    temporary_beside(target)
    assert sorted(names(tmp_path)) == sorted([new.name, "out"])
    assert names(target) == ["old"]


def test_a_link_is_no_way_around(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"command": "train"}')
    (tmp_path / "out" / "mine").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="mine"):
        check_output(tmp_path / "out", "train", overwrite=True)


@pytest.mark.parametrize(
    ("kind", "foreign"),
    [
        ("train", "checkpoints/step-notes/diary.txt"),
        ("train", "csv/deep/er.txt"),
        ("convert", "data_prep.py"),
        ("inspect-loops", "photos/cat.png"),
        ("inspect-loops", "mine.png"),
    ],
)
def test_what_looptx_did_not_make_is_told_by_each_part(kind: str, foreign: str) -> None:
    holds = OUTPUTS[kind].holds
    assert not any(_matches(foreign, pattern) for pattern in holds)
    for own in ("checkpoints/step-00000002.ckpt", "checkpoints/step-00000002/rank0/x.safetensors"):
        assert any(_matches(own, pattern) for pattern in OUTPUTS["train"].holds)
    assert any(_matches("model_loop.py", pattern) for pattern in OUTPUTS["convert"].holds)
    assert any(_matches("patches-1.png", pattern) for pattern in OUTPUTS["inspect-loops"].holds)


def test_another_targets_leftovers_stay(tmp_path: Path) -> None:
    other = tmp_path / f".y.new.{_machine()}-999999-0123abcd.old"
    other.mkdir()
    temporary_beside(tmp_path / "y")
    assert other.exists() and not (tmp_path / "y").exists()
    temporary_beside(tmp_path / "y.new")
    assert (tmp_path / "y.new").exists()


def test_a_run_that_waits_for_another_place_is_never_emptied(place: Path, capsys) -> None:
    """`run.new` is a finished run of its own, not what began to take the place of `run`."""
    for out in ("run", "run.new"):
        assert main([*COMMANDS["train"], "--out", out]) == 0
    before = contents(Path("run.new"))
    capsys.readouterr()
    assert main([*COMMANDS["train"], "--out", "run", "--overwrite"]) == 2
    assert "run.new is there already" in capsys.readouterr().err
    assert contents(Path("run.new")) == before


def test_a_kill_between_two_renames_is_mended_at_the_next_start(place: Path, capsys) -> None:
    """The run that was moved away is back, and the new one takes its place."""
    for out in ("run", "run.new"):
        assert main([*COMMANDS["train"], "--out", out]) == 0
    facts = json.loads(Path("run.new/run.json").read_text())
    Path("run.new/run.json").write_text(json.dumps({**facts, "replaces": "run"}))
    Path("run.new/mark").touch()
    Path("run").rename(f".run.{_machine()}-999999-0123abcd.old")
    assert main(["train", "--resume", "run.new", "--quiet"]) == 0, capsys.readouterr().err
    assert Path("run/mark").exists() and not Path("run.new").exists()
    assert not [name for name in names() if name.startswith(".run")]


def test_a_run_that_was_killed_before_it_began_takes_no_place(tmp_path: Path) -> None:
    """Its folder has a lock without an owner, and perhaps half of a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.lock").write_text("{}")
    (tmp_path / "run/.run.json.01234567-99-89abcdef.tmp").write_text("{")
    assert check_output(tmp_path / "run", "train", overwrite=False) == ""
    (tmp_path / "run/notes.txt").touch()
    with pytest.raises(UsageError, match="exists"):
        check_output(tmp_path / "run", "train", overwrite=False)


def test_a_report_on_a_full_disk_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures do not fit: nothing of the new report stays, and all of the old one."""
    from looptx_core.inspection import figures
    from looptx_core.inspection.report import write_report

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "loops.png")

    monkeypatch.setattr(figures, "plot_figures", fails)
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text('{"command": "inspect-loops"}')
    for name in ("new", "old"):
        with pytest.raises(LooptxError, match="No space left"):
            write_report({}, tmp_path / name)
    assert [file.name for file in tmp_path.rglob("*")] == ["old", "report.json"]


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError) as found, replacing(tmp_path / "curves.png") as temporary:
        temporary.write_bytes(b"1")
    assert str(tmp_path) in found.value.filename and not list(tmp_path.iterdir())
