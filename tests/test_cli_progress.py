"""The progress of training: what a narrow terminal keeps, and which rate is told."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from looptx_cli.progress import LiveProgress, RecentRate, fitting

NUMBERS = ["loss 3.783", "held-out 3.873", "loops 4.5", "confidence error 0.12"]


def shown(columns: int, steps: int = 2000) -> str:
    """The last line of a display on a terminal of so many columns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns, color_system=None)
    live = LiveProgress(steps, console)
    live.begin(0)
    for second in range(5):
        live.rate.add(123_456, float(second))
    live.show(steps // 2, NUMBERS)
    live.teardown()
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    return next(line for line in reversed(lines) if line.strip())


@pytest.mark.parametrize("columns", [48, 60, 80, 120])
def test_bar_steps_rate_and_time_stay_at_any_width(columns: int) -> None:
    line = shown(columns)
    assert "━" * 4 in line and "1000/2000" in line and "123,456 tokens/s" in line
    assert re.search(r"--:--|\d:\d\d", line)
    assert len(line.rstrip()) <= columns


def test_numbers_give_way_from_the_right() -> None:
    wide, usual = shown(140), shown(80)
    assert all(number in wide for number in NUMBERS)
    assert NUMBERS[0] in usual and NUMBERS[1] in usual
    assert NUMBERS[2] not in usual and "confid" not in usual and "…" not in usual


def test_fitting_cuts_nothing() -> None:
    assert fitting(["abc", "de"], 7) == "abc  de"
    assert fitting(["abc", "de"], 6) == "abc"
    assert fitting(["abc", "d"], 2) == ""


def test_the_rate_is_the_recent_one() -> None:
    rate = RecentRate(seconds=10)
    assert str(rate) == ""
    for second in range(100):  # slow at first
        rate.add(100, float(second))
    assert str(rate) == "100 tokens/s"
    for second in range(100, 111):
        rate.add(5000, float(second))
    assert str(rate) == "5,000 tokens/s"
    rate.pause()  # an evaluation of a minute
    rate.add(5000, 171.0)
    assert str(rate) == "5,000 tokens/s"
