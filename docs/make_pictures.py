"""Make the pictures of README.md and of these pages from what the bundled model really does.

    python docs/make_pictures.py        about two minutes

`terminal.svg` is the coloured output of a command; `loops.svg` shows the accuracy by loop and the
stored exit, from the `report.json` that `looptx inspect-loops` writes.
"""

from __future__ import annotations

import io
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.text import Text

from looptx_core.checkpoint.registry import bundled_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURES = Path(__file__).parent / "pictures"
COMMAND = (
    'looptx generate "map bf da ee fe cd hh gh aa:" --exit gain --temperature 0 --show-iterations'
)
COLUMNS = 96

# Rich's own format with fonts of the machine in place of one from the network.
_SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def terminal(command: str, target: Path) -> None:
    """Write a command and what it prints on a terminal, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ {command}", style="bold"), soft_wrap=False)
    console.print(Text.from_ansi(_on_terminal(command)))
    target.write_text(console.export_svg(title="looptx", code_format=_SVG, unique_id="looptx"))


def _on_terminal(command: str) -> str:
    """What a command prints on a terminal of `COLUMNS` columns, escape codes included."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }
    environment.pop("NO_COLOR", None)
    arguments = [sys.executable, "-m", "looptx_cli.main", *shlex.split(command)[1:]]
    printed = b""
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            arguments, cwd=empty, env=environment, stdout=theirs, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        try:
            while part := os.read(ours, 65536):
                printed += part
        except OSError:  # Linux reports the end of a terminal's last process by this error
            pass
        os.close(ours)
        if process.wait():
            raise RuntimeError(f"{command} failed")
    return printed.decode().replace("\r\n", "\n").rstrip("\n")


def loops(target: Path) -> None:
    """Draw the accuracy on lines that need depth, by loop, and where the stored exit stops."""
    report = _report()
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    colours = plt.get_cmap("viridis")([0.85, 0.6, 0.35, 0.1])
    for task, colour in zip(report["tasks"], colours):
        accuracy = [100 * value for value in task["accuracy_by_loop"]]
        hops = task["name"].removesuffix(" hops")
        label = f"{hops} arrow{'s' if hops != '1' else ''} to follow"
        axes.plot(range(1, len(accuracy) + 1), accuracy, color=colour, lw=2, label=label)
        axes.plot(task["mean_loops"], 100 * task["accuracy"], "*", color=colour, ms=15, mec="white")
    axes.plot([], [], "*", color="grey", ms=12, ls="none", label="the exit: mean loops")
    axes.set(xlabel="loops", ylabel="answers that are right, %", ylim=(40, 104), xlim=(0.8, 10.2))
    axes.set_xticks(range(1, 11))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def _report() -> dict[str, object]:
    """The report on a copy of the bundled model, as `--target-loss-increase` stores an exit."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(bundled_model(), f"{scratch}/model")
        subprocess.run(
            [sys.executable, "-m", "looptx_cli.main", "inspect-loops", "--model", "model"]
            + ["--target-loss-increase", "0.5%", "--decode-tokens", "0", "--out", "report"],
            cwd=scratch,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(Path(scratch, "report", "report.json").read_text("utf-8"))


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "looptx"
    terminal(COMMAND, PICTURES / "terminal.svg")
    loops(PICTURES / "loops.svg")
