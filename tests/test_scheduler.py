"""Requests that join and leave while others run, and prompts that are read in pieces."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from backend_cases import WatchedBackend
from picture_cases import IMG, build, letters
from test_generation import CONFIG as BASE
from test_generation import GREEDY as BASE_GREEDY
from test_generation import SETTINGS, facts, random_model, small_tokenizer

from looptx_core.data.chat import ChatTemplate
from looptx_core.errors import DataError, UsageError
from looptx_core.generation import cache_room, prompts, scheduler
from looptx_core.generation.engine import Engine
from looptx_core.generation.prompts import split_prompt
from looptx_core.generation.request import ChatPrompt, TokenPrompt
from looptx_core.media.batch import MediaItem
from looptx_core.media.registry import MEDIA

CONFIG = replace(BASE, max_loops=4, core_layers=1, max_seq_len=40)
GREEDY = replace(BASE_GREEDY, max_new_tokens=5)
LONG = [20 + n % 60 for n in range(16)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(params=["fill", "last"])
def engine(request, model, tokenizer):
    return Engine(model, tokenizer, replace(SETTINGS, kv_policy=request.param), batch_size=4)


@pytest.fixture
def small_pieces(monkeypatch):
    """Prompts are cut every 6 tokens, and at most 6 are read before others go on."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 6)
    monkeypatch.setattr(scheduler, "_ALONE", 12)

    def in_sixes(seen, items, config):
        return split_prompt(seen, items, config, piece=6)

    monkeypatch.setattr(scheduler, "split_prompt", in_sixes)


def run(scheduler):
    steps = []
    while len(scheduler):
        steps += scheduler.step()
    return steps


def test_who_joins_later_and_who_leaves_change_nothing(engine, small_pieces):
    asked = [
        (LONG, GREEDY),
        ([30] * 3, replace(GREEDY, loops=1)),
        (LONG[::-1], replace(GREEDY, exit="gain", temperature=1.0, seed=5)),
        (LONG[5:], replace(GREEDY, exit="kl", max_loops=3)),
    ]
    alone = [engine.complete([prompt], options)[0] for prompt, options in asked]
    with torch.inference_mode(), engine.lasting(3, CONFIG.max_seq_len) as lasting:
        requests = [engine.request(n, *pair) for n, pair in enumerate(asked)]
        leaving = engine.request(9, LONG, GREEDY)
        early = engine.request(8, LONG, GREEDY)
        steps = []
        lasting.add(early)
        lasting.add(leaving)
        for n, request in enumerate(requests):
            lasting.add(request)
            for _ in range(2):
                steps += lasting.step()
            if n == 1:
                lasting.cancel(early)  # while its prompt is read
            if n == 3:
                assert any(step.request == 9 for step in steps)
                lasting.cancel(leaving)  # at some loop of a token
                lasting.cancel(leaving)
        steps += run(lasting)
        assert lasting.running == lasting.tokens == 0 and len(lasting.batch) == 0
    for n, one in enumerate(alone):
        own = [step for step in steps if step.request == n]
        assert [(s.id, s.text, s.loops) for s in own] == facts(one)[0][0]
    assert len({s.loops for s in steps}) >= 3, "the case is too easy"


def test_pieces_are_the_same_prompt_under_fill(
    model,
    tokenizer,
    small_pieces,
    monkeypatch,
):
    engine = Engine(model, tokenizer, SETTINGS)
    [pieces] = engine.complete([LONG], GREEDY)
    monkeypatch.setattr(scheduler, "split_prompt", split_prompt)
    [whole] = engine.complete([LONG], GREEDY)
    (exact, close), (same, numbers) = facts(pieces), facts(whole)
    assert exact == same and close.expected == numbers


def test_a_token_waits_for_one_piece_at_most(model, tokenizer, small_pieces):
    engine = Engine(model, tokenizer, SETTINGS)
    positions = []
    engine.backend = WatchedBackend(engine.backend, lambda loops, count, new: positions.append(new))
    with torch.inference_mode(), engine.lasting(2, CONFIG.max_seq_len) as lasting:
        lasting.add(engine.request(0, [30], replace(GREEDY, max_new_tokens=20)))
        lasting.step()
        lasting.add(engine.request(1, LONG, GREEDY))
        between, seen = [0], 0
        while not seen:
            before = len(positions)
            steps = lasting.step()
            between[-1] += sum(new for new in positions[before:] if new > 1)
            seen = sum(step.request == 1 for step in steps)
            if any(step.request == 0 for step in steps):
                between.append(0)
        run(lasting)
    assert max(between) == 6 and sum(between) == len(LONG)


def test_several_pieces_are_read_where_several_prompts_wait_for_each_stream(
    model,
    tokenizer,
    small_pieces,
):
    engine = Engine(model, tokenizer, SETTINGS)
    passes = []
    with torch.inference_mode(), engine.lasting(8, CONFIG.max_seq_len) as lasting:
        lasting.batch.on_prompt = passes.append
        lasting.add(engine.request(0, [30], replace(GREEDY, max_new_tokens=9)))
        lasting.step()
        for n in range(1, 8):
            lasting.add(engine.request(n, LONG[:12], replace(GREEDY, max_new_tokens=8)))
        steps = run(lasting)
    # Seven wait for one stream, then three for five streams, which each wait for one piece.
    assert passes == [1, 24, 24, *[6] * 6]
    assert len({tuple(s.id for s in steps if s.request == n) for n in range(1, 8)}) == 1


def test_drafts_go_on_beside_others(model, tokenizer):
    engine = Engine(model, tokenizer, SETTINGS)
    options = replace(GREEDY, speculate=3)
    [alone] = engine.complete([LONG], options)
    with torch.inference_mode(), engine.lasting(2, CONFIG.max_seq_len) as lasting:
        lasting.add(engine.request(0, [30], GREEDY))
        lasting.add(engine.request(1, LONG, options))
        steps = run(lasting)
    assert [s.id for s in steps if s.request == 1] == [s.id for s in alone.tokens]
    assert {s.request for s in steps[:8]} == {0, 1}, "one after the other"


def test_scores_of_a_prompt_and_the_likeliest_tokens(engine, model, small_pieces):
    request = engine.request(0, LONG, replace(GREEDY, loops=2))
    request.score_prompt, request.top_logprobs = True, 3
    with torch.inference_mode(), engine.lasting(1, CONFIG.max_seq_len) as lasting:
        lasting.add(request)
        steps = run(lasting)
    logs = model(torch.tensor([LONG]), 2).logits[0].log_softmax(-1)
    if engine.exit_settings.kv_policy == "fill":  # `last` is another function of the prompt
        expected = [logs[n, token].item() for n, token in enumerate(LONG[1:])]
        assert [s.logprob for s in request.prompt_scores] == pytest.approx(expected, abs=1e-9)
    assert len(request.prompt_scores) == len(LONG) - 1
    for step in steps:
        assert step.likeliest[0] == (step.id, pytest.approx(step.logprob, abs=1e-12))
        values = [value for _, value in step.likeliest]
        assert len(values) == 3 and values == sorted(values, reverse=True)


def test_no_piece_ends_within_an_item():
    config = MEDIA["image"].enable(CONFIG)
    token = MEDIA["image"].token(config)
    items = [MediaItem("image", torch.zeros(4, 1), (2, 2)) for _ in range(3)]
    seen = [9] * 4 + [token] * 4 + [9] * 5 + [token] * 8 + [9]
    pieces = split_prompt(seen, items, config, piece=6)
    assert [(piece.start, piece.end, len(piece.items)) for piece in pieces] == [
        (0, 8, 1),
        (8, 21, 2),
        (21, 22, 0),
    ]
    assert [(p.start, p.end) for p in split_prompt(range(300), (), config)] == [
        (0, prompts.PREFILL_CHUNK),
        (prompts.PREFILL_CHUNK, 2 * prompts.PREFILL_CHUNK),
        (2 * prompts.PREFILL_CHUNK, 300),
    ]


def test_placeholders_without_items_are_refused():
    """They share passes with the pictures of others, whose places they would take."""
    model = build(dtype=torch.float32)
    engine = Engine(model, letters())
    item = MediaItem("image", torch.zeros(4, 48), (2, 2))
    for prompt, found in (
        ([9, IMG, 9], "1 times.*take 0"),
        (TokenPrompt((9, *[IMG] * 5), (item,)), "5 times.*take 4"),
        (TokenPrompt((9,), (item,)), "0 times.*take 4"),
    ):
        with pytest.raises(DataError, match=found):
            engine.request(0, prompt, GREEDY)
    engine.request(0, TokenPrompt((9, *[IMG] * 4), (item,)), GREEDY)


def test_a_chat_template_of_others_takes_no_pictures():
    engine = Engine(build(dtype=torch.float32), letters(), chat_template=ChatTemplate("x", {}))
    item = MediaItem("image", torch.zeros(4, 48), (2, 2))
    with pytest.raises(UsageError, match="no place for pictures"):
        engine.encode(ChatPrompt(({"role": "user", "content": "a"},), (item,)))


def test_a_cache_larger_than_the_memory_is_not_made(engine, monkeypatch):
    room = cache_room.cache_bytes(engine.model, 1, 10, 4, engine.exit_settings)
    monkeypatch.setattr(cache_room, "free_memory", lambda device: room)
    texts, deep = [LONG[:5], LONG[:6]], replace(GREEDY, loops=4)
    assert len(engine.complete(texts[:1], deep)[0].tokens) == 5
    with pytest.raises(UsageError, match=r"2 texts of .* tokens with up to 4 loops .* are free"):
        engine.complete(texts, deep)


def test_memory_that_pytorch_keeps_is_free(monkeypatch):
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 300}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert cache_room.free_memory(torch.device("cuda")) == 500


def test_a_spare_cache_is_gone_before_a_larger_one_is_made(engine, monkeypatch):
    monkeypatch.setattr(engine.backend, "reuses_cache", True)
    engine.complete([LONG[:5]], GREEDY)
    spare, module = weakref.ref(engine._spare), "looptx_core.generation.engine.fitting_cache"
    monkeypatch.setattr(module, lambda *_: spare())
    assert engine._cache(engine.exit_settings, 1, 100_000, 4) is None
