"""Chains in plain English: who is whose boss, asked over several steps at once.

    Ann's boss is Bob. Tom's boss is Ann. Bob's boss is Tom.
    Who is Tom's boss's boss?          ->  Bob
    Who is Bob's boss?                 ->  Tom

The people stand in one ring, so that every question of up to `people` - 1 hops has another answer,
and no name can be left out by its place. A chat asks about several people, each once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

# One token each for SmolLM2, with a space before and without.
NAMES = """
    Ann Bob Tom Sam Kim Max Dan Jack Paul Anna Mark John Mary Luke Rose Adam Jane Peter Alice David
    Sarah James Frank Henry Simon Carl
""".split()  # noqa: SIM905


def chat(rng: random.Random, people: int, hops: Sequence[int]) -> list[dict[str, str]]:
    """Messages: shuffled facts, and a question of so many hops each, with its answer."""
    ring = rng.sample(NAMES, people)
    facts = [f"{one}'s boss is {ring[(place + 1) % people]}." for place, one in enumerate(ring)]
    rng.shuffle(facts)
    messages = []
    for first, far in zip(rng.sample(range(people), len(hops)), hops, strict=True):
        question = f"Who is {ring[first]}" + "'s boss" * far + "?"
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": ring[(first + far) % people]},
        ]
    messages[0]["content"] = " ".join(facts) + "\n" + messages[0]["content"]
    return messages


def chats(
    seed: int, count: int, people: int, hops: Sequence[int], questions: int
) -> Iterator[dict[str, Any]]:
    """So many records of chats, each question's hops drawn evenly."""
    rng = random.Random(seed)
    for _ in range(count):
        yield {"messages": chat(rng, people, rng.choices(hops, k=questions))}
