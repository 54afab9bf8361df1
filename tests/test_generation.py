"""The engine against slow references, a batch against single runs, and its records."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backend_cases import WatchedBackend

from looptx_core.config.generation import EXIT_RULES, ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model.attention import explicit
from looptx_core.model.block import Block
from looptx_core.model.cache import CacheView
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables, rotate

CONFIG = ModelConfig(
    **dict(vocab_size=280, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48),
    **dict(prelude_layers=1, core_layers=2, coda_layers=1, max_loops=10, max_seq_len=64),
    retain=0.5,  # by which tokens of random weights leave at many depths
)
GREEDY = GenerationOptions(temperature=0, max_new_tokens=12, ignore_eos=True)
# Near the medians of the model below, so that tokens leave at many depths.
SETTINGS = ExitSettings(
    confidence=0.93,
    gain=0.1,
    kl=1.5,
    entropy=2.0,
    maxprob=0.5,
    temperature=2.0,
    confidence_offset=0.1,
    stated=(0.2, 0.3, 0.8),
    gain_slope=(1.0, 0.8, 1.3),
    gain_power=(1.0, 0.5, 1.5),
    gain_offset=(0.0, -0.02, 0.04),
)
PROMPTS = ["Call me", "Some years ago, never mind how long", "", "whale"]


def small_tokenizer():
    text = "Call me Ishmael. Some years ago, never mind how long precisely.\n" * 4
    return train_tokenizer([text], 280)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def random_model(config: ModelConfig) -> LoopedTransformer:
    """Random weights, whose tokens leave at many depths."""
    torch.manual_seed(1)
    model = LoopedTransformer(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.startswith("confidence") else 0.5
            parameter.add_(torch.randn_like(parameter) * scale)
        model.confidence.out.bias.zero_()
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, SETTINGS)


def facts(generation):
    """What must not depend on the batch."""
    steps = [(s.id, s.text, s.loops) for s in generation.tokens]
    numbers = [x for s in generation.tokens for x in (s.confidence, s.logprob)]
    return (steps, generation.finish_reason), pytest.approx(numbers, abs=1e-9)


class Reference:
    """One sequence, a token at a time, with plain lists: `memory[part, layer][position]` holds
    the keys and values of every loop that this position computed."""

    def __init__(self, model, settings, policy):
        self.model, self.settings, self.policy = model, settings, policy
        self.memory = {}

    def heads(self, block: Block, x, position):
        """Queries, keys and values."""
        attention = block.attention
        rotary = rotary_tables(
            torch.tensor([[[position]]]), CONFIG.head_dim, CONFIG.rope_theta, x.dtype
        )
        x_norm = block.attention_norm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part(x_norm).view(1, 1, -1, CONFIG.head_dim) for part in projections)
        norms = attention.q_norm, attention.k_norm
        q, k = (
            rotate(F.rms_norm(x, x.shape[-1:], n.weight, n.eps), rotary).transpose(1, 2)
            for x, n in zip((q, k), norms)
        )
        return q, k, v.transpose(1, 2)

    def block(self, block: Block, key, x, position, loop, seen_at):
        """`seen_at(entries)`: which of an earlier position's entries this loop looks at."""
        q, k, v = self.heads(block, x, position)
        entries = self.memory.setdefault(key, [])
        past = [seen_at(one) for one in entries[:position]]
        if loop == 1:
            entries[position:] = [[]]
        entries[position].append((k, v))
        past.append(entries[position][-1])
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*past))
        out = explicit(q, keys, values, None).transpose(1, 2).reshape(1, 1, -1)
        x = x + block.attention.o_proj(out)
        return x + block.mlp(block.mlp_norm(x))

    def token(self, token, position, depth=None, *, minimum=1):
        """Logits, loops and confidence after a token; `depth` of a prompt's, else by `auto`."""
        model, settings = self.model, self.settings
        e = model.embedding(torch.tensor([[token]]))
        for i, block in enumerate(model.prelude):
            e = self.block(block, ("prelude", i), e, position, 1, lambda one: one[0])
        state, loop = e, 0
        while True:
            loop += 1

            def seen_at(one, loop=loop):
                if depth is None and self.policy == "last":
                    return one[-1]
                return one[min(loop, len(one)) - 1]

            before, state = state, model.injection(state, e, loop)
            for i, block in enumerate(model.core):
                state = self.block(block, ("core", i), state, position, loop, seen_at)
            logit, gain = model.confidence(state, loop)
            place = min(loop, len(settings.gain_slope)) - 1
            change = (state - before).norm() / state.norm()
            gain = torch.exp(settings.gain_slope[place] * gain + settings.gain_offset[place])
            gain = gain * change ** settings.gain_power[place]
            sure = torch.sigmoid(logit / settings.temperature + settings.confidence_offset).item()
            if depth is not None:
                if loop == depth:
                    break
            elif loop == CONFIG.max_loops or (
                loop >= minimum and (sure >= settings.confidence or gain.item() < settings.gain)
            ):
                break
        if loop < CONFIG.max_loops:
            ahead = self.heads(model.core[0], model.injection(state, e, loop + 1), position)
            self.memory["core", 0][position].append(ahead[1:])
        y = state
        for i, block in enumerate(model.coda):
            y = self.block(block, ("coda", i), y, position, 1, lambda one: one[0])
        logits = model.head(model.norm(y))[0, -1]
        best = logits.softmax(-1).max()
        offset, head, readout = settings.stated
        odds = offset + head * logit.item() + readout * torch.log(best / (1 - best))
        return logits, loop, torch.sigmoid(odds).item()

    @torch.no_grad()
    def generate(self, prompt, new, *, prompt_loops, minimum=1):
        for position, token in enumerate(prompt):
            logits, loops, sure = self.token(token, position, prompt_loops)
        found = []
        for position in range(len(prompt), len(prompt) + new):
            chosen = int(logits.argmax())
            found.append((chosen, loops, sure, float(logits.log_softmax(-1)[chosen])))
            logits, loops, sure = self.token(chosen, position, minimum=minimum)
        return found


@pytest.mark.parametrize("loops", range(1, 11))
def test_fixed_depth_equals_uncached_forward(engine, model, tokenizer, loops):
    [found] = engine.complete(["Call me"], replace(GREEDY, loops=loops))
    ids = tokenizer.encode("Call me").ids
    for step in found.tokens:
        with torch.no_grad():
            out = model(torch.tensor([ids]), loops)
        logs = out.logits[0, -1].log_softmax(-1)
        best = logs.max().exp()
        offset, head, readout = SETTINGS.stated
        odds = offset + head * out.confidence.logit[0, -1] + readout * torch.log(best / (1 - best))
        sure = torch.sigmoid(odds)
        assert step.id == logs.argmax() and step.loops == loops
        assert step.logprob == pytest.approx(logs[step.id].item(), abs=1e-9)
        assert step.confidence == pytest.approx(sure.item(), abs=1e-9)
        ids.append(step.id)


@pytest.mark.parametrize("policy", ["fill", "last"])
@pytest.mark.parametrize(("prompt_loops", "minimum"), [(10, 1), (3, 2)])
def test_auto_exit_equals_the_slow_reference(
    engine, model, tokenizer, policy, prompt_loops, minimum
):
    options = replace(
        GREEDY, kv_policy=policy, prompt_loops=prompt_loops, min_loops=minimum, max_new_tokens=20
    )
    [found] = engine.complete(["precisely"], options)
    prompt = tokenizer.encode("precisely").ids
    expected = Reference(model, SETTINGS, policy).generate(
        prompt, 20, prompt_loops=prompt_loops, minimum=minimum
    )
    assert [(s.id, s.loops) for s in found.tokens] == [one[:2] for one in expected]
    assert [x for s in found.tokens for x in (s.confidence, s.logprob)] == pytest.approx(
        [x for one in expected for x in one[2:]], abs=1e-9
    )
    assert len({s.loops for s in found.tokens[1:]}) >= 3, "the case is too easy"


@pytest.mark.parametrize("rule", EXIT_RULES)
@pytest.mark.parametrize("policy", ["fill", "last"])
def test_batch_of_auto_exits_equals_single_runs(engine, rule, policy):
    options = replace(GREEDY, exit=rule, kv_policy=policy)
    together = engine.complete(PROMPTS, options)
    for prompt, one in zip(PROMPTS, together):
        (exact, close), (same, numbers) = facts(one), facts(*engine.complete([prompt], options))
        assert exact == same and close.expected == numbers
    assert len({s.loops for one in together for s in one.tokens}) >= 3, "the case is too easy"


@pytest.mark.parametrize("policy", ["fill", "last"])
def test_streams_in_a_batch_equal_single_runs(tokenizer, policy):
    """Rows whose states have streams, at different loops and newly begun, and with drafts."""
    engine = Engine(random_model(replace(CONFIG, injection="streams")), tokenizer, SETTINGS)
    options = replace(GREEDY, exit="kl", threshold=0.3, kv_policy=policy)
    together = engine.complete(PROMPTS, options)
    for prompt, one in zip(PROMPTS, together):
        (exact, close), (same, numbers) = facts(one), facts(*engine.complete([prompt], options))
        assert exact == same and close.expected == numbers
    assert len({s.loops for one in together for s in one.tokens}) >= 3, "the case is too easy"
    drafted = replace(GREEDY, loops=6, speculate=3, draft_loops=2)
    plain = engine.complete(["whale"], replace(drafted, speculate=0))
    assert facts(*engine.complete(["whale"], drafted))[0] == facts(*plain)[0]


def test_batch_of_different_settings_equals_single_runs(engine):
    options = [
        replace(GREEDY, loops=2),
        replace(GREEDY, loops=7, prompt_loops=3, max_new_tokens=5),
        replace(GREEDY, exit="kl", min_loops=2),
        replace(GREEDY, loops=9, temperature=1.0, top_k=40, seed=3),
        replace(GREEDY, exit="gain", kv_policy="last", max_loops=6),
        replace(GREEDY, temperature=1.0, prompt_loops=2, max_new_tokens=9),
        replace(GREEDY, loops=2, prompt_loops=3, kv_policy="last"),
    ]
    prompts = [*PROMPTS, "mind", "how long precisely", "Ishmael"]
    together = engine.complete(prompts, options)
    for prompt, option, one in zip(prompts, options, together):
        (exact, close), (same, numbers) = facts(one), facts(*engine.complete([prompt], option))
        assert exact == same and close.expected == numbers


def test_who_waits_takes_the_place_of_who_is_done(model, tokenizer, engine):
    """Seven requests on three rows, of all lengths; the core is nearly always full."""
    small = Engine(model, tokenizer, SETTINGS, batch_size=3)
    prompts = [*PROMPTS, "mind", "how long precisely", "Ishmael"]
    options = [replace(GREEDY, max_new_tokens=n) for n in (3, 14, 1, 9, 5, 12, 7)]
    together = small.complete(prompts, options)
    turns = []
    small.backend = WatchedBackend(
        small.backend, lambda loops, count, positions: positions > 1 or turns.append(list(loops))
    )
    steps = list(small.generate(prompts, options))
    for prompt, option, one in zip(prompts, options, together):
        assert facts(one)[0] == facts(*engine.complete([prompt], option))[0]
    first = [next(i for i, s in enumerate(steps) if s.request == n) for n in range(7)]
    last = [max(i for i, s in enumerate(steps) if s.request == n) for n in range(7)]
    assert max(first[3:]) > min(last), "nobody had to wait"
    mixed = [loops for loops in turns if len(set(loops)) > 1]
    assert len(mixed) > 10 and {len(loops) for loops in mixed} == {2, 3}


def test_loops_with_weights_of_their_own_in_a_batch(model, tokenizer):
    model = copy.deepcopy(model)
    gain = model.injection.gain.detach().clone()
    model.enter_loop = lambda loop: model.injection.gain.data.copy_(gain * (1 + loop / 5))
    engine = Engine(model, tokenizer, SETTINGS)
    for prompt, one in zip(PROMPTS, engine.complete(PROMPTS, GREEDY)):
        assert facts(one)[0] == facts(*engine.complete([prompt], GREEDY))[0]


@pytest.mark.parametrize(("policy", "kind"), [("last", "int8"), ("fill", "int4")])
def test_a_rounded_cache_is_the_same_for_a_batch_and_alone(model, tokenizer, engine, policy, kind):
    options = replace(GREEDY, kv_policy=policy, kv_type=kind)
    small = Engine(model, tokenizer, SETTINGS, batch_size=3)
    exact = engine.complete(PROMPTS, replace(GREEDY, kv_policy=policy))
    rounded = small.complete(PROMPTS, options)
    for prompt, one in zip(PROMPTS, rounded):
        assert facts(one)[0] == facts(*engine.complete([prompt], options))[0]
    logs = [[s.logprob for one in each for s in one.tokens] for each in (rounded, exact)]
    assert logs[0] != logs[1]


def test_seed_repeats_and_differs(engine):
    options = replace(GREEDY, temperature=1.0)
    first, again = (engine.complete(["Call me"], options)[0] for _ in range(2))
    other = engine.complete(["Call me"], replace(options, seed=1))[0]
    assert facts(first)[0] == facts(again)[0] != facts(other)[0]


def test_confidence_rules_need_no_vocabulary_product(engine, model, monkeypatch):
    calls, product = [], model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: (calls.append(x), product(x))[1])
    [found] = engine.complete(["Call me"], GREEDY)
    assert len(calls) == len(found.tokens)
    calls.clear()
    [found] = engine.complete(["Call me"], replace(GREEDY, exit="entropy"))
    assert len(calls) == 1 + sum(s.loops for s in found.tokens[1:])


def test_fixed_depth_decides_nothing(model, tokenizer, monkeypatch):
    engine, caches, written = Engine(model, tokenizer, SETTINGS), [], []
    add, write = CacheView.advance, CacheView.write
    monkeypatch.setattr(CacheView, "advance", lambda self: (caches.append(self.cache), add(self)))
    monkeypatch.setattr(CacheView, "write", lambda self, *a: (written.append(1), write(self, *a)))
    [found] = engine.complete(["Call me"], replace(GREEDY, loops=4))
    new = len(found.tokens) - 1  # the first comes from the prompt
    assert {id(cache): cache.loops for cache in caches} == {id(caches[0]): 4}
    work = engine.counters
    assert (work.embedded, work.loops, work.readouts, work.exit_checks) == (new, 4 * new, new, new)
    # A key and a value for each block of each loop, and no copies into deeper slots.
    assert len(written) == 2 * (1 + 4 * 2 + 1) * (new + 1)


def test_context_bounds(engine, tokenizer):
    with pytest.raises(UsageError, match=r"100 tokens .* 64.*shorten"):
        engine.generate([[20] * 100], GREEDY)
    with pytest.raises(UsageError):
        engine.generate([[20] * 64], GREEDY)
    [found] = engine.complete([[20] * 60], replace(GREEDY, max_new_tokens=50))
    assert len(found.tokens) == 4 and found.finish_reason == "length"


def test_end_of_document(model, tokenizer, engine):
    [plain] = engine.complete(["Call me"], GREEDY)
    ending = Engine(model, tokenizer, SETTINGS)
    ending.end = plain.tokens[4].id  # as if this token ended documents
    first = [s.id for s in plain.tokens].index(ending.end)
    [found] = ending.complete(["Call me"], replace(GREEDY, ignore_eos=False))
    assert found.finish_reason == "end" and len(found.tokens) == first + 1
    assert ending.complete(["Call me"], GREEDY)[0].finish_reason == "length"


def test_text_is_the_joined_records(engine, tokenizer):
    options = replace(GREEDY, temperature=1.5, max_new_tokens=50)
    results = engine.complete(PROMPTS, [replace(options, seed=i) for i in range(4)])
    for found in results:
        assert found.text == "".join(s.text for s in found.tokens)
        assert found.text == tokenizer.decode([s.id for s in found.tokens])
    assert any("\ufffd" in r.text for r in results), "no split character was met"


def test_engine_stops_before_a_string_that_straddles_tokens(engine):
    [plain] = engine.complete(["Call me"], GREEDY)
    texts = [step.text for step in plain.tokens]
    stop = next(a[-1] + b[0] for a, b in itertools.pairwise(texts[3:]) if a and b)
    [found] = engine.complete(["Call me"], replace(GREEDY, stop=(stop,)))
    assert found.finish_reason == "stop"
    assert found.text == plain.text[: plain.text.index(stop)]
    assert "".join(s.text for s in found.tokens) == found.text


def test_settings_that_cannot_be_followed(engine):
    for bad in (
        dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0),
        dict(min_p=1.5), dict(repetition_penalty=0.0), dict(stop=("",)),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            engine.generate(["a"], GenerationOptions(**bad))


def test_compute_saved(engine):
    [full] = engine.complete(["Call me"], replace(GREEDY, loops=10))
    [half] = engine.complete(["Call me"], replace(GREEDY, loops=5))
    assert engine.compute_saved(full) == pytest.approx(0, abs=1e-12)
    assert 0.3 < engine.compute_saved(half) < 0.5


def test_record_of_a_generation(engine):
    [found] = engine.complete(["Call me"], GREEDY)
    record = found.to_dict()
    assert list(record) == [
        "prompt", "text", "tokens", "mean_loops", "tokens_per_second", "prompt_tokens",
        "finish_reason", "exit", "model",
    ]  # fmt: skip
    assert list(record["tokens"][0]) == ["id", "text", "loops", "confidence", "logprob"]
    assert record["mean_loops"] == sum(t["loops"] for t in record["tokens"]) / 12
    seconds = found.tokens[-1].seconds
    assert record["tokens_per_second"] == 12 / seconds and 0 < seconds < 60
