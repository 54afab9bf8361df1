"""The compiled kernel makes the model's moves: the same numbers as torch, or it steps aside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from looptx_core.backends.base import Backend
from looptx_core.backends.cpu.backend import CpuBackend
from looptx_core.backends.cpu.bindings import KernelModel
from looptx_core.backends.cpu.rounding import round_weights
from looptx_core.backends.cpu.structs import KernelCache, KernelRows, load_kernel
from looptx_core.backends.select import select_backend
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.model import ModelConfig
from looptx_core.config.rope import RopeScaling
from looptx_core.conversion.ternary import pack_model
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.generation.engine import Engine
from looptx_core.machine import kernels
from looptx_core.model.attention import explicit
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import to_int8
from looptx_core.stopping.calibration import calibrated
from looptx_core.stopping.rule import Exit, ExitSignals, fixed_exit

SMALL = ModelConfig(vocab_size=101, d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=100,
                    prelude_layers=1, core_layers=2, coda_layers=1, max_loops=5)  # fmt: skip


LLAMA3 = RopeScaling("llama3", 8.0, original_max_position_embeddings=16)


def make(config: ModelConfig, seed: int = 0) -> LoopedTransformer:
    """A model whose every parameter matters, norms included."""
    torch.manual_seed(seed)
    model = LoopedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_nothing_beyond_the_tables_is_read() -> None:
    model = make(SMALL)
    kernel = KernelModel(model)
    store = LoopCache(SMALL, 2, 8, 5)
    cache = KernelCache.of(store)
    assert cache is not None
    rows = KernelRows(cache, [0, 1], [0, 0], [0, 0], [0, 0])
    for wrong in (SMALL.vocab_size, -1, 2**40, -(2**40)):
        with pytest.raises(UsageError, match="token id"):
            kernel.embed(torch.tensor([1, wrong]), rows)
    good = kernel.embed(torch.tensor([1, SMALL.vocab_size - 1]), rows)
    assert torch.isfinite(good).all()
    for row, column, start in ([2, 0, 0], [-1, 0, 0], [0, 8, 0], [0, 0, 1], [0, 3, -1]):
        beyond = KernelRows(cache, [0, row], [0, column], [0, start], [0, 0])
        with pytest.raises(UsageError, match="beyond the cache"):
            kernel.logits(good, beyond)
        with pytest.raises(UsageError, match="beyond the cache"):
            kernel.iterate(good, good, [1, 1], beyond)
    with pytest.raises(UsageError, match="loop below 1"):
        kernel.iterate(good, good, [1, 0], rows)
    with pytest.raises(UsageError, match="loop below 1"):
        kernel.confidence(good, [-5, 1])
    assert torch.equal(kernel.embed(torch.tensor([1, SMALL.vocab_size - 1]), rows), good)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_the_engine_refuses_ids_that_the_model_lacks(kernel: str) -> None:
    tokenizer = train_tokenizer(["abcd efgh " * 50], 280)
    model = make(replace(SMALL, vocab_size=280))
    engine = Engine(model, tokenizer, kernel=kernel)
    for wrong in (280, -1, 2**31, 2**62):
        with pytest.raises(DataError, match=f"token id {wrong} is not below 280"):
            engine.complete([[3, wrong]])
    assert engine.complete([[3, 279]], GenerationOptions(max_new_tokens=2, ignore_eos=True))


def differences(
    model: LoopedTransformer, precision: str = "float32", policy: str = "fill"
) -> dict[str, float]:
    """The largest difference of each part, by rows at columns and loops of their own."""
    torch.manual_seed(1)
    kernel, reference = CpuBackend(model, precision), TorchBackend(model)
    prompts = torch.randint(0, model.config.vocab_size, (3, 7))
    found = {}
    with torch.inference_mode():
        both = [LoopCache(model.config, 3, 12, 5, policy=policy) for _ in range(2)]
        for cache in both:
            for row, length in enumerate((3, 7, 5)):  # the same prompts, by torch, in each
                run = reference.begin(cache, [row], length)
                embedding = run.embed(prompts[row : row + 1, :length])
                run.logits(run.iterate(embedding, embedding, [1], 5))
                cache.view(length, [row]).advance()
        tokens, loops = torch.randint(0, model.config.vocab_size, (3, 2)), [1, 3, 2]
        results = []
        for backend, cache in zip((kernel, reference), both):
            run = backend.begin(cache, [2, 0, 1], 2)
            start = run.embed(tokens)
            state = run.iterate(start, start.flip(0), loops, 2)
            logits = run.logits(state)
            confidence = torch.tensor(run.confidence(state[:, :1], [4, 5, 1]))
            run.backfill(state, start, [1, 4, 3])
            keys, values = (
                torch.cat([getattr(layer, name) for layer in cache.layers])
                for name in ("keys", "values")
            )
            results.append((start, state, logits, confidence, keys, values))
    for name, ours, theirs in zip(("start", "state", "logits", "confidence", "k", "v"), *results):
        found[name] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"injection": "add", "activation": "silu"},
        {"injection": "none", "qk_norm": False, "tie_embeddings": False},
        {"injection": "norm", "prelude_layers": 0},
        {"injection": "bridge", "qkv_bias": True, "scaled_rope": LLAMA3},
        {"injection": "half_steps", "gain_width": 5, "confidence_width": 7},
        {"prelude_layers": 0, "coda_layers": 0, "core_layers": 1},
        {"d_model": 37, "d_ff": 53, "head_dim": 6, "n_kv_heads": 4, "vocab_size": 97},
        {"d_model": 256, "d_ff": 512, "head_dim": 64},
    ],
)
def test_float32_moves_are_torchs(changes: dict) -> None:
    for policy in ("fill", "last"):
        found = differences(make(replace(SMALL, **changes)), policy=policy)
        assert max(found.values()) < 1e-5


@pytest.mark.parametrize(("precision", "tiles"), [("bf16", 1), ("bf16", 0), ("int8", 0)])
def test_rounded_weights_are_the_rounded_models(precision: str, tiles: int, monkeypatch) -> None:
    """Beside 8-bit weights activations are rounded too, to some 15 bits."""
    if not tiles:  # as on a processor that has none
        monkeypatch.setattr(load_kernel(), "looptx_has_tiles", lambda: 0)
    bound = 1e-3 if precision == "int8" else 1e-5
    odd, even = {"d_model": 37, "d_ff": 53, "head_dim": 6}, {"d_model": 256, "d_ff": 512}
    for changes in ({}, {"injection": "bridge"}, odd, even):
        model, plain = (make(replace(SMALL, **changes)) for _ in range(2))
        round_weights(model, precision)
        assert max(differences(model, precision).values()) < bound
        moved = [(a - b).abs().max() for a, b in zip(model.parameters(), plain.parameters())]
        assert max(moved) > 1e-4, "rounding must have changed something"


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("changes", [{"d_model": 37, "d_ff": 53}, {"d_model": 256, "d_ff": 512}])
def test_rows_do_not_depend_on_their_batch(changes: dict, precision: str) -> None:
    """Bit for bit, whatever the sizes of the tiles."""
    config = replace(SMALL, **changes)
    kernel = KernelModel(make(config), precision, threads=1)
    states = torch.randn(17, config.d_model)

    def logits(chosen: range) -> torch.Tensor:
        count = len(chosen)
        store = LoopCache(config, count, 4, 1)
        cache = KernelCache.of(store)
        assert cache is not None
        rows = KernelRows(cache, range(count), [0] * count, [0] * count, [0] * count)
        return kernel.logits(states[list(chosen)], rows)

    alone = torch.cat([logits(range(n, n + 1)) for n in range(17)])
    for count in (2, 3, 4, 5, 6, 7, 9, 16, 17):
        assert torch.equal(logits(range(count)), alone[:count]), count


def test_stored_int8_moves_are_torchs() -> None:
    for changes in ({}, {"d_model": 37, "d_ff": 53, "head_dim": 6, "tie_embeddings": False}):
        model = to_int8(make(replace(SMALL, **changes)))
        assert max(differences(model).values()) < 1e-3
        assert CpuBackend(model).draft_kernel is not None


@pytest.mark.parametrize("changes", [{}, {"d_model": 256, "d_ff": 512, "head_dim": 64}])
def test_ternary_moves_are_torchs(changes: dict) -> None:
    """Both multiply whole numbers; a rounding that falls the other way is a step of 1/127."""
    # Of this seed no input stands so near an edge that the number of threads tells.
    model = pack_model(make(replace(SMALL, linear="ternary", **changes), seed=2))
    assert max(differences(model).values()) < 2e-2
    assert sorted(differences(model).values())[2] < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_helpers_beyond_the_cores_change_nothing(precision: str) -> None:
    model = make(replace(SMALL, d_model=256, d_ff=512))
    cache = [LoopCache(model.config, 1, 40, 5) for _ in range(2)]
    found = []
    with torch.inference_mode():
        for own, threads in zip(cache, (1, 7)):
            backend = CpuBackend(model)
            backend.kernel = KernelModel(model, precision, threads=threads)
            tokens, logits = torch.tensor([[3]]), []
            for _ in range(40):
                run = backend.begin(own)
                start = run.embed(tokens)
                state = run.iterate(start, start, [1], 5)
                logits.append(run.logits(state)[0, 0])
                tokens = logits[-1].argmax().view(1, 1)
                own.view(1).advance()
            found.append(torch.stack(logits))
    assert torch.equal(found[0], found[1])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the whale and the sea and the ship " * 40], 280)


@pytest.mark.parametrize("loops", [1, 4, "auto"])
def test_the_engine_says_the_same_by_both(tokenizer, loops) -> None:
    model = make(replace(SMALL, vocab_size=tokenizer.get_vocab_size()))
    options = GenerationOptions(loops=loops, temperature=0, max_new_tokens=20, ignore_eos=True)
    prompts, said = ["the whale", "sea", "and the ship and"], []
    for kernel in ("native", "torch"):
        engine = Engine(model, tokenizer, kernel=kernel)
        assert engine.kernel.startswith(kernel)
        said.append(engine.complete(prompts, options))
    for ours, theirs in zip(*said):
        assert [(t.id, t.loops) for t in ours.tokens] == [(t.id, t.loops) for t in theirs.tokens]
        for a, b in zip(ours.tokens, theirs.tokens):
            assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_no_gain_is_predicted_beyond_what_a_token_can_lose(tokenizer, kernel: str) -> None:
    """A calibration that goes astray predicts e^20 nats; e^10, the bound, are below 30,000."""
    model = make(replace(SMALL, vocab_size=tokenizer.get_vocab_size()))
    astray = ExitSettings(
        rule="gain", gain=30_000, gain_slope=(0.0,), gain_power=(0.0,), gain_offset=(20.0,)
    )
    options = GenerationOptions(temperature=0, max_new_tokens=6, ignore_eos=True)
    for settings, loops in (astray, 1), (replace(astray, gain=20_000), 5):
        (said,) = Engine(model, tokenizer, settings, kernel=kernel).complete(["sea"], options)
        assert [token.loops for token in said.tokens[1:]] == [loops] * 5


def test_it_steps_aside_and_says_why() -> None:
    model = make(SMALL)
    for shape, why in (
        ({"injection": "streams"}, "several streams"),
        ({"norm_position": "both"}, "norms stand after"),
        ({"local_attention": LocalAttention(8)}, "within a window"),
        ({"activation": "gelu_tanh"}, "gelu by tanh"),
    ):
        with pytest.raises(MissingError, match=why):
            select_backend(make(replace(SMALL, **shape)), "native")
    assert isinstance(select_backend(model)[0], CpuBackend)
    for change, why in (
        (lambda m: m.double(), "float64"),
        (lambda m: setattr(m, "attend", explicit), "attention"),
        (lambda m: setattr(m, "enter_loop", lambda loop: None), "each loop"),
    ):
        other = make(SMALL)
        change(other)
        backend, reason = select_backend(other)
        assert not isinstance(backend, CpuBackend)
        assert why in reason
        with pytest.raises(MissingError, match=why):
            select_backend(other, "native")
    with pytest.raises(UsageError, match="`kernel` fast"):
        select_backend(model, "fast")
    with pytest.raises(UsageError, match="`precision` fp4"):
        select_backend(model, "auto", "fp4")


def same_bits(one: LoopedTransformer, other: LoopedTransformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_engine_leaves_the_callers_weights_as_they_are(precision: str, tokenizer) -> None:
    model, plain = make(SMALL), make(SMALL)
    engine = Engine(model, tokenizer, kernel="native", precision=precision)
    assert same_bits(model, plain)
    rounded = make(SMALL)
    round_weights(rounded, precision)
    assert same_bits(engine.backend.model, rounded) and not same_bits(rounded, plain)
    # What torch does, as for long prompts, and what the kernel does are of the rounded weights.
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        gap = engine.backend.model(tokens, 3).logits - rounded(tokens, 3).logits
    assert gap.abs().max() < 1e-5
    assert Engine(model, tokenizer).backend.model is model, "no copy where nothing is rounded"


def test_long_prompts_beside_rounded_weights_are_read_in_bf16() -> None:
    """Where the processor has such products; a row's result, of short ones too, is its own."""
    torch.manual_seed(1)
    model = make(replace(SMALL, d_model=256, d_ff=512, head_dim=64, max_seq_len=64))
    round_weights(model, "bf16")
    prompts = torch.randint(0, model.config.vocab_size, (3, 40))
    setting = torch.backends.mkldnn.matmul.fp32_precision

    def states(backend: Backend, rows: list[int], new: int = 40) -> torch.Tensor:
        run = backend.begin(LoopCache(model.config, 3, 40, 5), rows, new)
        return run.iterate(x := run.embed(prompts[rows, :new]), x, [1] * len(rows), 3)

    with torch.inference_mode():
        exact, rounded = TorchBackend(model), CpuBackend(model, "bf16")
        all_rows, one = states(rounded, [0, 1, 2]), states(rounded, [1])
        gap = (all_rows - states(exact, [0, 1, 2])).abs().max()
        short = states(rounded, [0, 1, 2], 16)[1] - states(rounded, [1], 16)[0]
    assert torch.equal(one[0], all_rows[1]) and short.abs().max() < 1e-3
    assert gap < 0.05 * all_rows.abs().max() and bool(gap) == torch.cpu._is_amx_tile_supported()
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


def test_without_a_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.load.cache_clear()
    try:
        backend, reason = select_backend(make(SMALL))
        assert not isinstance(backend, CpuBackend)
        assert "no-such-compiler" in reason
        model, plain = make(SMALL), make(SMALL)
        with pytest.raises(MissingError, match="no-such-compiler"):
            select_backend(model, precision="int8")
        assert same_bits(model, plain)
        (tmp_path / "broken.sh").write_text("#!/bin/sh\necho 'x: error: it broke' >&2\nexit 1\n")
        (tmp_path / "broken.sh").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "broken.sh"))
        assert "it broke" in select_backend(make(SMALL))[1]
        assert not list(tmp_path.rglob("*.so")), "nothing half made is left"
    finally:
        kernels.load.cache_clear()


@torch.inference_mode()
def test_rows_are_let_go_by_the_kernel_where_their_exits_say_so() -> None:
    """Rows of many exits, alone and together: each run ends where a slow reference does."""
    model, deepest = make(SMALL), 5
    backend, reference = CpuBackend(model), TorchBackend(model)
    tokens = torch.arange(12)[:, None]
    # The head's own words on these states, so that thresholds fall among them.
    cache = LoopCache(model.config, 12, 4, deepest)
    run = reference.begin(cache)
    state = embedding = run.embed(tokens)
    said = []
    for loop in range(1, deepest + 1):
        before, state = state, run.iterate(state, embedding, [loop] * 12)
        change = (state - before).norm(dim=-1) / state.norm(dim=-1)
        said.append([(*w, float(c)) for w, c in zip(run.confidence(state, [loop]), change)])
    words = torch.tensor(said)  # (loops, rows, 3)
    plain = ExitSettings(temperature=2.0, confidence_offset=0.3)
    half = float(torch.sigmoid(words[..., 0].median() / 2))
    settings = [
        replace(plain, confidence=half, gain=-1e9),
        replace(plain, confidence=2.0, gain=float(words[..., 1].median()) + 1e-3),
        replace(plain, confidence=0.0),
        replace(plain, confidence=1.0, gain=-1e9),
    ]
    fit = {"gain_slope": (2.0, 1.5, 1.0, 0.5), "gain_power": (0.5, 1.0, 1.5, 0.0),
           "gain_offset": (0.1, -0.1, 0.2, 0.0)}  # fmt: skip
    nats = torch.stack([calibrated(*w.T, loop, ExitSettings(**fit))[1]
                        for loop, w in enumerate(words, start=1)])  # fmt: skip
    settings += [
        replace(settings[0], **fit),
        replace(settings[1], gain=float(nats.median()) + 1e-3, **fit),
    ]

    def depth(row: int, leave: Exit) -> int:
        """Where this row's exit lets it go."""
        for loop in range(1, deepest + 1):
            read = calibrated(*map(float, words[loop - 1, row]), loop, leave.settings)
            if leave.stops(loop, ExitSignals(*read)):
                return loop
        raise AssertionError("no exit")

    for own in settings:
        exits = [
            *(Exit(least, deepest, own, rule) for least in (1, 3)
              for rule in ("auto", "confidence", "gain")),
            Exit(4, 3, own, "auto"), fixed_exit(2, own),
        ]  # fmt: skip

        for n, leave in enumerate(exits):
            mixed = [exits[(n + row) % len(exits)] for row in range(12)]
            first = min(depth(row, one) for row, one in enumerate(mixed))
            for rows, each in ((range(12), mixed), ([n], [leave])):
                cache = LoopCache(model.config, 12, 4, deepest)
                run = backend.begin(cache, rows)
                start = run.embed(tokens[list(rows)])
                result = run.until_exit(start, start, [1] * len(each), each)
                assert result.loops_run == (first if len(each) > 1 else depth(n, leave))
                close = torch.tensor(result.outputs) - words[result.loops_run - 1, list(rows)]
                if not any("gain" in one.signals for one in each):
                    close[:, 1] = 0  # which nobody asked for
                assert close.abs().max() < 1e-4
