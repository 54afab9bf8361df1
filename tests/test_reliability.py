"""The fuzz run of benchmarks/reliability: a case is its numbers, a bad end is seen, 50 end well."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import pytest

from looptx_cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_same_numbers_spoil_a_file_in_the_same_way(tmp_path: Path) -> None:
    from benchmarks.reliability import mutations

    def spoilt(number: int) -> tuple[str, bytes | None]:
        file = tmp_path / "x.json"
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_text(json.dumps({"a": [1, {"b": "c"}], "d": 2.5}))
        done = mutations.file(random.Random(f"0/{number}"), file)
        plain = file.is_file() and not file.is_symlink()
        return done, file.read_bytes() if plain else None

    first = [spoilt(number) for number in range(60)]
    assert first == [spoilt(number) for number in range(60)]
    assert len({done for done, _ in first}) > 8


BAD_ENDS = {
    "hang": {"ended_for": "time"},
    "memory": {"peak_bytes": 3 << 30},
    "crash": {"code": None, "signal": 11},
    "internal error": {"code": 1, "err": "looptx: error: internal error, KeyError: 'a'\n"},
    "exit code": {"code": 99, "err": "looptx: error: a\n"},
    "message": {"code": 4, "err": "oh\n"},
    "output": {"out": '{"loss": NaN}'},
}


@pytest.mark.parametrize("sort", BAD_ENDS)
def test_a_bad_end_is_seen(sort: str) -> None:
    from benchmarks.reliability.forks import Outcome
    from benchmarks.reliability.fuzz import judge

    good = {"code": 0, "signal": 0, "ended_for": "", "out": "{}", "err": "", "seconds": 1.0,
            "cpu_seconds": 1.0, "peak_bytes": 1 << 20}  # fmt: skip
    assert judge(Outcome(**good), ["runs", "--json"]) is None
    found = judge(Outcome(**{**good, **BAD_ENDS[sort]}), ["runs", "--json"])
    assert found is not None and found.sort == sort


def test_50_spoilt_inputs_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the long run that need no model beside a small one, in this process."""
    from benchmarks.reliability import cases, sound
    from benchmarks.reliability.forks import Outcome
    from benchmarks.reliability.fuzz import judge

    monkeypatch.setenv("LOOPTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOOPTX_KERNELS", "all")  # no trial of what is fast here
    sound.write_files(tmp_path / "sound")
    monkeypatch.chdir(tmp_path / "sound")
    for command in sound.COMMANDS[:2]:
        assert main(command.split()) == 0, capsys.readouterr().err
    names = ("shards", "run folders", "corpora", "YAML", "prompt files", "evaluation tasks")
    areas = {name: cases.AREAS[name] for name in names}
    areas["run folders"] = dataclasses.replace(areas["run folders"], spoilt=("run",))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    wrong = []
    try:
        for number in range(50):
            folder = tmp_path / str(number)
            folder.mkdir()
            case = cases.make(7, number, tmp_path / "sound", folder, areas)
            os.chdir(folder)
            capsys.readouterr()
            signal.alarm(60)  # what hangs is interrupted, which is none of the codes
            code = main(case.arguments)
            signal.alarm(0)
            shown = capsys.readouterr()
            found = judge(Outcome(code, 0, "", shown.out, shown.err, 0.0, 0.0, 0), case.arguments)
            if found:
                wrong.append(f"{number}: {case.what}: {found}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert wrong == []
