"""From the command to its first word, as a user waits for it: whole processes, one after another.

    python -m benchmarks.start_time.run [--rounds 5]

`generate` is the bundled model's first token; `compiling` is the same where the decoding kernel was
never built, once a machine. The files were read before, as after a first run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common.record import write

GENERATE = ["generate", "Call me", "--max-new-tokens", "1", "--quiet"]


def seconds(arguments: list[str], cache: str | None = None) -> float:
    environment = {**os.environ, **({"XDG_CACHE_HOME": cache} if cache else {})}
    command = [str(Path(sys.executable).with_name("looptx")), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    times: dict[str, list[float]] = {"--help": [], "generate": [], "generate, compiling": []}
    for number in range(flags.rounds + 1):
        with tempfile.TemporaryDirectory() as empty:
            found = seconds(["--help"]), seconds(GENERATE), seconds(GENERATE, empty)
        if number:  # the first round warms up
            for name, each in zip(times, found):
                times[name].append(each)
    rows = [{"looptx": name, "seconds": statistics.median(each), "rounds": each}
            for name, each in times.items()]  # fmt: skip
    write("start_time.run", __doc__.splitlines()[0], rows)


if __name__ == "__main__":
    main()
