"""The benchmarks' records follow one schema, and docs/benchmarks.md is what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_page_is_what_the_records_say():
    done = run("benchmarks.page", "--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_record_makes_the_page_stale(tmp_path, monkeypatch):
    from benchmarks import page
    from benchmarks.common import tables

    records = tables.all_records()
    (tokenizing,) = [r for r in records if r["benchmark"] == "tokenizing.run"]
    newer = json.loads(json.dumps(tokenizing)) | {"date": "2099-01-01"}
    newer["rows"][0]["peak_rss_megabytes"] = 12345
    monkeypatch.setattr(tables, "all_records", lambda: [newer, *records])
    assert "| 12345 |" in page.page() and "2099-01-01" in page.page()
    assert page.page() != page.PAGE.read_text("utf-8")


def test_every_record_follows_the_schema_and_backs_a_section():
    from benchmarks.common.record import read, slug
    from benchmarks.page import QUESTIONS

    text = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    questions = sorted(file.parent for file in ROOT.glob("benchmarks/*/section.py"))
    files = [file for folder in questions for file in folder.glob("results/*.json")]
    assert len(questions) == len(QUESTIONS) and len(files) > len(questions)
    for file in files:
        record = read(file)
        question, script = record["benchmark"].split(".")
        assert file.parts[-3] == question
        assert (ROOT / "benchmarks" / question / f"{script}.py").is_file(), file
        assert file.stem.endswith(slug(record["machine"]["name"])), file
        assert record["commit"] != "unknown" and "+" not in record["commit"], file
        assert record["command"].startswith(f"python -m benchmarks.{record['benchmark']}"), file
        assert f"`{record['command']}`" in text, f"{file} backs nothing on the page"


@pytest.mark.parametrize(
    "change, word",
    [
        ({"rows": []}, "empty"),
        ({"rows": [{"a": {"b": 1}}]}, "flat"),
        ({"commit": "main"}, "hash"),
        ({"date": "26 November"}, "YYYY"),
        ({"machine": {"name": "a laptop"}}, "machine"),
        ({"schema_version": 2}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"what": None}, "what"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(change, word, tmp_path):
    from benchmarks.common.record import check, read

    good = read(next(iter(sorted(ROOT.glob("benchmarks/tokenizing/results/*.json")))))
    check(good)
    with pytest.raises(ValueError, match=word):
        check({**good, **change})
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read(file)


def test_a_script_writes_a_record(tmp_path):
    done = run(
        "benchmarks.batches.run", "--new", "2", "--rounds", "1", "--skip-small", "--kernel",
        "torch", BENCH_RESULTS=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from benchmarks.common.record import read

    (file,) = tmp_path.iterdir()
    record = read(file)
    assert record["benchmark"] == "batches.run" and record["rows"][0]["model"] == "bundled"
    assert record["command"].endswith("--skip-small --kernel torch")
    assert record["machine"]["threads"] == 1 and record["versions"]["torch"]


@pytest.mark.parametrize("power", [0.2, 0.9])
def test_the_power_of_a_law_is_found_again(power):
    """And its interval, of losses that scatter."""
    import numpy as np

    from benchmarks.depth.power import fit

    noise, rows = np.random.default_rng(0), []
    for width in (32, 48, 64) * 2:
        for loops in (1, 2, 3, 6):
            size = 6 // loops * 13 * width**2
            loss = 1.5 + 0.4 * (loops**power * size / 1e5) ** -0.3 + 0.005 * noise.normal()
            rows.append((loops, size, loss))
    found = fit(*zip(*rows))
    assert found.low < power < found.high < found.low + 0.4
    assert found.value == pytest.approx(power, abs=0.15) and found.residual < 0.01
    with pytest.raises(ValueError, match="at least four"):
        fit(*zip(*(row for row in rows if row[0] < 6)))
    with pytest.raises(ValueError, match="do not lower"):
        fit(*zip(*((loops, size, -loss) for loops, size, loss in rows)))


def test_nested_figures_become_flat_rows():
    from benchmarks.common.record import rows_by

    assert rows_by({"a": {"x": {"rate": {"ours": 1}, "n": 2}}}, "model", "kind") == [
        {"model": "a", "kind": "x", "rate.ours": 1, "n": 2}
    ]


@pytest.mark.parametrize(
    ("said", "heard", "wrong"),
    [
        ("one two three", "one two three", 0),
        ("one two three", "", 3),
        ("one two three", "two three four", 2),
        ("one two", "one one two two", 2),
        ("one two three", "one too three", 1),
    ],
)
def test_wrong_words_are_counted_by_the_shortest_way(said, heard, wrong):
    from benchmarks.sound.run import errors

    assert errors(said, heard) == wrong


def test_commands_in_the_docs_name_scripts_that_exist():
    texts = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md"),
             *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("looptx_core/**/*.md")]  # fmt: skip
    named = set()
    for file in texts:
        text = file.read_text("utf-8")
        assert not re.search(r"python benchmarks/\w+\.py", text), file
        named |= set(re.findall(r"python\s+-m (benchmarks(?:\.\w+)+)", text))
    assert "benchmarks.decode_speed.run" in named
    for module in named:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
