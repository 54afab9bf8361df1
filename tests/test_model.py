"""The loop: equal to an independent transformer at one loop, and to itself however it is run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.model.attention import Recording, choose_backend, explicit
from looptx_core.model.cache import LoopCache
from looptx_core.model.confidence import relative_change
from looptx_core.model.injection import Injection
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rounding import KINDS

pytestmark = pytest.mark.fast

CONFIG = ModelConfig(
    vocab_size=97, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64
)


def build(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LoopedTransformer:
    """A model whose weights are far from their small beginnings, so that errors show."""
    torch.manual_seed(1)
    model = LoopedTransformer(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_loop_equals_an_independent_transformer(qk_norm: bool) -> None:
    """With injection off: transformers' Llama, and Qwen3 where queries and keys are normed."""
    transformers = pytest.importorskip("transformers")
    kind = "Qwen3" if qk_norm else "Llama"
    config = replace(CONFIG, injection="none", qk_norm=qk_norm, core_layers=2)
    ours = build(config)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            hidden_act="gelu",
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attn_implementation="eager",
            use_cache=False,
        )
    )
    theirs = theirs.double().eval()
    weights = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
    }
    for number, block in enumerate((*ours.prelude, *ours.core, *ours.coda)):
        at = f"model.layers.{number}."
        attention = block.attention
        weights |= {
            at + "input_layernorm.weight": block.attention_norm.weight,
            at + "post_attention_layernorm.weight": block.mlp_norm.weight,
            at + "self_attn.q_proj.weight": attention.q_proj.weight,
            at + "self_attn.k_proj.weight": attention.k_proj.weight,
            at + "self_attn.v_proj.weight": attention.v_proj.weight,
            at + "self_attn.o_proj.weight": attention.o_proj.weight,
            at + "mlp.gate_proj.weight": block.mlp.gate_proj.weight,
            at + "mlp.up_proj.weight": block.mlp.up_proj.weight,
            at + "mlp.down_proj.weight": block.mlp.down_proj.weight,
        }
        if qk_norm:
            weights[at + "self_attn.q_norm.weight"] = attention.q_norm.weight
            weights[at + "self_attn.k_norm.weight"] = attention.k_norm.weight
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        gap = (ours(tokens(), loops=1).logits - theirs(tokens()).logits).abs().max()
        other = (ours(tokens(), loops=2).logits - theirs(tokens()).logits).abs().max()
    # Their norms compute in float32 whatever the model's type.
    assert gap < 1e-5
    assert other > 1e-2


def test_a_bridge_starts_as_nothing_and_never_changes_the_first_loop() -> None:
    plain = build(replace(CONFIG, injection="none"))
    bridged = LoopedTransformer(replace(CONFIG, injection="bridge")).double().eval()
    bridged.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        one = plain(tokens(), 1).logits
        assert all(torch.equal(bridged(tokens(), loops).logits, one) for loops in (1, 2, 5))
        torch.nn.init.normal_(bridged.injection.bridge.weight, std=0.1)
        deep = bridged(tokens(), 3).logits
        assert torch.equal(bridged(tokens(), 1).logits, one)
        assert not torch.allclose(deep, one)
        # Rows of one batch, each in a loop of its own.
        ctx = bridged.context(21)
        e = bridged.embed(tokens(), ctx)
        state = bridged.step(e, e, 1, ctx)
        each = bridged.step(state, e, torch.tensor([1, 2]), ctx)
        assert torch.allclose(each[:1], bridged.step(state, e, 1, ctx)[:1])
        assert torch.allclose(each[1:], bridged.step(state, e, 2, ctx)[1:])


@pytest.mark.parametrize("injection", ["decay", "bridge", "half_steps", "streams", "add", "none"])
def test_a_state_does_not_depend_on_the_loops_that_follow(injection: str) -> None:
    model = build(replace(CONFIG, injection=injection))
    with torch.no_grad():
        all_states = list(model.states(tokens(), 10))
        for loops in range(1, 11):
            assert torch.equal(model(tokens(), loops).state, all_states[loops - 1])
    assert not torch.allclose(all_states[0], all_states[1])


@pytest.mark.parametrize("loops", range(1, 11))
def test_cached_equals_uncached(loops: int) -> None:
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = build(dtype=dtype)
        with torch.no_grad():
            whole = model(tokens(), loops).logits
            cache = LoopCache(CONFIG, 2, 21, loops, dtype=dtype)
            parts = [model(part, loops, cache).logits for part in tokens().split([9, 3, 1, 8], 1)]
        assert (torch.cat(parts, 1) - whole).abs().max() < limit


@pytest.mark.parametrize("loops", [1, 4])
def test_padding_at_the_left_changes_nothing(loops: int) -> None:
    model, long = build(), tokens(2, 12)
    short = long[1:, 5:]
    padded = long.clone()
    padded[1, :5] = 0
    cache = LoopCache(CONFIG, 2, 14, loops, dtype=torch.float64)
    cache.pad_left(torch.tensor([0, 5]))
    with torch.no_grad():
        both = model(padded, loops, cache).logits
        assert (both[0] - model(long[:1], loops).logits[0]).abs().max() < 1e-9
        assert (both[1, 5:] - model(short, loops).logits[0]).abs().max() < 1e-9


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_rows_at_their_own_columns_and_loops(dtype: torch.dtype, limit: float) -> None:
    """Rows that came at different times go through the core together, each at its own loop."""
    model, loops, text = build(dtype=dtype), 4, tokens(3, 9)
    lengths, behind = [8, 3, 6], [2, 0, 1]  # columns of each row; loops it is ahead of row 1
    with torch.no_grad():
        cache = LoopCache(CONFIG, 3, 12, loops, dtype=dtype)
        for row in (1, 0, 2):  # row 0 held another text before
            if row == 0:
                ctx = model.context(7, cache.view(7, [0]))
                list(model.states(tokens(4, 7)[3:], loops, ctx))
                ctx.view.advance()
                cache.reset_row(0)
            ctx = model.context(lengths[row], cache.view(lengths[row], [row]))
            *_, state = model.states(text[row : row + 1, : lengths[row]], loops, ctx)
            model.coda_hidden(state, ctx)
            ctx.view.advance()
        new = torch.stack([text[row, length] for row, length in enumerate(lengths)])[:, None]
        here = model.context(1, cache.view(1))
        state = embedding = model.embed(new, here)
        found = [None] * 3
        for turn in range(1, loops + 3):
            # Row r joins at turn `behind[r] + 1`, and stays for four loops.
            rows = [row for row in range(3) if 0 < turn - behind[row] <= loops]
            ctx = model.context(1, cache.view(1, rows))
            depth = torch.tensor([turn - behind[row] for row in rows])
            state = state.index_copy(
                0, torch.tensor(rows), model.step(state[rows], embedding[rows], depth, ctx)
            )
            for row in rows:
                if turn - behind[row] == loops:
                    alone = model.context(1, cache.view(1, [row]))
                    found[row] = model.head(model.coda_hidden(state[row : row + 1], alone))[0, 0]
        for row, length in enumerate(lengths):
            whole = model(text[row : row + 1, : length + 1], loops).logits[0, -1]
            assert (found[row] - whole).abs().max() < limit
        judged = model.confidence(state, torch.tensor([1, 4, 2]))
        for row, loop in enumerate((1, 4, 2)):
            one = model.confidence(state[row : row + 1], loop)
            assert (judged.gain[row] - one.gain[0]).abs().max() < limit


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("loops", [1, 4])
def test_who_leaves_provides_for_the_next_loop(loops: int, kind: str) -> None:
    """The first layer's entries are those that the next loop would have made; the others', and
    those of loops further on, are copies."""
    torch.manual_seed(0)
    config = replace(CONFIG, core_layers=2)
    model = LoopedTransformer(config).double().eval()
    share = model.injection.gain.detach().clone()
    model.enter_loop = lambda loop: model.injection.gain.data.copy_(share * (1 + loop))
    tokens = torch.randint(0, config.vocab_size, (2, 5))
    left, gone_on = (
        LoopCache(config, 2, 5, loops=8, kind=kind, dtype=torch.double) for _ in range(2)
    )
    for cache in (left, gone_on):
        cache.pad_left(torch.tensor([0, 2]))
    with torch.no_grad():
        for cache, more in ((left, 0), (gone_on, 1)):
            ctx = model.context(5, cache.view(5))
            state = start = model.embed(tokens, ctx)
            for loop in range(1, loops + 1 + more):
                state = model.step(state, start, loop, ctx)
            if not more:
                model.backfill(state, start, loops, ctx)
    for ours, true in zip(left.core[0]._parts(), gone_on.core[0]._parts(), strict=True):
        assert torch.allclose(ours[loops], true[loops], atol=1e-12)  # slots count from 0
        assert torch.equal(ours[7], ours[loops])
        if kind == "float":  # what is rounded may be the same
            assert not torch.allclose(ours[loops], ours[loops - 1], atol=1e-6)
    for part in left.core[1]._parts():
        assert torch.equal(part[7], part[loops - 1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_keys_and_values(kind: str) -> None:
    """What is read back is within half a step, and what takes 4 bits takes 4 bits."""
    x = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)) * 7
    x[0, 0, 0] = 0
    codes, scales = KINDS[kind].round(x)
    back = KINDS[kind].restore(codes, scales, x.dtype)
    largest = {"int8": 127, "int4": 7}[kind]
    assert ((back - x).abs() <= 0.51 * x.abs().amax(-1, keepdim=True) / largest).all()
    assert codes.nbytes == x.numel() * {"int8": 8, "int4": 4}[kind] // 8
    cache = LoopCache(CONFIG, 2, 5, 4, kind=kind)
    full = LoopCache(CONFIG, 2, 5, 4)
    head, heads = CONFIG.head_dim, CONFIG.n_kv_heads
    slots = sum(len(state.keys) for state in full.layers)
    assert full.bytes_per_token == slots * 2 * heads * head * 4
    assert cache.bytes_per_token == slots * 2 * heads * (
        head * {"int8": 8, "int4": 4}[kind] // 8 + 2
    )


def test_causal() -> None:
    model, first = build(), tokens()
    second = first.clone()
    second[:, 15:] = (second[:, 15:] + 1) % 97
    with torch.no_grad():
        gap = (model(first, 3).logits - model(second, 3).logits).abs().amax((0, 2))
    assert gap[:15].max() < 1e-12 and gap[15:].min() > 1e-6


def test_back_ends_agree() -> None:
    model = build()
    with torch.no_grad():
        fused = model(tokens(), 3).logits
        model.attend = explicit
        assert (model(tokens(), 3).logits - fused).abs().max() < 1e-9
        model.attend = recording = Recording()
        model(tokens(), 3)
    blocks = CONFIG.effective_layers(3)
    assert len(recording.weights) == blocks
    for weights in recording.weights:
        assert torch.allclose(weights.sum(-1), torch.ones(()).double())
        assert weights.triu(1).abs().max() == 0


def test_a_back_end_says_why() -> None:
    chosen = choose_backend("auto", torch.device("cpu"), torch.float32)
    assert chosen.name == "sdpa" and "GPU" in chosen.reason


def test_no_gradient_from_the_confidence_head_into_the_trunk() -> None:
    model = build()
    judged = model(tokens(), 2).confidence
    (judged.logit.sum() + judged.gain.sum()).backward()
    assert all(p.grad is None for p in model.trunk_parameters())
    assert all(p.grad is not None for p in model.confidence.parameters())


def test_what_a_loop_keeps_at_the_start() -> None:
    """Of a state and an embedding that are normed already, as their share says."""
    state, embedding = (F.normalize(torch.randn(2, 3, 64), dim=-1) * 8 for _ in range(2))
    for kept in (0.5, 0.88):
        config = replace(CONFIG, d_model=64, retain=kept)
        mixed = Injection(config)(state, embedding, loop=2)
        assert torch.allclose(mixed, kept * state + (1 - kept) * embedding, atol=1e-5)
    with pytest.raises(UsageError, match="retain must lie between 0 and 1, not 1"):
        replace(CONFIG, retain=1)


def test_weights_at_the_start() -> None:
    """Of 0.02, and what is added to the residual stream smaller by the root of its additions.

    At most 9 loops are 5 on average: 2 + 5 x 3 + 1 blocks of two additions each, 36 in all.
    """
    config = replace(
        CONFIG, d_model=128, d_ff=256, n_heads=8, head_dim=16, prelude_layers=2, core_layers=3,
        coda_layers=1, max_loops=9,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, parameter in LoopedTransformer(config).named_parameters():
        if parameter.numel() > 4000 and parameter.dim() == 2:
            added = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / 6 if added else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_a_fresh_model_is_unsure_and_expects_nothing_of_another_loop() -> None:
    torch.manual_seed(0)
    told = LoopedTransformer(CONFIG)(tokens(), 3).confidence
    # Log-odds of -3: a chance of one in twenty.
    assert torch.allclose(told.logit.sigmoid(), torch.tensor(1 / 21), atol=0.005)
    assert told.gain.abs().max() < 0.05


def test_no_prelude_and_no_coda() -> None:
    config = replace(CONFIG, prelude_layers=0, coda_layers=0)
    model = build(config)
    cache = LoopCache(config, 2, 21, 4, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(part, 4, cache).logits for part in tokens().split([20, 1], 1)]
        assert (torch.cat(parts, 1) - model(tokens(), 4).logits).abs().max() < 1e-9


def test_the_change_of_a_state_by_hand() -> None:
    before = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]]])
    after = torch.tensor([[[3.0, 4.0], [3.0, 0.0], [1.0, 2.0]]])
    expected = torch.tensor([[1.0, 4 / 3, 1e-6]])  # the last stands still: the least that is told
    assert torch.allclose(relative_change(before, after), expected)


@pytest.mark.parametrize("window", [0, 3])
def test_a_token_attends_within_its_own_document(window: int) -> None:
    model, ids = build(replace(CONFIG, local_attention=LocalAttention(window, 2))), tokens(1, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5])
    with torch.no_grad():
        *_, found = model.states(ids, 2, model.context(9, documents=documents))
        alone = torch.cat([model(part, 2).state for part in ids.split([4, 5], 1)], 1)
    # Angles of other positions are rounded otherwise, in float32.
    assert torch.allclose(found, alone, atol=1e-6 if window else 1e-9)
    assert model.context(9, documents=documents * 0).mask is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_torchs(dtype: torch.dtype) -> None:
    norm = RMSNorm(24, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(24).to(dtype))
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    expected = torch.nn.functional.rms_norm(x, (24,), norm.weight, 1e-6)
    error = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(norm(x), expected, atol=error, rtol=error)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (norm(x), expected))
    torch.testing.assert_close(ours, theirs, atol=10 * error, rtol=10 * error)
    nothing = torch.zeros(2, 24, dtype=dtype, requires_grad=True)
    norm(nothing).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_joined_projections_change_nothing() -> None:
    model, ids = build(), tokens()
    with torch.no_grad():
        before, names = model(ids, 3).logits, set(model.state_dict())
        model.fuse_projections()
        joined = [
            module for module in model.modules() if getattr(module, "_fused", None) is not None
        ]
        assert len(joined) == 2 * 4 and set(model.state_dict()) == names
        torch.testing.assert_close(model(ids, 3).logits, before, atol=1e-12, rtol=1e-12)
    # The joined matrix is the weights themselves: it follows an optimizer and a loaded state.
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model(ids, 3).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        after = model(ids, 3).logits
        assert not torch.allclose(after, before)
        apart = build()
        apart.load_state_dict(model.state_dict())
        torch.testing.assert_close(apart(ids, 3).logits, after, atol=1e-12, rtol=1e-12)
        # A cast gives new memory, and what was joined is no longer used.
        assert model.float()(ids, 3).logits.dtype == torch.float32
