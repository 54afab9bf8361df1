"""looptx sweep: a grid of runs that goes on where it stopped, and what it makes of their losses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from looptx_cli.main import main
from looptx_core.config.sweep import MOST_RUNS, read_grid
from looptx_core.errors import Interrupted
from looptx_core.inspection.sweep import interval, sweep_chart

SMALL = """
steps: 1
seq_len: 32
batch_size: 2
val_batches: 1
precision: float32
model: {d_model: 32, n_heads: 2, n_kv_heads: 1, head_dim: 16, d_ff: 32, core_layers: 1,
        max_loops: 2}
"""


def test_a_grid_that_fails_in_part_and_goes_on(
    workplace: Path, shards: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Path("grid.yaml").write_text(f"seeds: [3, 4]\ndata: [{shards}, gone.txt]\n{SMALL}")
    assert main(["sweep", "grid.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 runs in runs/sweep-grid, 4 of them to train" in shown and not Path("runs").exists()

    assert main(["sweep", "grid.yaml", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    good, bad = document["rows"]
    runs = document["runs"]
    losses = [run["loss"] for run in runs[:2]]
    assert good["seeds"] == 2 and good["mean_loss"] == pytest.approx(sum(losses) / 2)
    assert losses[0] != losses[1] and good["interval"] == pytest.approx(interval(losses))
    assert bad == {"settings": {"data": ["gone.txt"]}, "seeds": 0, "mean_loss": None,
                   "interval": None}  # fmt: skip
    assert [run["state"] for run in runs] == ["finished", "finished", "failed", "failed"]
    assert "gone.txt" in runs[2]["error"] and err.count("failed, gone.txt") == 2
    assert "2 of 4 runs failed" in err.splitlines()[-1]
    assert Path("runs/sweep-grid/sweep.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads(Path("runs/sweep-grid/sweep.json").read_text())
    assert written == {"command": "sweep", **document}

    # One was stopped before its end and goes on; what has finished stays as it is.
    first, second = (Path(run["folder"]) for run in runs[:2])
    assert main(["compare", str(first), str(second), "--quiet"]) == 0, "ordinary runs"
    shutil.rmtree(second / "final")
    capsys.readouterr()
    assert main(["sweep", "grid.yaml", "--quiet"]) == 1, "nothing is left to train"
    err = capsys.readouterr().err
    assert f"its steps are done and {second} holds no result; remove that folder" in err
    assert err.count("failed, gone.txt") == 2 and "3 of 4 runs failed" in err.splitlines()[-1]
    facts = json.loads((second / "run.json").read_text())
    del facts["finished"]
    (second / "run.json").write_text(json.dumps(facts))
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    capsys.readouterr()
    assert main(["sweep", "grid.yaml"]) == 1
    out, err = capsys.readouterr()
    assert f"finished before, {losses[0]:.4f}" in err and f"{losses[1]:.4f} nats a token" in err
    assert "2 of 2" in out and "best" in out
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == before

    # Stopped after the second, which finishes meanwhile.
    (second / "final").rename("aside")

    def stopped(_: object, run: Path) -> None:
        if run != second:
            raise Interrupted("stopped and saved")
        Path("aside").rename(second / "final")

    monkeypatch.setattr("looptx_cli.sweep._train", stopped)
    assert main(["sweep", "grid.yaml", "--quiet"]) == 130
    assert "stopped and saved" in capsys.readouterr().err
    written = json.loads(Path("runs/sweep-grid/sweep.json").read_text())
    assert [run["state"] for run in written["runs"]] == ["finished", "finished", "new", "new"]
    assert written["rows"][0]["seeds"] == 2


BAD = {
    "no such key": ("lrr: [1, 2]", "grid.yaml, line 1: unknown key 'lrr', did you mean 'lr'?"),
    "of the model": ("model: {d_modle: [8]}", "did you mean 'model.d_model'?"),
    "an empty list": ("steps: 5\nlr: []", "line 2: lr has an empty list"),
    "no seeds": ("seeds: []", "seeds has an empty list"),
    "a number of seeds": ("seeds: 3", "seeds is a list"),
    "a value twice": ("lr: [0.1, 1e-1]", "lr: 0.1 is there twice"),
    "another type": ("lr: [0.1, fast]", "lr: expected a number"),
    "out of range": ("lr: [0.1, -1]", "with lr -1: "),
    "a seed": ("seed: [1, 2]", "'seed' can't stand in a grid; give `seeds` a list"),
    "a place": ("out: [a, b]", "'out' can't stand in a grid"),
    "too many": (f"seeds: {list(range(100))}\nlr: {[n + 1 for n in range(100)]}",
                 f"10,000 runs, and the limit is {MOST_RUNS:,}"),
    "not YAML": ("lr: [", "not valid YAML"),
    "two lengths": ("steps: 5\nepochs: [1, 2]", "with epochs 1: `epochs` and `steps` each say"),
    "two shapes": ("preset: small\ninit: [a, b]", "with init a: `init` brings the model's own"),
    "a key twice": ("model.core_layers: [1, 2]\nmodel: {core_layers: 3}",
                    "grid.yaml, line 2: model.core_layers stands twice"),
    "a context": ("seq_len: [64, 4096]", "with seq_len 4096: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_grids(case: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, what = BAD[case]
    Path("grid.yaml").write_text(text)
    assert main(["sweep", "grid.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and what in err, err
    assert not Path("runs").exists()


def test_bad_places(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("grid.yaml").write_text("lr: [0.1]")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    for out in ("mine", "grid.yaml"):
        assert main(["sweep", "grid.yaml", "--out", out]) == 2
        assert f"{out} is there and holds no sweep" in capsys.readouterr().err
    assert main(["sweep", "none.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_sweep_keeps_its_folder(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(text: str, file: str = "grid.yaml", *flags: str) -> tuple[int, str]:
        Path(file).write_text(text)
        code = main(["sweep", file, "--out", "out", *flags])
        return code, capsys.readouterr().err

    monkeypatch.setattr("looptx_cli.sweep._train", lambda cell, run: None)
    Path("out").mkdir()
    for own in ("{}", "[]", "{", '{"command": "sweep"}', '{"command": "compare", "rows": []}'):
        Path("out/sweep.json").write_text(own)
        code, err = sweep("lr: [0.1, 0.2]")
        assert code == 2 and err.count("\n") == 1 and "out is there and holds no sweep" in err
        assert Path("out/sweep.json").read_text() == own
    Path("out/sweep.json").unlink()
    code, err = sweep("lr: [0.1, 0.2]\nsteps: 5\ndata: a.txt")
    written = Path("out/sweep.json").read_text()
    others = {
        "lr: [0.1, 0.2]\nsteps: 6\ndata: a.txt": "steps",
        "lr: [0.1, 0.2]\nsteps: 5": "data",
        "lr: [0.1, 0.2]\nsteps: [5, 6]\ndata: a.txt": "steps",
        "lr: 0.1\nsteps: 5\ndata: a.txt\nbeta2: [0.9, 0.99]": "beta2, lr",
    }
    for text, key in others.items():
        code, err = sweep(text)
        assert code == 2 and f"another grid, by {key}; choose another --out" in err, err
    inside = Path(json.loads(written)["runs"][0]["folder"], "grid.yaml")
    inside.parent.mkdir()
    for file in ("out/sweep.json", "out/sweep.png", str(inside)):
        code, err = sweep("{lr: [0.1, 0.2], steps: 5, data: a.txt}", file)
        assert code == 2 and f"{file} stands where the sweep writes" in err, err
        assert Path(file).read_text().startswith("{lr")
    Path("out/sweep.json").write_text(written)
    code, err = sweep("data: a.txt\nsteps: 5\nlr: [0.2, 0.4]\nseeds: [0, 7]", "out/mine.yaml",
                      "--dry-run")  # fmt: skip
    assert code == 0, err


def test_a_run_is_known_by_all_its_settings(workplace: Path) -> None:
    def names(text: str) -> list[str]:
        Path("grid.yaml").write_text(text)
        return [cell.name for cells in read_grid(Path("grid.yaml")).cells for cell in cells]

    first = names("steps: 5\nlr: [0.1, 0.2]")
    assert first[0].startswith("lr-0.1-seed-0-")
    assert names("steps: 5\nlr: [0.2, 0.1, 0.3]\nseeds: [0]")[:2] == first[::-1]
    assert not {*names("steps: 6\nlr: [0.1, 0.2]")} & {*first}
    (odd,) = names("data: ['../a b/x:*.txt']")
    assert odd.startswith("seed-0-"), "what does not vary is not in the name"
    long = names(f"data: [{'a' * 300}, '../b/c']")
    assert all("/" not in name and len(name) < 100 for name in long)


@pytest.mark.parametrize("name", ["LOOPTX_LR", "LOOPTX_MODEL_D_MODEL", "LOOPTX_CONFIG"])
def test_no_settings_beside_the_grid(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("grid.yaml").write_text("beta2: [0.9, 0.99]")
    monkeypatch.setenv("LOOPTX_VOCAB_SIZE", "400")  # of looptx tokenize
    assert main(["sweep", "grid.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    monkeypatch.setenv(name, "8")
    assert main(["sweep", "grid.yaml", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert f"{name} is set, and a sweep has" in err and err.count("\n") == 1


def test_means_have_intervals() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    many = [float(n % 2) for n in range(41)]  # 40 degrees of freedom: t is 2.021
    spread = interval(many)
    assert spread == pytest.approx(2.021 * 0.5060 / math.sqrt(41), rel=1e-3)


def test_the_chart_has_the_longest_axis_across(workplace: Path) -> None:
    Path("grid.yaml").write_text("lr: [0.1, 0.2]\nmodel.core_layers: [1, 2, 4]\n"
                                 "seeds: [0, 1]")  # fmt: skip
    grid = read_grid(Path("grid.yaml"))
    rows: list[dict[str, Any]] = [{"mean_loss": float(n), "interval": 0.5} for n in range(6)]
    rows[4] = {"mean_loss": None, "interval": None}
    chart = sweep_chart(grid, {"rows": rows})
    assert chart.x == "model.core_layers" and list(chart.names) == ["1", "2", "4"]
    assert [series.name for series in chart.series] == ["lr 0.1", "lr 0.2"]
    assert list(chart.series[1].points) == [(0, 3.0), (1, None), (2, 5.0)]
    assert list(chart.series[1].errors) == [0.5, 0.0, 0.5]
