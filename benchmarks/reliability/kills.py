"""A training killed by SIGKILL at random moments and resumed: is it the training that was not?

    python -m benchmarks.reliability.kills [--kills 100] [--workers 0 2] [--record]

Weights and metrics (the clock's figures aside) must equal an uninterrupted run's bit for bit. Of
what lay there before, a finished run that is to be replaced and checkpoints, nothing may be lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability import forks, sound

SETTINGS: dict[str, Any] = {
    **sound.SETTINGS, "steps": 30, "save_every": 4, "val_every": 10, "keep": 3,
    "model": {**sound.SETTINGS["model"], "dropout": 0.1},
}  # fmt: skip
CLOCK = ("tokens_per_second",)


class Trainings:
    """One training, whole or broken off, in a scratch folder."""

    def __init__(self, scratch: Path, workers: int, **settings: Any) -> None:
        self.scratch, self.workers = scratch, workers
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ.update(LOOPTX_CACHE=str(scratch / "cache"), LOOPTX_KERNELS="all")
        (scratch / "train.yaml").write_text(
            json.dumps({**SETTINGS, "workers": workers, **settings})
        )
        if not (scratch / "shards").exists():
            from looptx_core.data.corpus import bundled_text

            (scratch / "text.txt").write_text(bundled_text().read_text("utf-8")[30_000:70_000])
            self.command("tokenize text.txt --vocab-size 400 --out shards")

    def command(self, line: str, **how: Any) -> forks.Outcome:
        how = {"seconds": 120, "most_bytes": 4 << 30} | how
        return forks.run(line.split(), self.scratch, **how)

    def start(self, out: str, **how: Any) -> forks.Outcome:
        line = f"train --config train.yaml --data shards --quiet --overwrite --out {out}"
        return self.command(line, **how)

    def finish(self, out: str) -> forks.Outcome:
        """Resume a run that was broken off, or start it where it had not begun."""
        new = self.scratch / f"{out}.new"
        at = new if (new / "config.yaml").is_file() else self.scratch / out
        if not (at / "config.yaml").is_file():
            shutil.rmtree(new, ignore_errors=True)
            return self.start(out)
        return self.command(f"train --resume {at.name} --quiet")


def result(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """A run's final weights and its metrics without the clock's figures."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    records = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return (run / "final/model.safetensors").read_bytes(), records


def broken_off(trainings: Trainings, name: str, before: bytes | None) -> str:
    """What a kill lost of what was there, in words; '' for nothing. before: the weights of a
    finished run that was to be replaced."""
    from looptx_core.training.callbacks import processes_of

    run = trainings.scratch / name
    if before is not None:
        # Between two renames the old one lies beside its place, and the next start puts it back.
        places = [run, *run.parent.glob(f".{name}.*.old")]
        if not any((place / "final/model.safetensors").is_file() for place in places):
            return "the finished run that was to be replaced"
    for checkpoint in run.parent.glob(f"{name}*/checkpoints/step-*.ckpt"):
        try:
            processes_of(checkpoint)
        except Exception as error:
            return f"a checkpoint: {error}"
    return ""


def one_kill(trainings: Trainings, whole: tuple[bytes, Any], moment: float, replacing: bool) -> str:
    """What went wrong, in words; '' where the resumed run equals the whole one."""
    run = trainings.scratch / "killed"
    for left in [run, *run.parent.glob("killed.new"), *run.parent.glob(".killed.*")]:
        shutil.rmtree(left, ignore_errors=True)
    before = None
    if replacing:
        shutil.copytree(trainings.scratch / "whole", run)
        before = whole[0]
    trainings.start("killed", kill_after=moment)
    if lost := broken_off(trainings, "killed", before):
        return f"lost {lost}"
    done = trainings.finish("killed")
    if done.code:
        return f"exit code {done.code}: {done.err.strip().splitlines()[-1:]}"
    weights, metrics = result(run)
    if weights != whole[0]:
        return "other weights"
    return "" if metrics == whole[1] else "other metrics"


def kills(scratch: Path, workers: int, count: int, seed: int) -> dict[str, Any]:
    """A row of the record."""
    trainings = Trainings(scratch / f"workers-{workers}", workers)
    shutil.rmtree(trainings.scratch / "whole", ignore_errors=True)
    trainings.start("whole")  # also warms the caches
    began = time.monotonic()
    shutil.rmtree(trainings.scratch / "whole")
    done = trainings.start("whole")
    span = time.monotonic() - began
    if done.code:
        raise RuntimeError(done.err)
    whole = result(trainings.scratch / "whole")
    rng, equal, wrong = random.Random(seed), 0, []
    for number in range(count):
        moment = rng.uniform(0.05, 1.05) * span
        said = one_kill(trainings, whole, moment, replacing=number % 2 == 1)
        equal += not said
        if said:
            wrong.append(said)
            print(f"kill {number} at {moment:.2f} s of {span:.2f}: {said}", flush=True)
    return {"part": "kills", "workers": workers, "kills": count, "equal": equal,
            "seconds_of_a_run": round(span, 1), "wrong": sorted(set(wrong))}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write a record of the run")
    flags = parser.parse_args()
    forks.prepare()
    rows = []
    with tempfile.TemporaryDirectory(prefix="looptx-kills-") as scratch:
        for workers in flags.workers:
            rows.append(kills(Path(scratch), workers, flags.kills, flags.seed))
            print(json.dumps(rows[-1]), flush=True)
    if flags.record:
        from benchmarks.common.record import write

        settings = {"seed": flags.seed, "steps": SETTINGS["steps"]}
        write("reliability.kills", __doc__.splitlines()[0], rows, settings=settings)
    return 1 if any(row["equal"] < row["kills"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
