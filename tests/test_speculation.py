"""Drafts by shallow loops: the same tokens as plain decoding, by less work at full depth."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_generation import CONFIG, GREEDY, PROMPTS, SETTINGS, facts

from looptx_core.config.generation import GenerationOptions
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.generation.speculative import settle
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.resolve import draft_loops
from looptx_core.stopping.rule import fixed_exit


@pytest.fixture(scope="module")
def tokenizer():
    text = "Call me Ishmael. Some years ago, never mind how long precisely.\n" * 4
    return train_tokenizer([text], 280)


@pytest.fixture(scope="module")
def model():
    """Its loops change little after the first ones, so that some drafts stand and some fall."""
    torch.manual_seed(0)
    model = LoopedTransformer(CONFIG).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.05 if name.startswith("core") else 0.5
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.mark.parametrize(("drafts", "shallow"), [(1, 1), (4, 1), (3, 5), (40, 2)])
def test_greedy_tokens_are_those_of_full_depth(model, tokenizer, drafts, shallow):
    kind = "int8" if shallow == 5 else "float"
    options = replace(GREEDY, loops=10, max_new_tokens=30, kv_type=kind)
    plain = Engine(model, tokenizer, SETTINGS).complete(PROMPTS[:2], options)
    engine = Engine(model, tokenizer, SETTINGS)
    asked = replace(options, speculate=drafts, draft_loops=shallow)
    for one, other in zip(engine.complete(PROMPTS[:2], asked), plain):
        (exact, close), (same, numbers) = facts(one), facts(other)
        assert exact == same and close.expected == numbers
    work = engine.counters
    assert 0 < work.accepted < work.drafted, "the case is too easy"
    # Each verified position ran each loop once; every round gives one token beside its drafts.
    rounds = 2 * 29 - work.accepted
    assert work.loops == 10 * work.embedded == 10 * (work.drafted + rounds)
    assert work.readouts == 2 * work.drafted + rounds


def test_penalties_stops_and_the_end(model, tokenizer):
    plain, engine = Engine(model, tokenizer, SETTINGS), Engine(model, tokenizer, SETTINGS)
    options = replace(GREEDY, loops=10, repetition_penalty=1.3, max_new_tokens=20)
    asked = replace(options, speculate=5, draft_loops=2)
    [first], [other] = plain.complete(["Call me"], options), engine.complete(["Call me"], asked)
    assert facts(first)[0] == facts(other)[0]
    stop = (first.tokens[6].text + first.tokens[7].text,)
    plain.end = engine.end = first.tokens[11].id
    for change in (dict(stop=stop), dict(ignore_eos=False)):
        [first] = plain.complete(["Call me"], replace(options, **change))
        [other] = engine.complete(["Call me"], replace(asked, **change))
        assert facts(first)[0] == facts(other)[0]
        assert other.finish_reason != "length"


def test_with_loops_that_have_weights_of_their_own(model, tokenizer):
    model = copy.deepcopy(model)
    gain = model.injection.gain.detach().clone()
    model.enter_loop = lambda loop: model.injection.gain.data.copy_(gain * (1 + loop / 50))
    engine = Engine(model, tokenizer, SETTINGS)
    options = replace(GREEDY, loops=6)
    [plain] = engine.complete(["Call me"], options)
    [found] = engine.complete(["Call me"], replace(options, speculate=3))
    assert facts(found)[0] == facts(plain)[0]


def test_what_is_taken_has_the_chances_of_full_depth():
    """Over many drafts by other chances; by hand, 0.5 + 0.2 + 0.1 of them stand."""
    generator = torch.Generator().manual_seed(0)
    meant = torch.tensor([0.5, 0.2, 0.3, 0.0]).double()
    believed = torch.tensor([0.6, 0.2, 0.1, 0.1]).double()
    taken, stood, n = [0] * 4, 0, 4000
    for draft in torch.multinomial(believed, n, True, generator=generator).tolist():
        stands, token = settle(draft, meant, believed, generator)
        assert not stands or token == draft
        taken[token] += 1
        stood += stands
    assert [count / n for count in taken] == pytest.approx(meant.tolist(), abs=0.03)
    assert stood / n == pytest.approx(0.8, abs=0.03)


def test_sampled_tokens_are_spread_as_by_full_depth(model, tokenizer):
    """The second token's distribution, drafted, against the exact one of full depth."""
    engine = Engine(model, tokenizer, SETTINGS)
    options = GenerationOptions(
        loops=4, speculate=2, temperature=0.7, top_k=4, max_new_tokens=3, ignore_eos=True
    )
    many = [replace(options, seed=seed) for seed in range(300)]
    found = engine.complete(["Call me"] * 300, many)
    assert 0 < engine.counters.accepted < engine.counters.drafted
    first = max({f.tokens[0].id for f in found}, key=[f.tokens[0].id for f in found].count)
    seconds = [f.tokens[1].id for f in found if f.tokens[0].id == first]
    ids = torch.tensor([[*tokenizer.encode("Call me").ids, first]])
    with torch.no_grad():
        best = (model(ids, 4).logits[0, -1, : tokenizer.get_vocab_size()] / 0.7).topk(4)
    for token, chance in zip(best.indices.tolist(), best.values.softmax(-1).tolist()):
        error = (chance * (1 - chance) / len(seconds)) ** 0.5
        assert seconds.count(token) / len(seconds) == pytest.approx(chance, abs=4 * error)


def test_drafts_end_where_training_read_first():
    late = replace(SETTINGS, min_loops=3)
    for asked, full, loops in (None, 10, 3), (None, 3, 2), (None, 1, 1), (2, 10, 2):
        assert draft_loops(GenerationOptions(draft_loops=asked), fixed_exit(full, late)) == loops


def test_a_model_that_keeps_the_last_loop_drafts_by_filling(model, tokenizer):
    engine = Engine(model, tokenizer, replace(SETTINGS, kv_policy="last"))
    options = replace(GREEDY, loops=4)
    [plain] = engine.complete(["Call me"], replace(options, kv_policy="fill"))
    [drafted] = engine.complete(["Call me"], replace(options, speculate=2, draft_loops=2))
    assert [s.id for s in drafted.tokens] == [s.id for s in plain.tokens]


def test_what_cannot_be_drafted(model, tokenizer):
    engine = Engine(model, tokenizer, SETTINGS)
    for bad, why in (
        (dict(speculate=-1), "at least 0"),
        (dict(speculate=2, draft_loops=10), "`draft_loops` 10: .* 1 to 9"),
        (dict(speculate=2, draft_loops=3, loops=3), "1 to 2"),
        (dict(speculate=2, draft_loops=0), "`draft_loops` 0"),
        (dict(speculate=2, kv_policy="last"), "`kv_policy` fill"),
    ):
        with pytest.raises(UsageError, match=why):
            engine.generate(["a"], GenerationOptions(**bad))
