"""Processor time of both sides, in alternation: one process a side, warm, one at work at a time."""

from __future__ import annotations

import statistics
from typing import Any

from records import GREEDY, HOPS, PROSE, TRAIN, tokenized
from side import Server, Side

WORK: dict[str, tuple[str, ...]] = {
    "decode, early exit": ("generate", HOPS, "--ignore-eos", *GREEDY, "1500"),
    "decode, full depth": ("generate", PROSE, "--loops", "10", "--ignore-eos", *GREEDY, "1000"),
    "decode, torch": ("generate", PROSE, "--kernel", "torch", "--ignore-eos", *GREEDY, "200"),
    "batch": ("generate", "--prompts-file", "prompts.txt", "--ignore-eos", *GREEDY, "400"),
    "train": (*TRAIN, "--steps", "40", "--out", "timed", "--overwrite"),
}


def compare_speed(old: Side, new: Side, rounds: int) -> list[dict[str, Any]]:
    """For each kind of work the ratio of times, new to old: its median and an interval.

    The interval is between the second smallest and the second largest of the rounds; of ten, it
    holds the true median with a probability of 97.9 % (order statistics).
    """
    rows: list[dict[str, Any]] = []
    print("processor time, new / old: median (interval), medians of seconds")
    for side in (old, new):
        tokenized(side)
    with Server(old) as base, Server(new) as head:
        for name, arguments in WORK.items():
            times: dict[Server, list[float]] = {base: [], head: []}
            for number in range(rounds + 1):
                # Whoever goes second may find a warmer or a slower machine: take turns.
                for server in (base, head) if number % 2 else (head, base):
                    model = ("--model", str(server.side.tree / "looptx_core/assets/model"))
                    own = () if name == "train" else model
                    _, seconds = server.run(*arguments, *own)
                    if number:  # the first round warms up
                        times[server].append(seconds)
            ratios = sorted(n / o for o, n in zip(times[base], times[head]))
            trim = 1 if rounds > 4 else 0
            row = {
                "work": name, "ratio": statistics.median(ratios),
                "interval": [ratios[trim], ratios[-1 - trim]],
                "base_seconds": statistics.median(times[base]),
                "head_seconds": statistics.median(times[head]),
            }  # fmt: skip
            rows.append(row)
            low, high = row["interval"]
            seconds = f"{row['base_seconds']:.2f} s -> {row['head_seconds']:.2f} s"
            print(f"{name:<20} {row['ratio']:.3f} ({low:.3f} to {high:.3f}), {seconds}", flush=True)
    return rows
