"""The command line: exit codes, one line for an error, clean streams, a light start."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.text import Text

from looptx_cli import main as cli
from looptx_cli.console import note, stdout
from looptx_cli.main import main
from looptx_core import __version__
from looptx_core.config.resolve import field_help
from looptx_core.config.run import TrainConfig
from looptx_core.errors import DataError, Interrupted, MissingError

LINE = "the whale and the sea and the ship went round and round the sea, said the whale\n"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("LOOPTX_")]:
        monkeypatch.delenv(name)
    # `main` may set this one; give the test process its own state back.
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(LINE * 50)
    return tmp_path


def looptx(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "looptx_cli.main", *args]
    root = str(Path(cli.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, **env}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)


def test_the_help_is_light() -> None:
    program = """
import importlib.util, sys
from looptx_cli.main import COMMANDS, main
assert main(["--help"]) == 0
for name in COMMANDS:
    if importlib.util.find_spec(f"looptx_cli.{name.replace('-', '_')}"):
        assert main([name, "--help"]) == 0
heavy = {"torch", "lightning", "transformers", "deepspeed", "peft", "numpy", "tokenizers"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "tokenize" in done.stdout and "\x1b" not in done.stdout
    assert done.stdout.index("looptx tokenize corpus") < done.stdout.index("Options")


def test_text_becomes_tokens_without_torch() -> None:
    program = """
import sys
from looptx_cli.main import main
assert main(["tokenize", "a.txt", "--vocab-size", "280", "--out", "data", "--quiet"]) == 0
print(sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "looptx_cli.main", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"looptx {__version__}\n"
    assert main([]) == 0
    assert "--install-completion" in capsys.readouterr().out


def test_completion_knows_the_commands() -> None:
    done = looptx(_LOOPTX_COMPLETE="complete_bash", COMP_WORDS="looptx tok", COMP_CWORD="1")
    assert done.stdout.strip() == "tokenize"


@pytest.mark.parametrize("color", ["", "1"])
def test_bare_tokenize_streams(color: str, workplace: Path) -> None:
    done = looptx("tokenize", "--vocab-size", "280", "a.txt", FORCE_COLOR=color)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.rstrip().endswith("runs/tokenize-1")
    assert "try next: looptx train --data runs/tokenize-1" in done.stderr


def test_tokenize_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize"]) == 0
    out, err = capsys.readouterr()
    assert "vocabulary 2,048" in out and "bundled text" in err
    assert main(["tokenize", "a.txt", "--vocab-size", "280"]) == 0
    assert Path("runs/tokenize-1/manifest.json").exists()
    assert Path("runs/tokenize-2/manifest.json").exists()


def test_tokenize_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenize", "a.txt", "--out", "t", "--vocab-size", "280", "--json", "--quiet"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    keys = "schema_version, documents, bytes, tokens, bytes_per_token, vocab_size, out"
    assert ", ".join(report) == keys and err == ""
    assert report["bytes"] == len(LINE) * 50 and report["out"] == "t"
    assert report["bytes_per_token"] == pytest.approx(report["bytes"] / report["tokens"], rel=0.05)

    assert main(["tokenize", "--data", "a.txt", "--tokenizer", "t", "--out", "u", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == report["tokens"]
    assert main([*command, "--overwrite"]) == 0


def test_tokenize_reads_standard_input() -> None:
    done = looptx("tokenize", "-", "--vocab-size", "280", "--json", stdin=LINE * 50)
    assert json.loads(done.stdout)["bytes"] == len(LINE) * 50


def test_settings_from_environment_and_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my.yaml").write_text("data: a.txt\nvocab_size: 290\nout: z\n")
    monkeypatch.setenv("LOOPTX_VOCAB_SIZE", "285")
    assert main(["tokenize", "--config", "my.yaml", "--out", "y", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["vocab_size"], report["out"]) == (285, "y")


BAD_INPUT = {
    "no such file": (["none.txt"], 4, "none.txt"),
    "empty corpus": (["empty.txt"], 4, "empty"),
    "invalid UTF-8": (["bad.txt"], 4, "bad.txt"),
    "vocabulary too large": (["a.txt", "--vocab-size", "4000"], 4, "use --vocab-size"),
    "vocabulary too small": (["a.txt", "--vocab-size", "3"], 2, "at least"),
    "out exists": (["a.txt", "--out", "full"], 2, "full exists; pass --overwrite"),
    "out is a stranger's": (["a.txt", "--out", "full", "--overwrite"], 2, "full"),
    "no tokenizer": (["a.txt", "--tokenizer", "full"], 4, "tokenizer"),
    "two vocabularies": (["--tokenizer", "x", "--vocab-size", "300"], 2, "leave --vocab-size"),
    "unknown flag": (["--vocab", "3"], 2, "--vocab-size"),
    "not a number": (["--seed", "x"], 2, "--seed"),
    "unknown key": (["--config", "bad.yaml"], 2, "did you mean 'vocab_size'"),
    "no configuration": (["--config", "none.yaml"], 2, "none.yaml"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").touch()
    Path("bad.txt").write_bytes(b"fine\n\xff\xfe\n" * 9)
    Path("bad.yaml").write_text("vocab: 3\n")
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    args, code, message = BAD_INPUT[case]
    before = sorted(workplace.rglob("*"))
    assert main(["tokenize", *args]) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("looptx: error: ")]
    assert out == "" and len(errors) == 1 and message in errors[0] and errors[0] in err[-500:]
    assert "Traceback" not in err
    assert sorted(workplace.rglob("*")) == before


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenise"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "tokenize" in err


@pytest.mark.parametrize(
    "error, code, message",
    [
        (DataError("two\nlines"), 4, "two lines"),
        (MissingError("no GPU"), 3, "no GPU"),
        (Interrupted("saved; resume by X"), 130, "saved; resume by X"),
        (OSError(errno.ENOSPC, "No space", "runs/a"), 1, "the disk is full while writing runs/a"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied"),
        (ModuleNotFoundError("No module", name="deepspeed"), 3, "package deepspeed is not"),
        (ZeroDivisionError("oops"), 1, "internal error, ZeroDivisionError: oops; run again with"),
    ],
)
def test_errors_become_codes(
    error: Exception,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _replace_command(monkeypatch, error)
    assert main(["tokenize"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("looptx: " if code == 130 else "looptx: error: ") and message in err
    for args in (["tokenize", "--debug"], ["--debug", "tokenize"]):
        assert main(args) == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message, shown",
    [
        ("`vocab_size` 3 is too small", "--vocab-size 3 is too small"),
        ("pass `overwrite` or another `out`", "pass --overwrite or another --out"),
        ("lower `seq_len`, or set `model.d_model`", "lower `seq_len`, or set `model.d_model`"),
        ("`as_json` and `inputs`, `--out`", "--json and `inputs`, `--out`"),
        ("a`b: no `out/x`; ``, `` ` `vocab-size` `", "a`b: no `out/x`; ``, `` ` `vocab-size` `"),
    ],
    ids=["one", "two", "no options here", "names that differ", "a stranger's backticks"],
)
def test_parameters_become_flags(
    message: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, report: Callable[[str], object], **__: object) -> None:
        report(message)
        raise DataError(message)

    importlib.import_module("looptx_cli.runs")  # which would keep `fail` for good
    monkeypatch.setattr("looptx_core.checkpoint.registry.next_run_dir", fail)
    assert main(["tokenize", "a.txt"]) == 4
    assert capsys.readouterr().err.splitlines() == [shown, f"looptx: error: {shown}"]
    assert main(["--out"]) == 2
    note("`out`")
    assert capsys.readouterr().err.splitlines()[-1] == "`out`", "no command runs"


def test_the_help_of_a_field_spells_flags() -> None:
    assert field_help(TrainConfig)["zero3"].startswith("The same as `strategy` zero3.")
    options = {p.name: p.help for p in cli.load_command("train").params}
    assert options["zero3"].startswith("The same as --strategy zero3.")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _replace_command(monkeypatch, KeyboardInterrupt())
    assert main(["tokenize"]) == 130
    assert capsys.readouterr().err == "looptx: interrupted\n"


def test_reasons_are_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("looptx_core")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)

    def choose() -> None:
        logging.getLogger("looptx_core.api").info("attention: sdpa, of its own")

    alone = typer.Typer()
    alone.command()(choose)
    command = typer.main.get_command(alone)
    monkeypatch.setattr(cli, "load_command", lambda name: command)
    for flags, told in ([], ""), (["--debug"], "attention: sdpa, of its own\n"):
        assert main(["doctor", *flags]) == 0
        assert capsys.readouterr().err == told


def test_a_closed_pipe_is_quiet() -> None:
    root = Path(cli.__file__).parent.parent
    command = f"{sys.executable} -m looptx_cli.main tokenize a.txt --vocab-size 280 --quiet"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stderr == "" and done.stdout.strip() in ("0", "1")


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_a_terminal_without_codes(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stdout().print(Text("x", style="bold red"))
    assert "\x1b" in capsys.readouterr().out
    monkeypatch.setenv(variable, "dumb")
    stdout().print(Text("x", style="bold red"))
    note("hidden", quiet=True)
    note("[shown]")
    out, err = capsys.readouterr()
    assert (out, err) == ("x\n", "[shown]\n")


def _replace_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    alone = typer.Typer()
    alone.command()(fail)
    command = typer.main.get_command(alone)
    monkeypatch.setattr(cli, "load_command", lambda name: command)
