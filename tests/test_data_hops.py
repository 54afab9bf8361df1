"""The bundled lines of hops, against their own tables."""

from __future__ import annotations

import pytest

from looptx_core.data.bundled import bundled_shards
from looptx_core.data.hops import MAX_HOPS, hop_lines, hop_probes
from looptx_core.data.shards import open_shards

pytestmark = pytest.mark.fast


def test_hop_lines_answer_what_their_table_says() -> None:
    """Every query, solved by walking the printed table; probes mark just the answers."""
    for probe in hop_probes(seed=3, lines=50):
        table, queries = probe.text.removeprefix("map ").split(": ")
        arrows = dict(pair for pair in table.split())
        steps = {}
        for letter, answer in zip(*[iter(queries.split())] * 2):
            place, hops = letter, 0
            while arrows[place] != place:
                place, hops = arrows[place], hops + 1
            assert answer == place.upper()
            steps.setdefault(hops, []).append(answer)
        asked = int(probe.group.split()[0])
        assert [probe.text[start:end] for start, end in probe.answers] == steps[asked]
        assert set(steps) <= set(range(1, MAX_HOPS + 1))
    assert not set(hop_lines(3, 100)) & {probe.text for probe in hop_probes(3, 100)}


def test_an_arrow_of_the_bundled_lines_is_one_token() -> None:
    tokenizer = open_shards(bundled_shards(2048)).tokenizer
    line = next(hop_lines(9, 1))
    pairs = line.removeprefix("map ").split(":")[0].split()
    assert all(len(tokenizer.encode(" " + pair).ids) == 1 for pair in pairs)
