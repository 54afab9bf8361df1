"""looptx compare: tables for terminals and papers, figures, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from test_runs_list import make_run

from looptx_cli.main import main
from looptx_core.errors import DataError, UsageError
from looptx_core.inspection.compare import compare, plot_comparison, table
from looptx_core.inspection.tables import as_csv, as_latex, as_markdown

FRONTIER = [
    {"rule": rule, "threshold": 1, "mean_loops": loops, "loss": loss, "flops": loops / 2}
    for rule, loops, loss in [
        ("fixed", 1.0, 3.0), ("fixed", 2.0, 2.9), ("gain", 1.2, 2.92), ("gain", 1.5, 2.95),
        ("gain", 1.6, 2.9), ("oracle", 1.0, 2.5),
    ]
]  # fmt: skip


@pytest.fixture
def runs(workplace: Path) -> list[Path]:
    """Two runs of which one was measured."""
    a, b = make_run(Path("runs/a"), lr=0.5), make_run(Path("runs/b$_x"), lr=0.25)
    report(Path("runs/inspect-loops-1"), str(b.resolve() / "final"))
    return [a, b]


def report(folder: Path, model: str) -> None:
    folder.mkdir(parents=True)
    choice = {"mean_loops": 1.5, "loss": 2.75}
    document = {"model": model, "ece": 0.125, "auroc": None, "choice": choice}
    (folder / "report.json").write_text(json.dumps({**document, "frontier": FRONTIER}))


def test_the_document(runs: list[Path]) -> None:
    document = compare(runs)
    a, b = document["runs"]
    assert document["settings"] == {"lr": [0.5, 0.25]}
    assert (a["name"], a["best_loss"], a["best_bits_per_byte"], a["tokens"]) == (
        "a",
        2.25,
        1.8,
        640,
    )
    assert a["tokens_per_second"] == 120.0
    assert a["training_curve"] == [[10, 3.0], [20, 2.0]] and a["validation_curve"] == [[10, 2.5]]
    assert a["frontier"] is None and a["ece"] is None
    assert (b["ece"], b["auroc"], b["exit_loops"], b["exit_loss"]) == (0.125, None, 1.5, 2.75)
    assert [point["loss"] for point in b["frontier"]] == [point["loss"] for point in FRONTIER]


def test_the_newest_report_counts_and_damaged_ones_do_not(runs: list[Path]) -> None:
    (runs[0] / "report.json").write_text('{"ece": 0.5, "frontier": [{"rule": "fixed"}, 3]}')
    (runs[1] / "report.json").write_text('{"ece": ')
    a, b = compare(runs)["runs"]
    assert (a["ece"], a["frontier"], b["ece"]) == (0.5, None, 0.125)


def test_runs_of_one_name_are_told_apart(workplace: Path) -> None:
    folders = [make_run(Path("x/run")), make_run(Path("y/run"))]
    assert [run["name"] for run in compare(folders)["runs"]] == ["x/run", "y/run"]


def test_tables_for_other_tools(runs: list[Path]) -> None:
    found = table(compare(runs))
    head, *rows = csv.reader(io.StringIO(as_csv(found)))
    assert head[:4] == ["run", "steps", "tokens", "loss"] and head[-1] == "lr"
    assert [row[0] for row in rows] == ["a", "b$_x"] and [row[-1] for row in rows] == [
        "0.5",
        "0.25",
    ]
    assert rows[0][head.index("ECE")] == "" and rows[1][head.index("ECE")] == "0.125"
    assert "AUROC" not in head  # no run has one

    lines = as_markdown(found).splitlines()
    assert len(lines) == 4 and {line.count(" | ") for line in lines} == {len(head) - 1}
    assert lines[3].startswith(r"| b$\_x | 20 | 640 | 2.25 |")
    tex = as_latex(found)
    assert r"b\$\_x & 20 & 640 & 2.25" in tex and r"\toprule" in tex
    assert {len(re.findall(r"(?<!\\)&", line)) for line in tex.splitlines() if "&" in line} == {
        len(head) - 1
    }


MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("end", MAGIC)
def test_figures(end: str, runs: list[Path]) -> None:
    file = Path(f"figure{end}")
    plot_comparison(compare(runs), file)
    content = file.read_bytes()
    assert content.startswith(MAGIC[end])
    if end == ".svg":  # as texts, each run in the legend, and the three panels
        for text in (b"b$_x", b"Held-out, by loop", b"Early exits"):
            assert text in content
    assert sorted(Path().glob(f"*{end}*")) == [file]


def test_a_run_without_records_is_drawn(workplace: Path) -> None:
    run = make_run(Path("a"), finished=False)
    (run / "metrics.jsonl").unlink()
    plot_comparison(compare([run]), Path("a.svg"))
    assert Path("a.svg").stat().st_size > 0


def test_another_suffix(runs: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"figure\.gif"):
        plot_comparison(compare(runs), Path("figure.gif"))


def test_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(run) for run in runs]
    assert main(["compare", *names]) == 0
    out, err = capsys.readouterr()
    cells = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    assert cells["bits per byte"][-2:] == ["1.8", "1.8"] and cells["lr"][-2:] == ["0.5", "0.25"]
    assert cells["ECE"][-2:] == ["-", "0.125"] and "\x1b" not in out and "--out" in err

    assert main(["compare", *names, "--json", "--out", "f.svg"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema_version"] == 1 and err == "figure: f.svg\n"
    assert main(["compare", *names, "--out", "f.svg", "--overwrite", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("run,steps,")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["none"], 4, "none"),
        (["runs/inspect-loops-1"], 4, "not a run of looptx"),
        (["runs/a", "--out", "f.gif"], 2, ".svg"),
        (["runs/a", "--out", "old.svg"], 2, "--overwrite"),
        (["runs/a", "--out", "none/f.svg"], 2, "none"),
        (["runs/a", "--out", "runs/folder.svg", "--overwrite"], 2, "folder.svg"),
        (["runs/a", "--format", "xml"], 2, "csv, markdown, latex"),
        (["runs/a", "--format", "csv", "--json"], 2, "one of them"),
        ([], 2, "runs"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    code: int,
    word: str,
    runs: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("old.svg").write_text("mine")
    Path("runs/folder.svg").mkdir()
    assert main(["compare", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err
    assert Path("old.svg").read_text() == "mine"


def test_a_damaged_run_is_named(runs: list[Path]) -> None:
    (runs[1] / "config.yaml").unlink()
    with pytest.raises(DataError, match=re.escape("b$_x")):
        compare(runs)
