"""Lines that need depth: follow the arrows to their end.

    map bf da ee fe cd hh gh aa: c A b E g H f E d A

A pair is an arrow (`bf`: from b to f); the end of a chain points to itself (`aa`). A query asks
where a letter's chain ends, in capitals (`c A`: c to d, d to a). It is p-hop induction (Saunshi
et al., arXiv 2502.17416) with two changes that let a model of a million parameters learn it in
minutes: an arrow is one token, so that one look finds where it leads, and p is given by the table
and not by a number, so that every hop is the same step and a further one changes nothing. One
layer follows one arrow, so the loops that a query needs are its distance from the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from looptx_core.data.probes import Probe

LETTERS = "abcdefgh"
MAX_HOPS = 4
_TOWARDS_SHORT = 2.0  # exponent: short chains come more often, as the longer ones build on them


def hop_line(rng: np.random.Generator) -> tuple[str, dict[int, list[tuple[int, int]]]]:
    """One line, and by number of hops the character spans of its answers."""
    letters = list(rng.permutation(list(LETTERS)))
    target, end, hops = {}, {}, {}
    while letters:
        size = 2 + int(rng.random() ** _TOWARDS_SHORT * MAX_HOPS)
        chain, letters = letters[:size], letters[size:]
        for place, letter in enumerate(chain):
            target[letter] = chain[min(place + 1, len(chain) - 1)]
            end[letter], hops[letter] = chain[-1], len(chain) - 1 - place
    text = "map " + " ".join(key + target[key] for key in rng.permutation(list(LETTERS))) + ":"
    answers: dict[int, list[tuple[int, int]]] = {}
    for letter in rng.permutation(list(LETTERS)):
        if hops[letter]:
            text += f" {letter} {end[letter].upper()}"
            answers.setdefault(hops[letter], []).append((len(text) - 1, len(text)))
    return text, answers


def hop_lines(seed: int, count: int) -> Iterator[str]:
    """Training lines."""
    rng = np.random.default_rng((seed, 0))
    for _ in range(count):
        yield hop_line(rng)[0]


def hop_probes(seed: int, lines: int) -> Iterator[Probe]:
    """Held-out lines, a probe for each distance in a line; another stream than training's."""
    rng = np.random.default_rng((seed, 1))
    for _ in range(lines):
        text, answers = hop_line(rng)
        for hops, spans in sorted(answers.items()):
            yield Probe(f"{hops} hops", text, spans)
