"""Makes the lines of looptx's own tasks: `python -m looptx_core.evaluation.generators FOLDER`.

Each kind of line has a seed of its own, which no training line shares. A test makes the lines again
and compares them with those that ship.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looptx_core.data.bundled import bundled_corpus
from looptx_core.data.hops import hop_probes
from looptx_core.data.p_hop import p_hop
from looptx_core.data.probes import Probe
from looptx_core.data.split import held_out_by_hash
from looptx_core.documents import read_json_lines

_SEED = 2027
_VAL_FRACTION, _SPLIT_SEED = 0.05, 0  # of `looptx train` on the bundled text


def hops() -> Iterator[dict[str, Any]]:
    """Lines that need depth, as the bundled model learned them; a line's distances side by side."""
    yield from (asdict(probe) for probe in hop_probes(_SEED, 80))


def p_hops() -> Iterator[dict[str, Any]]:
    """p-hop induction in letters: the symbol that p jumps back lead to."""
    rng = np.random.default_rng((_SEED, 1))
    while True:
        hops, values = int(rng.integers(1, 5)), rng.integers(0, 4, 16)
        answer = int(p_hop(torch.from_numpy(values)[None], torch.tensor([hops]))[0, -1])
        if answer < 0:
            continue
        letters = " ".join("abcd"[value] for value in values)
        text = f"hop {hops}: {letters} = {'abcd'[answer]}"
        yield asdict(Probe(f"{hops} hop{'s' * (hops > 1)}", text, [(len(text) - 1, len(text))]))


def arithmetic() -> Iterator[dict[str, Any]]:
    """Sums and differences of two numbers below 100, after three examples."""
    rng = np.random.default_rng((_SEED, 2))

    def sum_of() -> tuple[str, str]:
        left, right = (int(value) for value in rng.integers(0, 100, 2))
        plus = bool(rng.integers(2))
        return f"{left} {'+' if plus else '-'} {right} =", str(
            left + right if plus else left - right
        )

    while True:
        shots = "".join(f"{question} {answer}\n" for question, answer in (sum_of() for _ in "abc"))
        question, answer = sum_of()
        yield {"question": shots + question, "answer": answer}


def text() -> Iterator[dict[str, Any]]:
    """Passages of the chapters that training on the bundled text holds out."""
    yield from ({"text": passage} for passage in _passages(600))


def continuation() -> Iterator[dict[str, Any]]:
    """The next words of a held-out passage, among those of three others."""
    rng = np.random.default_rng((_SEED, 3))
    words = [passage.split() for passage in _passages(300)]
    words = [passage for passage in words if len(passage) >= 34]
    for place, passage in enumerate(words):
        others = rng.choice([i for i in range(len(words)) if i != place], 3, replace=False)
        ends = [" ".join(words[int(i)][24:32]) for i in others]
        gold = int(rng.integers(4))
        choices = ends[:gold] + [" ".join(passage[24:32])] + ends[gold:]
        yield {"context": " ".join(passage[:24]), "choices": choices, "gold": gold}


def _passages(size: int) -> list[str]:
    """Held-out chapters in pieces of about so many characters, cut between paragraphs' lines."""
    pieces = []
    documents = [value["text"] for _, value in read_json_lines(bundled_corpus())]
    for number, document in enumerate(documents):
        if document.startswith("map ") or not held_out_by_hash(_SPLIT_SEED, number, _VAL_FRACTION):
            continue
        body = re.sub(r"\s*\n\s*", " ", document)
        pieces += [body[at : at + size] for at in range(0, len(body) - size, size)]
    return pieces


LINES: dict[str, tuple[Callable[[], Iterator[dict[str, Any]]], int]] = {
    "hops": (hops, 400),
    "p_hop": (p_hops, 120),
    "arithmetic": (arithmetic, 60),
    "text": (text, 60),
    "continuation": (continuation, 120),
}
"""By the name of the file: what makes its lines, and the most of them."""


def lines_of(name: str) -> str:
    """A task's JSON lines."""
    make, most = LINES[name]
    return "".join(json.dumps(line) + "\n" for line, _ in zip(make(), range(most)))


if __name__ == "__main__":
    for _name in LINES:
        (Path(sys.argv[1]) / f"{_name}.jsonl").write_text(lines_of(_name), "utf-8")
