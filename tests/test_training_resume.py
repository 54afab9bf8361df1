"""Going on with a run: what decides where, who may, and with what."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_commands import looptx, start
from test_training_runs import SETTINGS

from looptx_cli.main import main
from looptx_core.checkpoint.run_lock import RunLock, refuse_if_running
from looptx_core.data.corpus import bundled_text
from looptx_core.documents import check_regular
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.training.callbacks import JsonLines, read_metrics, resume_point

TRAIN = ["train", "--config", "tiny.yaml", "--quiet", "--out", "run", "--data"]


@pytest.fixture
def place(workplace: Path, shards: Path) -> Path:
    Path("shards").symlink_to(shards)
    model = {**SETTINGS["model"], "vocab_size": 400, "d_model": 16, "core_layers": 1, "d_ff": 32}
    settings = {**SETTINGS, "batch_size": 2, "micro_batch": 2, "model": model}
    Path("tiny.yaml").write_text(json.dumps(settings))
    return workplace


def trained(*flags: str) -> None:
    assert main([*TRAIN, "shards", *flags]) == 0


def steps(kind: str = "train_loss") -> list[int]:
    return [r["step"] for r in read_metrics(Path("run/metrics.jsonl")) if kind in r]


def test_the_last_evaluation_is_in_every_record(place: Path) -> None:
    """Not only where the number of steps is a multiple of --val-every."""
    trained("--steps", "8", "--val-every", "5", "--log-every", "3")
    assert steps("val_loss") == [5, 8]
    facts = json.loads(Path("run/final/config.json").read_text())["facts"]
    last = [r for r in read_metrics(Path("run/metrics.jsonl")) if "val_loss" in r][-1]
    assert facts["loss_by_loop"] == pytest.approx(last["val_loss_by_loop"], abs=1e-4)
    with Path("run/csv/metrics.csv").open() as file:
        written = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert written[-1] == pytest.approx(last["val_loss"], abs=1e-4)
    assert list(Path("run/checkpoints").glob("step-0000008.ckpt")), "for a run that is to go on"


def test_the_best_weights_make_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose loss rises; one that was resumed in between knows what was best before."""
    import torch
    from safetensors.torch import load_file

    def uphill_from_4(config: object) -> Callable[[int], float]:
        return lambda step: 1.0 if step < 3 else -30.0

    monkeypatch.setattr("looptx_core.training.module.learning_rate_factor", uphill_from_4)
    trained("--steps", "9", "--val-every", "3", "--save-every", "3", "--keep-best")
    losses = {r["step"]: r["val_loss"] for r in read_metrics(Path("run/metrics.jsonl"))
              if "val_loss" in r}  # fmt: skip
    best = min(losses, key=losses.__getitem__)
    assert best == 3, "or this shows nothing"
    (kept,) = Path("run/checkpoints/best").glob("*.ckpt")
    assert kept.name == f"step-{best:07d}.ckpt"
    facts = json.loads(Path("run/final/config.json").read_text())["facts"]
    assert facts["best_step"] == best
    assert facts["loss_by_loop"][-1] == pytest.approx(losses[best], abs=1e-4)
    weights = load_file("run/final/model.safetensors")
    saved = torch.load(kept, weights_only=True)["state_dict"]
    norms = [name for name in saved if name.endswith("norm.weight")]
    assert norms and all(any(torch.equal(saved[name], w) for w in weights.values())
                         for name in norms)  # fmt: skip

    # As if it had been killed after the best step was validated.
    Path("run/checkpoints/step-0000009.ckpt").unlink()
    Path("run/run.json").write_text(Path("run/run.json").read_text().replace("finished", "other"))
    assert main(["train", "--resume", "run", "--quiet"]) == 0
    again = load_file("run/final/model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_failure_before_the_first_record_leaves_no_gap(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is there, and a full disk ended the run before its first record."""
    often = ("--steps", "4", "--save-every", "2", "--log-every", "2", "--val-every", "2")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("looptx_core.training.callbacks.note_digest", full)
        assert main([*TRAIN, "shards", *often]) == 1
    assert list(Path("run/checkpoints").glob("step-*2.ckpt")) and steps() == []
    assert main(["train", "--resume", "run", "--quiet"]) == 0
    assert steps() == steps("val_loss") == [2, 4]


def test_a_profile_has_the_steps_that_were_asked_for(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained("--steps", "5", "--profile", "2")
    assert "profiler_start" not in capfd.readouterr().err, "a line of the profiler's C++ part"
    trace = json.loads(Path("run/profile/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#ChainedOptimizer.step") == 2
    assert "aten::" in Path("run/profile/table.txt").read_text()


def test_a_single_point_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.axes

    from looptx_core.training.curves import plot_run

    marks: list[tuple[int, object]] = []
    plot = matplotlib.axes.Axes.plot

    def seen(self, x, *rest, **how):
        marks.append((len(list(x)), how.get("marker")))
        return plot(self, x, *rest, **how)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", seen)
    val = {"step": 4, "val_loss": 2.0, "val_loss_by_loop": [2.1, 2.0]}
    plot_run([{"step": 4, "train_loss": 2.0}, val], {}, tmp_path / "one.png")
    assert marks and all(mark for count, mark in marks if count == 1)
    assert [count for count, _ in marks].count(1) == 3


@pytest.mark.parametrize("damage", ["emptied", "removed", "cut", "no JSON"])
def test_checkpoints_decide_and_not_the_log(damage: str, place: Path, capsys) -> None:
    trained("--steps", "12")
    log = Path("run/metrics.jsonl")
    facts = json.loads(Path("run/run.json").read_text())
    del facts["finished"]
    Path("run/run.json").write_text(json.dumps(facts))
    text = log.read_text()
    if damage == "removed":
        log.unlink()
    else:
        log.write_text({"emptied": "", "cut": text[: len(text) // 4], "no JSON": "5\n[]\n"}[damage])
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    err = capsys.readouterr().err
    assert "resumed: at step 12" in err and "lost records" in err


def test_a_log_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    for name in ("metrics.jsonl", "zeros.jsonl"):
        with pytest.raises(DataError, match="not a regular file"):
            read_metrics(tmp_path / name)
    assert read_metrics(tmp_path / "none") == []
    with pytest.raises(DataError, match=r"(metrics|zeros)\.jsonl: not a regular file"):
        check_regular(tmp_path)


def test_values_of_other_types_are_left_out(tmp_path: Path) -> None:
    good = ['{"step": 2, "train_loss": 3.5, "lr": 1}',
            '{"step": 2, "val_loss": 1.0, "val_loss_by_loop": [1.5, 1.0]}',
            '{"step": 2, "stretch": {"from": 2, "to": 4, "lr": 0.1}}']  # fmt: skip
    none = ["5", "[]", "{}", '{"step": "2"}', '{"step": true}', f'{{"step": {10**30}}}']
    wrong = ['"val_loss": "x"', '"lr": {}', '"stretch": 1', '"val_loss_by_loop": 1.0',
             '"val_loss_by_loop": []', '"val_loss_by_loop": [1.0, null]']  # fmt: skip
    lines = [*good, *none, *(f'{{"step": 3, {part}}}' for part in wrong)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == [*map(json.loads, good), *[{"step": 3}] * len(wrong)]


def test_a_kill_before_the_records_of_a_checkpoint(tmp_path: Path) -> None:
    """Then the one before serves, or the start, and the log has no gap."""
    log = tmp_path / "metrics.jsonl"
    for step in (4, 8):
        (tmp_path / f"step-{step:07d}.ckpt").touch()
    how = {"log_every": 1, "val_every": 8, "save_every": 4, "last_step": 10}

    def at(lines: list[dict]) -> tuple[str | None, bool]:
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found, logged = resume_point(tmp_path, log, **how)
        return found and found.stem, logged

    train = [{"step": n, "train_loss": 1.0} for n in range(1, 9)]
    assert at([*train, {"step": 8, "val_loss": 1.0}]) == ("step-0000008", True)
    assert at(train) == ("step-0000004", True), "not validated yet"
    assert at(train[:3]) == (None, True), "the first one, not logged yet"
    assert at(train[:1]) == ("step-0000008", False), "lost"
    (tmp_path / "step-0000004.ckpt").unlink()
    (tmp_path / "step-0000010.ckpt").touch()
    train += [{"step": n, "train_loss": 1.0} for n in (9, 10)]
    assert at([*train, {"step": 8, "val_loss": 1.0}]) == ("step-0000008", True)


def test_a_full_disk_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.log_metrics({"train_loss": 1.0}, step)
    before = log.file.read_text()

    def full(self: Path, *_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(LooptxError, match="No space left"):
            log.cut_back(2)
    assert log.file.read_text() == before
    log.cut_back(2)
    assert [r["step"] for r in read_metrics(log.file)] == [1, 2]


def test_a_finished_run_does_nothing_and_can_go_on(place: Path, capsys) -> None:
    trained("--steps", "6")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    for flags in ([], ["--steps", "6"], ["--json"]):
        capsys.readouterr()
        assert main(["train", "--resume", "run", *flags]) == 0
        err = capsys.readouterr().err
        assert "finished, 6 steps; --steps N" in err
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before
    assert main(["train", "--resume", "run", "--steps", "4"]) == 2
    assert "give more" in capsys.readouterr().err

    assert main(["train", "--resume", "run", "--steps", "10"]) == 0
    out = capsys.readouterr().out
    assert f"10 steps, 4 of them now: {4 * 2 * 32} tokens" in out
    records = read_metrics(Path("run/metrics.jsonl"))
    assert steps() == list(range(1, 11)) and steps("val_loss") == [6, 10]
    rate = 0.003 * 0.1
    marks = [r["stretch"] for r in records if "stretch" in r]
    assert marks == [{"from": 6, "to": 10, "lr": pytest.approx(rate)}]
    assert [r["lr"] for r in records if "train_loss" in r][-4:] == pytest.approx([rate] * 4)
    assert json.loads(Path("run/final/config.json").read_text())["facts"]["steps"] == 10
    assert main(["train", "--resume", "run"]) == 0
    assert "finished, 10 steps" in capsys.readouterr().err


def test_steps_of_an_unfinished_run_stay(place: Path, capsys) -> None:
    trained("--steps", "4000", "--max-minutes", "0.01")
    assert main(["train", "--resume", "run", "--steps", "5000"]) == 2
    assert "before the run has done its 4,000 steps" in capsys.readouterr().err


def test_a_run_goes_on_with_the_data_that_it_began_with(place: Path, capsys) -> None:
    text = bundled_text().read_text("utf-8")[20_000:60_000]
    Path("t.txt").write_text(text)
    assert main([*TRAIN, "t.txt", "--steps", "4000", "--max-minutes", "0.01"]) == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    Path("t.txt").write_text(text.replace("whale", "squid"))
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 4
    err = capsys.readouterr().err.splitlines()[-1]
    assert "not what this run began with" in err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_finetuning_goes_on_with_its_examples_and_its_base(
    tiny: Path, questions: Path, place: Path, capsys
) -> None:
    import shutil

    shutil.copy(questions, "qa.jsonl")
    shutil.copytree(tiny, "base")
    command = ["finetune", "--lora", "--model", "base", "--data", "qa.jsonl", "--steps", "2",
               "--seq-len", "64", "--batch-size", "2", "--out", "tuned", "--quiet"]  # fmt: skip
    assert main(command) == 0
    Path("qa.jsonl").write_text(questions.read_text().replace("a", "b", 3))
    before = Path("tuned/run.json").read_text()
    assert main(["finetune", "--resume", "tuned", "--steps", "3"]) == 4
    assert "the data is not what this run began with" in capsys.readouterr().err
    assert Path("tuned/run.json").read_text() == before


HOLD = """
import sys, time
from pathlib import Path
from looptx_core.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); time.sleep(60)
"""


def test_one_writer_a_run(place: Path, capsys) -> None:
    trained("--steps", "2")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, "run"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    before = sorted(Path("run").rglob("*"))
    for flags in (["--resume", "run", "--steps", "4"], [*TRAIN[1:], "shards", "--overwrite"]):
        assert main(["train", *flags]) == 2
        assert f"process {holder.pid}" in capsys.readouterr().err
    assert sorted(Path("run").rglob("*")) == before
    holder.kill()
    holder.wait()
    assert Path("run/run.lock").exists(), "a killed process leaves it"
    refuse_if_running(Path("run"))
    Path("run/run.lock").write_text(json.dumps({"process": holder.pid, "machine": "here"}))
    assert main(["train", "--resume", "run", "--steps", "4"]) == 0
    assert f"taken over from process {holder.pid}" in capsys.readouterr().err
    assert not Path("run/run.lock").exists()


def test_numbers_and_places_are_taken_by_one(place: Path) -> None:
    """Started at once without --out, each run has a folder; with one --out, one is refused."""
    command = ["train", "--config", "tiny.yaml", "--steps", "3", "--quiet", "--data", "shards"]
    two = [start([*command, "--seed", str(seed)]) for seed in (1, 2)]
    assert [process.wait(200) for process in two] == [0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["train-1", "train-2"]
    for run in Path("runs").iterdir():
        assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "train_loss" in r] == [
            *range(1, 4)
        ]
    lock = RunLock(Path("runs/train-1"))
    lock.acquire()
    begun = time.monotonic()
    done = looptx([*command, "--out", "runs/train-1", "--overwrite"])
    assert done.returncode == 2 and time.monotonic() - begun < 60
    lock.release()
    with pytest.raises(UsageError, match="exists"):
        from looptx_core.checkpoint.registry import next_run_dir

        next_run_dir("runs/train-1", "train", False)


def test_training_goes_on_with_a_models_weights(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its shape, its tokenizer and its lineage, at a lower learning rate."""
    import torch

    from looptx_core.checkpoint.folder import load_model

    trained("--steps", "6")
    text = bundled_text().read_text("utf-8")[200_000:230_000]
    Path("more.txt").write_text(text)
    capsys.readouterr()
    on = ["train", "--init", "run", "--data", "more.txt", "--val-batches", "1", "--seq-len", "16",
          "--batch-size", "2", "--val-every", "1", "--log-every", "1"]  # fmt: skip
    assert main([*on, "--steps", "2", "--out", "on", "--warmup", "0", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rates = [line["lr"] for line in lines if "train_loss" in line]
    assert rates[0] == pytest.approx(2e-3 * 64), "a width of 16"
    first, second = load_model("run/final"), load_model("on/final")
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert first.config.d_model == second.config.d_model == 16
    assert [model["name"] for model in second.facts["lineage"]] == ["run"]
    assert second.facts["steps"] == 2

    # A step of no length leaves the weights as they were.
    assert main([*on, "--steps", "1", "--out", "still", "--lr", "1e-30", "--quiet"]) == 0
    old, still = first.model.state_dict(), load_model("still/final").model.state_dict()
    assert all(torch.equal(value, still[name]) for name, value in old.items())
    capsys.readouterr()
    for wrong, named in (("--preset small", "preset"), ("--set model.d_ff=64", "_proj")):
        assert main([*on, *wrong.split(), "--out", "no"]) == 2
        assert named in capsys.readouterr().err
    assert main(["train", "--resume", "on", "--quiet"]) == 0


def test_tasks_are_measured_while_training_and_change_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def losses() -> list[float]:
        return [r["train_loss"] for r in read_metrics(Path("run/metrics.jsonl"))
                if "train_loss" in r]  # fmt: skip

    asked = ("--eval-tasks", "p_hop,text", "--eval-limit", "2")
    assert main([*TRAIN, "shards", *asked]) == 2
    assert "--eval-tasks does nothing without --eval-every" in capsys.readouterr().err
    assert main([*TRAIN, "shards", "--eval-every", "1", "--eval-tasks", "phop"]) == 2
    assert "--eval-tasks phop: no such task; did you mean p_hop?" in capsys.readouterr().err
    assert not Path("run").exists()
    trained("--steps", "3", "--eval-every", "2", *asked)
    with_tasks = losses()
    assert steps("eval_p_hop_accuracy") == steps("eval_text_bits_per_byte_at_1") == [2, 3]
    bits = [r["eval_text_bits_per_byte"] for r in read_metrics(Path("run/metrics.jsonl"))
            if "eval_text_bits_per_byte" in r]  # fmt: skip
    assert all(1 < value < 12 for value in bits) and bits[0] != bits[1]
    assert "eval_p_hop_accuracy" in Path("run/csv/metrics.csv").read_text()
    trained("--steps", "3", "--overwrite")
    assert losses() == with_tasks
