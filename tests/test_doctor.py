"""What is here, and builds: locks of the living and the dead, broken packages, disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from looptx_core.errors import LooptxError, MissingError
from looptx_core.machine.compiler import compiler, libaio_obstacle, try_to_build
from looptx_core.machine.disk import disk_speed
from looptx_core.machine.facts import filesystem, is_memory, is_shared, this_machine
from looptx_core.parallel.deepspeed import ops
from looptx_core.parallel.deepspeed.ops import build_op, inspect_op, remove_stale_lock

# torch's own builder, with a file so small that ninja is done in a second.
BUILD = """
import sys
from torch.utils.cpp_extension import load
load(name=sys.argv[1], sources=[{source!r}], is_python_module=False, verbose=True)
"""
HOLD = (
    "import os, time; os.open({lock!r}, os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
)

HANG = """
import os, time
lock = {lock!r}
os.open(lock, os.O_CREAT | os.O_EXCL)
try:
    print("[1/2] c++", flush=True)
    time.sleep(60)
finally:
    os.remove(lock)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of extensions of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache/cpu_adam").mkdir(parents=True)
    return tmp_path / "cache"


def test_a_lock_without_a_process_is_removed(cache: Path) -> None:
    lock = cache / "cpu_adam/lock"
    assert inspect_op("cpu_adam").state == "not built"
    assert remove_stale_lock("cpu_adam") is None
    lock.touch()
    assert inspect_op("cpu_adam").state == "stale lock"
    line = remove_stale_lock("cpu_adam")
    assert line is not None and str(lock) in line and not lock.exists()


def test_a_lock_of_a_live_build_stays_until_it_is_killed(cache: Path) -> None:
    lock = cache / "cpu_adam/lock"
    builder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock=str(lock))], stdout=subprocess.PIPE
    )
    try:
        assert builder.stdout is not None
        builder.stdout.readline()
        assert inspect_op("cpu_adam").state == "being built"
        assert ops.lock_holders(cache / "cpu_adam") == [builder.pid]
        assert remove_stale_lock("cpu_adam") is None and lock.exists()
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    assert inspect_op("cpu_adam").state == "stale lock"
    assert remove_stale_lock("cpu_adam") and not lock.exists()


def test_ninja_at_work_keeps_a_lock_when_its_parent_is_dead(cache: Path) -> None:
    (cache / "cpu_adam/lock").touch()
    worker = subprocess.Popen(["sleep", "60"], cwd=cache / "cpu_adam")
    try:
        assert ops.lock_holders(cache / "cpu_adam") == [worker.pid]
        assert remove_stale_lock("cpu_adam") is None
    finally:
        worker.kill()
        worker.wait()


def test_a_lock_on_a_network_is_named_and_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "cpu_adam/lock").touch()
    monkeypatch.setattr(ops, "filesystem", lambda path: "nfs4")
    line = remove_stale_lock("cpu_adam")
    assert line is not None and "delete it" in line and (cache / "cpu_adam/lock").exists()


def test_building_reports_and_frees_a_stale_lock(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(ops, "_BUILD", BUILD.format(source=str(source)))
    (cache / "cpu_adam/lock").touch()
    lines: list[str] = []
    seconds = build_op("cpu_adam", lines.append, every=0.5)
    assert 0 < seconds < 120
    assert "removed" in lines[0] and "ready after" in lines[-1]
    assert any("steps done" in line for line in lines[1:-1]), lines
    assert (cache / "cpu_adam/cpu_adam.so").is_file()
    assert inspect_op("cpu_adam").state == "built"
    os.utime(cache / "cpu_adam/cpu_adam.so", (0, 0))
    assert inspect_op("cpu_adam").state == "out of date"


def test_an_interrupt_ends_the_build_and_its_lock(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_BUILD", HANG.format(lock=str(cache / "cpu_adam/lock")))

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_op("cpu_adam", interrupt, every=0.5)
    assert ops.lock_holders(cache / "cpu_adam") == []
    assert not (cache / "cpu_adam/lock").exists()


def test_one_ninja_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    ops.prefer_own_ninja()
    ops.prefer_own_ninja()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"


def test_a_build_that_fails_tells_the_compilers_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int answer( { return 42; }\n")
    monkeypatch.setattr(ops, "_BUILD", BUILD.format(source=str(source)))
    with pytest.raises(LooptxError, match=r"cpu_adam was not built.*error"):
        build_op("cpu_adam")
    assert not (cache / "cpu_adam/lock").exists()


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler().obstacle is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in (compiler().obstacle or "")
    assert "no c++" in (libaio_obstacle() or "")
    with pytest.raises(MissingError, match="install g\\+\\+") as caught:
        build_op("cpu_adam")
    assert caught.value.exit_code == 3


def test_trying_to_build_names_the_error() -> None:
    assert try_to_build("int main() { return 0; }") is None
    assert "error" in (try_to_build("int main( { return 0; }") or "")
    assert try_to_build("int main() { return 0; }", "-lno_such_library") is not None


def test_the_disk_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    speed = disk_speed(tmp_path, size=4 << 20)
    assert speed.read > 1e5 and speed.write > 1e5 and 0 < speed.bytes <= 4 << 20
    assert not list(tmp_path.iterdir())


def test_file_systems() -> None:
    assert is_memory("tmpfs") and not is_memory("ext4")
    assert is_shared("nfs4") and is_shared("fuse.sshfs") and not is_shared("xfs")
    assert filesystem("/proc/self") == "proc"
    here = this_machine("no/such/folder/yet")
    assert here.ram > 1 << 28 and here.disk > 0 and here.disk_path == str(Path.cwd())


def test_the_report_survives_a_package_that_crashes(tmp_path: Path) -> None:
    broken = tmp_path / "broken/bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    cache = tmp_path / "cache"
    for name in ("cpu_adam", "async_io"):
        (cache / name).mkdir(parents=True)
    (cache / "cpu_adam/lock").touch()
    done = subprocess.run(
        [sys.executable, "-m", "looptx_cli.main", "doctor", "--json"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "removed" in done.stderr and not (cache / "cpu_adam/lock").exists()
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["bitsandbytes"]["state"] == "broken"
    assert "signal 11" in checks["bitsandbytes"]["detail"]
    assert checks["torch"]["state"] == "ok" and checks["deepspeed"]["state"] == "ok"
    uses = {use["feature"]: use for use in found["uses"]}
    assert (
        not uses["finetune --qlora"]["ready"] and "bitsandbytes" in uses["finetune --qlora"]["why"]
    )
    assert uses["--zero3"]["ready"]
    assert {op["name"]: op["state"] for op in found["ops"]}["async_io"] == "not built"
    assert found["machine"]["ram"] > 0
