"""A machine that is not what was expected: clocks, streams, limits, signals, caches, homes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_commands import Started, start

import looptx_cli.main as cli
from looptx_cli.console import note, stdout
from looptx_cli.main import main
from looptx_core.documents import printable
from looptx_core.errors import remedy
from looptx_core.machine import kernels, scratch
from looptx_core.training import hardware

ROOT = str(Path(cli.__file__).parent.parent)
TINY = """
steps: 2000
batch_size: 4
seq_len: 32
val_batches: 1
model: {d_model: 32, n_heads: 2, n_kv_heads: 1, head_dim: 16, d_ff: 64, max_loops: 3,
  core_layers: 1, prelude_layers: 0, coda_layers: 0}
"""


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    own = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **env}
    looptx = f'looptx() {{ {sys.executable} -m looptx_cli.main "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", looptx + line], cwd=folder, env=own, capture_output=True, timeout=120
    )


def test_a_clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.time, "process_time", lambda: 1.0)
    hardware._ratio.cache_clear()
    assert 0 < hardware._ratio(16, 2) < 1e9
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: 1.0)
    hardware._ratio.cache_clear()
    assert hardware._ratio(16, 2) == 1
    hardware._ratio.cache_clear()
    assert hardware.choose_precision("auto", torch.device("cpu"))[0] in ("bf16", "float32")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device(tmp_path: Path, closed: str) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from " * 200)
    done = shell(f"looptx tokenize a.txt --vocab-size 272 --out d --quiet {closed}", tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["documents"] == 1


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (r"printf 'ab\\xff' | looptx generate --max-new-tokens 1", 4, "not UTF-8 at byte 2"),
        (r"looptx generate $'ab\\xff' --max-new-tokens 1", 2, r"argument ab\\udcff is not UTF-8"),
        (r"looptx tokenize $'ab\\xff'", 2, "is not UTF-8"),
        (r"looptx generate --model $'a\\x1b[31mb'", 4, r"a\\x1b[31mb"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, line: str, code: int, message: str) -> None:
    done = shell(line.replace("\\\\", "\\"), tmp_path)
    error = done.stderr.decode()
    assert done.returncode == code and message.replace("\\\\", "\\") in error
    assert "internal error" not in error and "\x1b" not in error


def test_nothing_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    note("a\x1b[2Jb\u202ec\udcffd[/x]")
    table = Table(title="[bold]t\x9b")
    table.add_column("c\x07")
    table.add_row("[/y] :smile: \x1b]0;x")
    stdout().print(table)
    stdout().print("run [bold]x[/z]")
    out, err = capsys.readouterr()
    assert err == "a\\x1b[2Jb\\u202ec\\udcffd[/x]\n"
    assert not set(out + err) & set("\x1b\x9b\x07\u202e")
    assert "[bold]t\\x9b" in out and "[/y] :smile: \\x1b]0;x" in out and "run [bold]x[/z]" in out
    assert printable("a\tb\nc\r", keep="\n\t") == "a\tb\nc\\r"
    assert printable("naïve 🐋 👩\u200d👧") == "naïve 🐋 👩\u200d👧"


def test_each_refusal_of_the_system_has_its_remedy() -> None:
    for number, words in [
        (errno.ENOSPC, "free some space"), (errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f"),
        (errno.ENOENT, "folder is gone"), (errno.EROFS, "may write"), (errno.ENOMEM, "memory"),
    ]:  # fmt: skip
        assert words in remedy(OSError(number, os.strerror(number)))
        code, line = cli._explain(OSError(number, os.strerror(number), "x"))
        assert code == 1 and "internal error" not in line
    assert "ulimit -n" in cli._explain(OSError(errno.EMFILE, "Too many open files"))[1]
    assert "no memory left" in cli._explain(MemoryError())[1]
    assert (
        "no memory" in cli._explain(RuntimeError("DefaultCPUAllocator: can't allocate memory"))[1]
    )


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from " * 9000)
    done = shell("ulimit -f 8; looptx tokenize a.txt --vocab-size 272 --out d", tmp_path)
    assert done.returncode == 1 and b"ulimit -f" in done.stderr
    assert not (tmp_path / "d").exists()


# Caches and temporary folders


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "one.cpp"
    file.write_text('extern "C" int one() { return 1; }')
    return file


def spoil_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def spoil_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


SPOILT = {
    "cut short": spoil_short,
    "a bit": spoil_bit,
    "empty": lambda path: path.write_bytes(b""),
    "writable by others": lambda path: path.chmod(0o777),
    "no digest": lambda path: path.with_suffix(".sha256").unlink(),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_kept_kernel_is_checked_and_built_again(source: Path, case: str) -> None:
    path = kernels.build(source)
    before = path.stat().st_ino
    assert kernels.build(source) == path and path.stat().st_ino == before
    assert not kernels.build_ahead(source)
    SPOILT[case](path)
    assert kernels.build(source) == path and path.stat().st_ino != before
    assert kernels._is_sound(path) and path.stat().st_mode & 0o077 == 0


def test_a_kernel_is_built_anew_where_a_header_beside_it_changed(source: Path) -> None:
    paths = [kernels.library_path(source)]
    for text in ("// one\n", "// two\n"):
        source.with_name("part.h").write_text(text)
        paths.append(kernels.library_path(source))
    assert len({*paths}) == 3


def test_a_cache_that_others_may_write_to_is_closed(source: Path) -> None:
    path = kernels.build(source)
    path.parent.chmod(0o777)
    assert kernels._is_sound(kernels.build(source)) and not path.parent.stat().st_mode & 0o022


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))

    def nobody(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(scratch.Path, "home", classmethod(nobody))
    cache = scratch.user_cache()
    assert cache.parent == tmp_path and cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(scratch.Path, "home", classmethod(lambda cls: tmp_path / "file" / "me"))
    (tmp_path / "file").write_text("")
    assert scratch.user_cache() == cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert scratch.user_cache() == tmp_path / "own" / "looptx"


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from looptx_core.machine.scratch import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as folder:\n"
        "    print(folder, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    (tmp_path / "looptx-of-somebody").mkdir()
    with scratch.scratch_folder(tmp_path) as own:
        assert left.exists() and own.exists(), "its process lives"
    process.kill()
    process.wait()
    assert left.exists() and not own.exists()
    with scratch.scratch_folder(tmp_path):
        assert not left.exists()
    assert (tmp_path / "looptx-of-somebody").exists(), "not ours to remove"


def test_sigterm_while_standard_input_is_copied(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "looptx_cli.main", "tokenize", "-"], stdin=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"some text " * 100_000)
    process.stdin.flush()
    while not list(tmp_path.glob("looptx-*")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 130
    assert list(tmp_path.glob("looptx-*")) == []


# Signals while training


def begin(tmp_path: Path, *more: str) -> tuple[Started, Path]:
    """A training in a process group of its own that has done some steps."""
    (tmp_path / "t.yaml").write_text(TINY)
    from looptx_core.data.corpus import bundled_text

    (tmp_path / "a.txt").write_text(bundled_text().read_text("utf-8")[20_000:140_000])
    run = tmp_path / "run"
    process = start(
        ["train", "--data", "a.txt", "--config", "t.yaml", "--out", "run", "--log-every", "1",
         "--precision", "float32", *more],
        cwd=tmp_path, own_session=True,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    for _ in range(600):
        assert process.poll() is None, process.communicate()[1]
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            return process, run
        time.sleep(0.1)
    raise AssertionError("the training did not begin")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_group_is_saved(tmp_path: Path, number: int) -> None:
    process, run = begin(tmp_path, "--workers", "1")
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped and saved at step" in err and "--resume run" in err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert list((run / "checkpoints").glob(f"step-{last:07d}.ckpt"))


def test_a_killed_worker_is_saved_and_the_run_goes_on(tmp_path: Path) -> None:
    process, run = begin(tmp_path, "--workers", "1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    own = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    loaders = [int(c) for c in children if Path(f"/proc/{c}/cmdline").read_bytes() == own]
    os.kill(loaders[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "was killed" in err and "--resume run" in err
    saved = [int(f.stem.removeprefix("step-")) for f in (run / "checkpoints").glob("step-*.ckpt")]
    assert f"saved at step {max(saved, default=0)} of 2000" in err


def test_a_bad_working_folder_is_no_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").mkdir()
    (tmp_path / "runs" / "x" / "config.yaml").write_text("a: 1")
    (tmp_path / "runs" / "x" / "final").mkdir()
    (tmp_path / "runs" / "x" / "final" / "config.json").write_text('{"a":' * 9999)
    assert main(["generate", "Call me", "--max-new-tokens", "1", "--kernel", "torch"]) == 0
    assert "left out: runs/x/final/config.json: not valid JSON" in capsys.readouterr().err
