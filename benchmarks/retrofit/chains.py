"""Chains in plain English: who is whose boss, asked over several steps at once.

    Ann's boss is Bob. Tom's boss is Ann. Bob's boss is Tom.
    Tom's boss's boss is            ->  Bob

The people stand in one ring, so that every question of up to `people` - 1 hops has another answer,
and no name can be left out by its place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

NAMES = """
    Ann Bob Eve Tom Sam Kim Max Joe Dan Amy Leo Mia Ian Roy Lily Jack Emma Paul Anna Mark Lisa John
    Mary Luke Rose Adam Jane Peter Alice David Sarah James Helen Frank Laura Henry Julia Simon Grace
    Oscar Clara Felix Brian Diana Kevin Alan Ruth Carl Ella Hugo Iris Owen Vera
""".split()  # noqa: SIM905


def chain(rng: random.Random, people: int, hops: int) -> dict[str, str]:
    """A prompt with its facts shuffled, and the response."""
    ring = rng.sample(NAMES, people)
    facts = [f"{one}'s boss is {ring[(place + 1) % people]}." for place, one in enumerate(ring)]
    rng.shuffle(facts)
    first = rng.randrange(people)
    question = ring[first] + "'s boss" * hops + " is"
    return {
        "prompt": "\n" + " ".join(facts) + "\n" + question,
        "response": f" {ring[(first + hops) % people]}",
    }


def chains(seed: int, count: int, people: int, hops: Sequence[int]) -> Iterator[dict[str, str]]:
    """So many of these, their hops drawn evenly."""
    rng = random.Random(seed)
    for _ in range(count):
        yield chain(rng, people, rng.choice(hops))
