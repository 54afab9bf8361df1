"""What commands make of a memory: pictures, plans, optimizers, conversions, inspection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from picture_cases import CONFIG as PICTURES
from picture_cases import build, row
from test_memory import GREEDY, IDS, SETTINGS, TEXT, made, text_tokenizer

from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.model import ModelConfig, fitting_memory
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.memory import with_memory
from looptx_core.errors import UsageError
from looptx_core.finetuning.adapters import attach
from looptx_core.generation.engine import Engine
from looptx_core.inspection.memory import inspect_memory, memory_sentences
from looptx_core.media.batch import MediaBatch
from looptx_core.model.flops import parameter_count, state_bytes, token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.memory import count
from looptx_core.training.memory_check import check_memory_use
from looptx_core.training.optimizer import build_adamw, build_optimizer

CONFIG = ModelConfig(vocab_size=64, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24,
                     core_layers=2, max_loops=3, max_seq_len=40, memory="delta", memory_window=16,
                     memory_block=8)  # fmt: skip


@pytest.mark.parametrize("attention", ["both", "causal"])
@torch.no_grad()
def test_pictures_across_blocks_are_read_alike(attention: str) -> None:
    """Whole rows, a prompt by blocks, and the text after the pictures token by token."""
    config = replace(PICTURES, image_attention=attention, memory="delta", memory_window=8,
                     memory_block=4)  # fmt: skip
    model = build(config)
    grids = torch.tensor([(2, 3), (3, 2)])
    seen = MediaBatch(torch.rand(12, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1, grids)
    seen = MediaBatch(seen.features.double(), grids)
    tokens = torch.tensor([row(5, 6, (2, 3), 7, (3, 2), *range(10, 20))])
    whole = model(tokens, 3, media={"image": seen}).logits
    cache = model.new_cache(1, 64, 3)
    parts = [model(tokens[:, :15], 3, cache, media={"image": seen}).logits]
    parts += [model(tokens[:, [i]], 3, cache).logits for i in range(15, tokens.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["infini", "delta"])
@torch.no_grad()
def test_a_trained_model_gets_closed_gates(kind) -> None:
    torch.manual_seed(0)
    plain = LoopedTransformer(replace(CONFIG, memory="none")).double().eval()
    found = with_memory(plain, kind, 16, 8)
    tokens = torch.randint(0, 64, (2, 40))
    one, other = (model(tokens[:, :16], 3).logits for model in (found, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # angles of RoPE are float64 here
    after = found(tokens, 3).logits
    for block in found.core:
        block.attention.memory.gate_bias.fill_(-torch.inf)
    shut = found(tokens, 3).logits
    assert 0 < float((after - shut).abs().max()) < 0.01 * float(shut.abs().max())
    with pytest.raises(UsageError, match="has a memory"):
        with_memory(found, kind, 16, 8)


@pytest.mark.parametrize("kind", ["infini", "delta"])
@pytest.mark.parametrize("per_loop", [False, True])
def test_sizes_are_counted(kind, per_loop: bool) -> None:
    config = replace(CONFIG, memory=kind, memory_per_loop=per_loop)
    model = LoopedTransformer(config)
    assert model.new_cache(1, 99, 3).nbytes == state_bytes(config, 3)
    counts = count(config)
    assert counts.core == sum(p.numel() for p in model.core.parameters())
    assert counts.all == parameter_count(config)
    near, far = (token_flops(config, context) for context in (1000, 1_000_000))
    assert near == far
    assert near.loop > token_flops(replace(config, memory="none"), config.memory_window).loop


def test_a_memory_is_small_beside_the_full_cache() -> None:
    """`nano` at ten loops and 32k tokens: a window of 256 tokens and a memory."""
    nano = ModelConfig(d_ff=512, prelude_layers=0, core_layers=1, coda_layers=0, max_seq_len=32_768)
    small = replace(nano, memory="delta", memory_window=256)
    assert state_bytes(nano, 10) == 167_772_160
    assert state_bytes(nano, 10) / state_bytes(small, 10) > 114


def test_a_new_memory_forgets_nothing_and_reads_by_head() -> None:
    """Drawn like other matrices, its rates would halve the memory with each token."""
    for layer in LoopedTransformer(CONFIG).core:
        memory = layer.attention.memory
        assert memory.gate_bias.tolist() == pytest.approx([-3.0, -1.0, 1.0, 3.0])
        assert not memory.gate_weight.any() and not memory.write_weight.any()
        strength, decay = memory._writes(*torch.randn(2, 1, 2, 1000, 8).unbind())
        assert bool((strength == 0.5).all()) and -0.12 < float(decay.sum(-2).min()) <= 0


@pytest.mark.parametrize("build_one", [build_optimizer, build_adamw])
def test_a_memory_learns_at_a_rate_that_moves_its_gates(build_one) -> None:
    model = LoopedTransformer(CONFIG)
    optimizer = build_one(model, TrainConfig(lr=1e-4))
    rates = {id(p): (group["lr"], group["weight_decay"])
             for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = (0.01, 0.0) if ".memory." in name else 1e-4
        found = rates[id(parameter)]
        assert found == expected if ".memory." in name else found[0] == expected


@pytest.mark.parametrize(
    ("seq_len", "block"), [(1, 8), (16, 8), (128, 16), (256, 32), (1024, 64), (100_000, 64)]
)
def test_blocks_fit_the_sequences(seq_len: int, block: int) -> None:
    fitting = fitting_memory(seq_len)
    assert fitting == {"model.memory_window": 2 * block, "model.memory_block": block}


def test_what_training_refuses_and_what_it_says() -> None:
    said: list[str] = []
    check_memory_use(CONFIG, TrainConfig(seq_len=16), said.append)
    assert said == ["memory: not trained, as sequences of 16 tokens fit into its window; give "
                    "`seq_len` 64 or more"]  # fmt: skip
    check_memory_use(CONFIG, TrainConfig(), said.append)
    assert len(said) == 1
    with pytest.raises(UsageError, match="`compile`"):
        check_memory_use(CONFIG, TrainConfig(compile=True), said.append)
    with pytest.raises(UsageError, match="zero3 gathers"):
        check_memory_use(CONFIG, TrainConfig(zero3=True), said.append)


def test_inspection_tells_what_a_memory_brings() -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(CONFIG).eval()
    with torch.no_grad():
        model.core[1].attention.memory.gate_bias.fill_(-torch.inf)
        model.core[1].attention.memory.gate_weight.zero_()
    texts = list(torch.randint(0, 64, (2, 3, 41)))
    found = inspect_memory(model, texts, 3)
    assert found is not None and found["positions"] == [0, 8, 16, 24, 32]
    assert found["gates"][1] == [0.0] * 4
    assert found["gates"][0] == sorted(found["gates"][0]) and found["gates"][0][-1] > 0.8
    assert found["loss"][:2] == found["loss_without"][:2]
    assert all(a != b for a, b in zip(found["loss"][2:], found["loss_without"][2:]))
    [sentence] = memory_sentences(found)
    assert "beyond the window of 16 tokens" in sentence and "the deepest loop wrote" in sentence
    assert inspect_memory(model, [texts[0][:, :16]], 3) is None


def test_speculation_is_refused() -> None:
    engine = Engine(made("delta").float(), text_tokenizer(), SETTINGS)
    with pytest.raises(UsageError, match="can't take back"):
        engine.generate([TEXT], replace(GREEDY, loops=3, speculate=2, draft_loops=1))


@torch.no_grad()
def test_a_long_prompt_takes_no_more_room() -> None:
    """Beyond `max_seq_len`, which is 16 here, and the state does not grow."""
    model = made("delta")
    caches = [model.new_cache(1, length, 2) for length in (20, 200)]
    for cache, length in zip(caches, (20, 200)):
        model(torch.tensor([(IDS * 8)[:length]]), 2, cache)
    assert caches[0].nbytes == caches[1].nbytes > 0
    [found] = Engine(model, text_tokenizer(), SETTINGS).complete([(IDS * 8)[:200]], GREEDY)
    assert len(found.tokens) == GREEDY.max_new_tokens


def test_presets_and_old_models_have_no_memory() -> None:
    assert not [key for key in ModelConfig().to_dict() if "memory" in key or "infini" in key]
    assert "memory" in ModelConfig(memory="delta").to_dict()
    with pytest.raises(UsageError, match="multiple of memory_block"):
        ModelConfig(memory="delta", memory_window=100, memory_block=64)


def test_under_autocast_a_memory_is_added_up_in_float32() -> None:
    torch.manual_seed(0)
    layer = LoopedTransformer(CONFIG).core[0].attention.memory
    keys, values, queries = torch.randn(3, 2, 2, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        entries = keys.to(dtype), values.to(dtype)
        plain = layer.fold(layer.empty(2, dtype=dtype, device="cpu"), *entries)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = layer.fold(layer.empty(2, dtype=dtype, device="cpu"), *entries)
            read = layer.read(queries.repeat(1, 2, 1, 1), mixed)
        assert torch.equal(mixed.matrix, plain.matrix) and read.dtype == torch.float32
        assert torch.equal(read, layer.read(queries.repeat(1, 2, 1, 1), plain))


def test_adapters_train_a_memorys_gates() -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(CONFIG)
    tokens = torch.randint(0, 64, (2, 40))
    before = model(tokens, 2).logits
    peft = attach(model, FinetuneConfig(lora=True))
    torch.testing.assert_close(model(tokens, 2).logits, before)
    learns = {name for name, value in peft.named_parameters() if value.requires_grad}
    assert any("memory" in name and "gate_bias" in name for name in learns)
    model(tokens, 2).logits.square().sum().backward()
    gates = [value.grad for name, value in peft.named_parameters() if "memory" in name and
             value.requires_grad and "gate_bias" in name]  # fmt: skip
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gates)
