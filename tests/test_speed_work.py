"""Guards against a slow-down that count work, not seconds: loops, read-outs, drafts, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backend_cases import WatchedBackend

import looptx_core
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.data.hops import hop_probes
from looptx_core.generation.engine import Engine
from looptx_core.model.cache import LoopCache

ASSETS = Path(looptx_core.__file__).parent / "assets"
GREEDY = GenerationOptions(temperature=0, max_new_tokens=24, ignore_eos=True)
MOBY = (ASSETS / "moby-dick.txt").read_text("utf-8")
TEXTS = [MOBY[place : place + 120] for place in (300_000, 600_000, 900_000)]


class Counted:
    """An engine whose passes of the core are counted, whatever number of rows they have."""

    def __init__(self, batch_size: int = 32) -> None:
        loaded = load_model(ASSETS / "model")
        self.engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, batch_size=batch_size)
        self.passes = self.turns = 0  # a turn has one position of each row
        self.engine.backend = WatchedBackend(self.engine.backend, self._count)

    def _count(self, loops: Sequence[int], count: int, positions: int) -> None:
        self.passes += count
        self.turns += count * (positions == 1)

    @property
    def work(self):
        return self.engine.counters


def lines(count: int) -> list[str]:
    return [probe.text.split(":")[0] + ":" for probe in hop_probes(7, count)][:count]


def test_a_token_costs_its_own_loops_and_one_readout() -> None:
    counted = Counted()
    prompts = [*TEXTS, *lines(3)]
    found = counted.engine.complete(prompts, GREEDY)
    later = [step for one in found for step in one.tokens[1:]]
    work = counted.work
    assert work.loops == sum(step.loops for step in later) < 0.6 * 10 * len(later)
    assert work.embedded == work.readouts == len(later)
    assert work.exit_checks <= work.loops
    assert work.prompt == sum(one.prompt_tokens for one in found)


def test_the_core_works_on_full_batches() -> None:
    """Twelve requests on four rows: hardly a pass of the core has an empty place."""
    counted = Counted(batch_size=4)
    prompts = [TEXTS[n % 3] if n % 2 else line for n, line in enumerate(lines(12))]
    options = [replace(GREEDY, max_new_tokens=8 + 2 * (n % 5)) for n in range(12)]
    found = counted.engine.complete(prompts, options)
    # A static batch of four at full depth: ten passes for each token of its longest request.
    longest = sum(max(o.max_new_tokens for o in options[i : i + 4]) - 1 for i in (0, 4, 8))
    assert counted.turns < 10 * longest / 1.5
    assert counted.work.loops > 0.8 * 4 * counted.turns
    assert counted.work.embedded == sum(len(one.tokens) - 1 for one in found)


def test_drafts_save_passes_of_the_core() -> None:
    plain, counted = Counted(), Counted()
    deep = replace(GREEDY, loops=10, max_new_tokens=40)
    one = [plain.engine.complete([text], deep)[0] for text in TEXTS]
    drafted = replace(deep, speculate=3, draft_loops=2)
    other = [counted.engine.complete([text], drafted)[0] for text in TEXTS]
    assert [s.id for f in one for s in f.tokens] == [s.id for f in other for s in f.tokens]
    assert plain.passes > 1.5 * counted.passes
    work = counted.work
    assert work.loops == 10 * work.embedded < 1.4 * plain.work.loops  # what was drafted in vain
    assert work.accepted > 0.7 * work.drafted


@pytest.mark.parametrize(
    ("loops", "policy", "kind", "dtype", "size"),
    [
        # Slots (2 + 4 x loops or 4 + 2), keys and values, 4 heads, bytes of an entry of 64.
        (10, "fill", "float", torch.float32, 44 * 2 * 4 * 256),
        (10, "last", "float", torch.float32, 8 * 2 * 4 * 256),
        (10, "last", "float", torch.bfloat16, 8 * 2 * 4 * 128),
        (10, "last", "int8", torch.float32, 8 * 2 * 4 * 66),
        (10, "last", "int4", torch.bfloat16, 8 * 2 * 4 * 34),
        (2, "fill", "int8", torch.float32, 12 * 2 * 4 * 66),
    ],
)
def test_bytes_of_the_cache(loops, policy, kind, dtype, size) -> None:
    config = ModelConfig(**get_preset("small")["model"])
    cache = LoopCache(config, 1, 16, loops, policy=policy, kind=kind, dtype=dtype)
    assert cache.bytes_per_token == size
    assert 32768 * size < 4e9


def test_a_rounded_last_loop_keeps_the_quality() -> None:
    """A quarter of the bytes of the best policy without rounding, its loss within 1 %."""
    engine = Counted().engine
    ids = torch.tensor([engine.tokenizer.encode(text).ids[:30] for text in TEXTS])
    rows = {
        (policy, kind): engine.score_forced(
            ids, 8, GenerationOptions(loops=10, kv_policy=policy, kv_type=kind)
        )
        for policy, kind in (("fill", "float"), ("last", "float"), ("last", "int8"))
    }
    exact = rows["fill", "float"].loss.mean()
    for row in rows.values():
        assert abs(row.loss.mean() - exact) < 0.01 * exact
    ratio = rows["last", "float"].bytes_per_token / rows["last", "int8"].bytes_per_token
    assert ratio == 128 / 34  # heads of 32 here
