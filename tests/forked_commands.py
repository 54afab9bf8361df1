"""Commands in processes of their own, forked from one that has imported everything.

A fork starts in milliseconds where a new process would import for seconds. `start` runs this
repository's looptx. `Installed` runs an installed one: `python forked_commands.py SITE` reads a
JSON line for each command and answers with one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["lightning", "deepspeed", "looptx_core.training.run", "looptx_cli.train"]
)


class Started:
    """A function at work in a fork; in what follows it is like `subprocess.Popen`."""

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        where = str(cwd or Path.cwd())
        how = (function, arguments, self._folder.name, where, {**(env or {})}, own_session)
        self._process = FORKS.Process(target=_work, args=how)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative for a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"the process has not ended in {timeout} seconds")
        return code

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it wrote to standard output and standard error until its end."""
        self.wait(timeout)
        out, err = ((Path(self._folder.name) / name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return out, err


def _work(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    folder: str,
    where: str,
    env: dict[str, str],
    own_session: bool,
) -> None:
    # Its data loaders fork as those of any new process do; else each starts a fork server.
    multiprocessing.set_start_method(None, force=True)
    if own_session:
        os.setsid()
    os.environ.update(env)
    os.chdir(where)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    sys.exit(function(*arguments))


def start(arguments: list[str], **how: Any) -> Started:
    """`looptx ARGUMENTS`, for commands that train."""
    from looptx_cli.main import main

    return Started(main, arguments, **how)


def looptx(arguments: list[str], **how: Any) -> Done:
    """`looptx ARGUMENTS` to its end."""
    process = start(arguments, **how)
    out, err = process.communicate()
    return Done(process.wait(), out, err)


class Installed:
    """The looptx in a folder `site`, ready to run commands. It is no import of this repository."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(site)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=site,
        )

    def run(self, arguments: list[str], where: Path, env: dict[str, str]) -> Done:
        """Run a command, or a script where the first argument is one, in a folder."""
        assert self.process.stdin and self.process.stdout
        request = {"arguments": arguments, "where": str(where), "env": env}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


class Done:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.returncode, self.stdout, self.stderr = code, out, err


def _script(arguments: list[str]) -> int:
    sys.argv[:] = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


def main(site: str) -> None:
    # For benchmarks alone: what is installed comes first.
    sys.path[:] = [site, *(path for path in sys.path if path != str(ROOT / "tests")), str(ROOT)]
    import looptx_core
    from benchmarks.reliability import forks

    assert Path(str(looptx_core.__file__)).is_relative_to(site)
    forks.prepare()
    for line in sys.stdin:
        request = json.loads(line)
        arguments = request["arguments"]
        done = forks.run(
            arguments,
            Path(request["where"]),
            seconds=600,
            most_bytes=8 << 30,
            environment=request["env"],
            program=_script if arguments and arguments[0].endswith(".py") else None,
        )
        answer = {"code": done.code, "out": done.out, "err": done.err}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
