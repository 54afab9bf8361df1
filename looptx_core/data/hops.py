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

import re
from collections.abc import Iterator

import numpy as np

from looptx_core.data.probes import Probe

LETTERS = "abcdefgh"
MAX_HOPS = 4
_TOWARDS_SHORT = 2.0  # exponent: short chains come more often, as the longer ones build on them


def _table(rng: np.random.Generator) -> tuple[str, dict[str, list[str]]]:
    """A table of arrows, and from each letter the path to its end."""
    letters = [str(letter) for letter in rng.permutation(list(LETTERS))]
    paths = {}
    while letters:
        size = 2 + int(rng.random() ** _TOWARDS_SHORT * MAX_HOPS)
        chain, letters = letters[:size], letters[size:]
        for place, letter in enumerate(chain):
            paths[letter] = chain[place:]
    arrows = [key + paths[key][:2][-1] for key in rng.permutation(list(LETTERS))]
    return "map " + " ".join(arrows) + ":", paths


def hop_line(rng: np.random.Generator) -> tuple[str, dict[int, list[tuple[int, int]]]]:
    """One line, and by number of hops the character spans of its answers."""
    text, paths = _table(rng)
    answers: dict[int, list[tuple[int, int]]] = {}
    for letter in rng.permutation(list(LETTERS)):
        if hops := len(paths[letter]) - 1:
            text += f" {letter} {paths[letter][-1].upper()}"
            answers.setdefault(hops, []).append((len(text) - 1, len(text)))
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
            yield Probe(f"{hops} hop{'s' * (hops > 1)}", text, spans)


def hop_questions(seed: int, count: int, stream: int = 2) -> Iterator[dict[str, str]]:
    """Questions in words on such tables, for finetuning: a prompt and a response each.

    The end of a letter's chain, in capitals as in the lines; the letter it points to; or the path
    from it to its end. Another `stream` holds other questions.
    """
    rng = np.random.default_rng((seed, stream))
    for _ in range(count):
        table, paths = _table(rng)
        letter = str(rng.choice([letter for letter in LETTERS if len(paths[letter]) > 1]))
        path = paths[letter]
        question, answer = [
            (f"Where ends {letter}", path[-1].upper()),
            (f"What follows {letter}", path[1]),
            (f"The way from {letter}", " ".join(path[1:])),
        ][int(rng.integers(3))]
        yield {"prompt": f"{table} {question}", "response": f" {answer}"}


def check_answers(prompt: str, continuation: str) -> tuple[int, int] | None:
    """(right answers, answers) that a continuation gives to a prompt that begins with a table.

    None where the prompt has no table, or the continuation no answer.
    """
    table = re.match(r"\s*map ((?:[a-z]{2} )*[a-z]{2}):", prompt)
    if not table:
        return None
    arrows = {arrow[0]: arrow[1] for arrow in table[1].split()}

    def end(letter: str) -> str:
        for _ in arrows:  # so many steps are enough, and a cycle has no end
            letter = arrows.get(letter, "")
        return letter if arrows.get(letter) == letter else ""

    text = prompt + continuation
    given = [
        (answer[1], answer[2])
        for answer in re.finditer(r" ([a-z]) ([A-Z])\b", text[table.end() :])
        if table.end() + answer.end() > len(prompt)
    ]
    right = sum(end(letter).upper() == answer for letter, answer in given)
    return (right, len(given)) if given else None
