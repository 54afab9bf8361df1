"""Commands of an installed looptx, each in a fork of one process that has imported everything.

`python forked_commands.py SITE` reads a JSON line for each command and answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
        """Run a command in a folder."""
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


def main(site: str) -> None:
    # For benchmarks alone: what is installed comes first.
    sys.path[:] = [site, *(path for path in sys.path if path != str(ROOT / "tests")), str(ROOT)]
    import looptx_core
    from benchmarks.reliability import forks

    assert Path(str(looptx_core.__file__)).is_relative_to(site)
    forks.prepare()
    for line in sys.stdin:
        request = json.loads(line)
        done = forks.run(
            request["arguments"],
            Path(request["where"]),
            seconds=600,
            most_bytes=8 << 30,
            environment=request["env"],
        )
        answer = {"code": done.code, "out": done.out, "err": done.err}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
