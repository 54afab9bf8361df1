"""Models with a memory: blocks, windows and what is folded, against a slow and explicit reference.

The reference runs pass by pass and token by token, with a loop over heads, and knows nothing of
rings, chunks or triangular systems.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables, rotate
from looptx_core.training import objective
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

BLOCK, WINDOW = 4, 8
SHAPE = {"vocab_size": 280, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24,
         "prelude_layers": 1, "core_layers": 2, "coda_layers": 1, "max_loops": 3, "max_seq_len": 16,
         "memory_window": WINDOW, "memory_block": BLOCK}  # fmt: skip
KINDS = {
    "infini": {"memory": "infini"},
    "infini with delta": {"memory": "infini", "infini_delta": True},
    "delta": {"memory": "delta"},
    "delta by loop": {"memory": "delta", "memory_per_loop": True},
    "window of one block": {"memory": "delta", "memory_window": BLOCK},
}
SETTINGS = ExitSettings(confidence=0.4, gain=0.05, kl=1.5, entropy=2.0, maxprob=0.5)
GREEDY = GenerationOptions(temperature=0.0, max_new_tokens=14, ignore_eos=True)
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money"


def made(kind: str, **changes) -> LoopedTransformer:
    """A model with random weights that all matter."""
    torch.manual_seed(0)
    model = LoopedTransformer(ModelConfig(**{**SHAPE, **KINDS[kind], **changes})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if ".memory." in name else 0.3
            parameter.add_(torch.randn_like(parameter) * scale)
            if name.endswith("write_bias"):  # half of the tokens make it forget
                parameter[1] = torch.randn(2)
        model.confidence.out.bias.zero_()
    return model


class Reference:
    """One text through one model, pass by pass.

    `passes` are lists of (token, loops); the tokens of a pass run their loops together, as those
    of a prompt's block do. policy: as in `looptx_core.model.layer_state`.
    """

    def __init__(self, model: LoopedTransformer, policy: str = "fill") -> None:
        self.model, self.config, self.policy = model, model.config, policy
        self.deepest = self.config.max_loops
        self.columns = 0
        self.parts = {"prelude": {}, "core": {}, "coda": {}}  # (layer, loop): column: (k, v)
        self.memories: dict[tuple[int, int], list[Tensor | None]] = {}

    def run(self, tokens: list[int], loops: list[int]) -> Tensor:
        """The logits of each token of a pass, (tokens, vocab)."""
        first = self.columns
        self.here = range(first, first + len(tokens))
        if first % self.config.memory_block == 0:
            self._fold(first // self.config.memory_block)
        model, x = self.model, self.model.embedding(torch.tensor(tokens))
        for layer, block in enumerate(model.prelude):
            x = self._block(block, x, self.here, "prelude", layer, 1)
        embedding, state = x, x.clone()
        for loop in range(1, max(loops) + 1):
            assert len(set(loops)) == 1 or len(loops) == 1
            x = model.injection(state[None], embedding[None], loop)[0]
            for layer, block in enumerate(model.core):
                x = self._block(block, x, self.here, "core", layer, loop)
            state = x
        self._backfill(state, embedding, loops[0])
        for layer, block in enumerate(model.coda):
            x = self._block(block, x, self.here, "coda", layer, 1)
        self.columns += len(tokens)
        return model.head(model.norm(x))

    def _slot(self, loop: int) -> int:
        return loop if self.policy == "fill" else 1

    def _block(self, block, x, columns, part: str, layer: int, loop: int) -> Tensor:
        attention, normed = block.attention, block.attention_norm(x)
        queries, keys, values = (
            linear(normed).view(len(x), -1, self.config.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = (self._turn(norm, part_, columns) for norm, part_ in
                         ((attention.q_norm, queries), (attention.k_norm, keys)))  # fmt: skip
        store = self.parts[part].setdefault((layer, self._slot(loop)), {})
        for number, column in enumerate(columns):
            store[column] = keys[number], values[number]
        group = self.config.n_heads // self.config.n_kv_heads
        out = torch.zeros(len(x), self.config.n_heads, self.config.head_dim).double()
        for number, column in enumerate(columns):
            blocks = self.config.memory_window // self.config.memory_block
            oldest = (column // self.config.memory_block - blocks + 1) * self.config.memory_block
            seen = [c for c in sorted(store) if max(0, oldest) <= c <= column]
            for head in range(self.config.n_heads):
                kv = head // group
                scores = torch.stack([queries[number, head] @ store[c][0][kv] for c in seen])
                weights = (scores / self.config.head_dim**0.5).softmax(0)
                local = sum(w * store[c][1][kv] for w, c in zip(weights, seen))
                if part == "core":
                    local = self._mix(attention, normed[number], queries[number, head], column,
                                      layer, loop, head, local)  # fmt: skip
                out[number, head] = local
        x = x + attention.o_proj(out.flatten(1))
        return x + block.mlp(block.mlp_norm(x))

    def _tables(self, columns, sign: int = 1):
        positions = torch.tensor(list(columns))[None, None]
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta,
                                 torch.float64, far=True)  # fmt: skip
        return cos, sign * sin

    def _turn(self, norm, x: Tensor, columns) -> Tensor:
        return norm(x[None], self._tables(columns))[0]

    def _back(self, x: Tensor, column: int) -> Tensor:
        """A head's query or key without RoPE, (head_dim,)."""
        return rotate(x[None, None, None], self._tables([column], -1))[0, 0, 0]

    def _mix(self, attention, x, query, column, layer, loop, head, local) -> Tensor:
        own = self._slot(loop) if self.config.memory_per_loop else 0
        memory = self.memories.get((layer, own))
        if memory is None:
            return local
        part = attention.memory
        kv = head // (self.config.n_heads // self.config.n_kv_heads)
        plain = self._back(query, column)
        matrix, norm = memory[kv]
        if self.config.memory == "delta":
            read = matrix.T @ (plain / plain.norm())
            gate = torch.sigmoid(part.gate_weight[head] @ x + part.gate_bias[head])
        else:
            feature = F.elu(plain) + 1
            read, gate = matrix.T @ feature / (feature @ norm), part.gate_bias[head].sigmoid()
        return gate * read + (1 - gate) * local

    def _backfill(self, state: Tensor, embedding: Tensor, loop: int) -> None:
        """What exits leave for deeper loops."""
        if loop >= self.deepest:
            return
        block = self.model.core[0]
        x = block.attention_norm(self.model.injection(state[None], embedding[None], loop + 1))[0]
        keys, values = (linear(x).view(len(x), -1, self.config.head_dim)
                        for linear in (block.attention.k_proj, block.attention.v_proj))  # fmt: skip
        keys = self._turn(block.attention.k_norm, keys, self.here)
        deeper = range(loop + 1, self.deepest + 1) if self.policy == "fill" else [1]
        for layer in range(self.config.core_layers):
            last = self.parts["core"][layer, self._slot(loop)]
            for other in deeper:
                store = self.parts["core"].setdefault((layer, other), {})
                for number, column in enumerate(self.here):
                    own = (keys[number], values[number]) if layer == 0 else last[column]
                    store[column] = own

    def _fold(self, block: int) -> None:
        """Fold the block that leaves the window as this one begins, token by token."""
        size = self.config.memory_block
        leaving = block - self.config.memory_window // size
        if leaving < 0:
            return
        slots = range(1, self._slot(self.deepest) + 1)
        for layer, core in enumerate(self.model.core):
            part = core.attention.memory
            for own in slots if self.config.memory_per_loop else [0]:
                store = self.parts["core"][layer, own or max(slots)]
                memory = self.memories.setdefault((layer, own), [
                    (torch.zeros(self.config.head_dim, self.config.head_dim).double(),
                     torch.zeros(self.config.head_dim).double())
                    for _ in range(self.config.n_kv_heads)])  # fmt: skip
                for kv in range(self.config.n_kv_heads):
                    entries = [(self._back(store[c][0][kv], c), store[c][1][kv])
                               for c in range(leaving * size, (leaving + 1) * size)]  # fmt: skip
                    memory[kv] = self._written(part, kv, *memory[kv], entries)

    def _written(self, part, kv: int, matrix, norm, entries):
        if self.config.memory == "delta":
            for key, value in entries:
                both = torch.cat([key, value])
                b = torch.sigmoid(part.write_weight[0, kv] @ both + part.write_bias[0, kv])
                decay = F.softplus(part.write_weight[1, kv] @ both + part.write_bias[1, kv])
                matrix = (-(decay - 1e-3).clamp(min=0)).exp() * matrix
                unit = key / key.norm()
                matrix = matrix + b * unit[:, None] * (value - matrix.T @ unit)[None]
            return matrix, norm
        old = matrix.clone(), norm.clone()
        for key, value in entries:
            feature = F.elu(key) + 1
            if self.config.infini_delta and float(old[1].sum()) > 0:
                value = value - old[0].T @ feature / (feature @ old[1])
            matrix, norm = matrix + feature[:, None] * value[None], norm + feature
        return matrix, norm


def blocks_of(ids: list[int], size: int = BLOCK) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


IDS = torch.randint(0, 280, (27,), generator=torch.Generator().manual_seed(1)).tolist()


OTHERS = [(kind, 2) for kind in KINDS if kind != "delta"]


@pytest.mark.parametrize(("kind", "loops"), [("delta", 1), ("delta", 3), *OTHERS])
@torch.no_grad()
def test_whole_rows_prompts_and_decoding_are_the_reference(kind: str, loops: int) -> None:
    model = made(kind)
    reference = Reference(model)
    reference.deepest = loops
    want = torch.cat([reference.run(part, [loops] * len(part)) for part in blocks_of(IDS)])
    tokens = torch.tensor([IDS])
    torch.testing.assert_close(model(tokens, loops).logits[0], want, rtol=0, atol=1e-9)
    cache = model.new_cache(1, 64, loops)
    prompt = model(tokens[:, :13], loops, cache).logits
    one_by_one = [model(tokens[:, [i]], loops, cache).logits for i in range(13, len(IDS))]
    found = torch.cat([prompt, *one_by_one], 1)[0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_the_past_beyond_the_window_matters() -> None:
    """Else the test above would say nothing of the memory."""
    model = made("delta")
    other = [(IDS[0] + 1) % 280, *IDS[1:]]
    with torch.no_grad():
        one, two = (model(torch.tensor([ids]), 3).logits[0, -1] for ids in (IDS, other))
    assert float((one - two).abs().max()) > 1e-6


@cache
def text_tokenizer() -> Tokenizer:
    return train_tokenizer(
        [TEXT, TEXT + " in my purse, and nothing particular to interest me"], 276
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer()


@pytest.mark.parametrize("policy", ["fill", "last"])
@pytest.mark.parametrize("kind", ["infini", "delta", "delta by loop"])
@torch.no_grad()
def test_exits_leave_what_the_reference_folds(kind: str, policy: str, tokenizer) -> None:
    model = made(kind)
    engine = Engine(model, tokenizer, SETTINGS)
    prompt = tokenizer.encode(TEXT).ids[:11]
    options = replace(GREEDY, exit="confidence", kv_policy=policy, max_new_tokens=20)
    [found] = engine.complete([prompt], options)
    assert len({step.loops for step in found.tokens}) >= 2, "the case is too easy"
    reference = Reference(model, policy)
    for part in blocks_of(prompt):
        logits = reference.run(part, [model.config.max_loops] * len(part))[-1]
    for step, after in zip(found.tokens, [*found.tokens[1:], None]):
        logs = logits.log_softmax(-1)
        assert step.id == logs.argmax()
        assert step.logprob == pytest.approx(float(logs.max()), abs=1e-9)
        if after is not None:
            logits = reference.run([step.id], [after.loops])[0]


@pytest.mark.parametrize("policy", ["fill", "last"])
def test_a_batch_equals_single_runs(policy: str, tokenizer) -> None:
    """Prompts of different lengths on three rows, which are used again."""
    engine = Engine(made("delta"), tokenizer, SETTINGS, batch_size=3)
    prompts = [TEXT[:n] for n in (4, 31, 9, 60)]
    options = replace(GREEDY, exit="confidence", kv_policy=policy)
    for prompt, one in zip(prompts, engine.complete(prompts, options)):
        [alone] = engine.complete([prompt], options)
        assert [(s.id, s.loops) for s in one.tokens] == [(s.id, s.loops) for s in alone.tokens]
        assert [s.logprob for s in one.tokens] == pytest.approx(
            [s.logprob for s in alone.tokens], abs=1e-9
        )


@pytest.mark.parametrize("policy", ["fill", "last"])
def test_a_row_folds_at_its_own_depth(policy: str, tokenizer) -> None:
    """A shallow request beside a deep one, in whose cache it leaves slots empty."""
    engine = Engine(made("delta"), tokenizer, SETTINGS)
    prompt, options = tokenizer.encode(TEXT).ids[:13], replace(GREEDY, kv_policy=policy)
    shallow, deep = (replace(options, loops=loops) for loops in (2, 3))
    [alone] = engine.complete([prompt], shallow)
    found, _ = engine.complete([prompt, prompt], [shallow, deep])
    assert [step.id for step in found.tokens] == [step.id for step in alone.tokens]
    assert [step.logprob for step in found.tokens] == pytest.approx(
        [step.logprob for step in alone.tokens], abs=1e-9
    )


@pytest.mark.parametrize("kind", ["delta", "delta by loop"])
@torch.no_grad()
def test_slots_of_deeper_loops_change_nothing(kind: str) -> None:
    model, tokens = made(kind), torch.tensor([IDS])
    exact, deeper = (model(tokens, 2, model.new_cache(1, 64, loops)).logits for loops in (2, 3))
    torch.testing.assert_close(deeper, exact, rtol=0, atol=1e-12)


@torch.no_grad()
def test_rounded_windows_fold_rounded_entries() -> None:
    """A prompt and the same tokens decoded one by one give the same memory, not the exact one."""
    model, prompt = made("delta"), torch.tensor([IDS])
    found = []
    for kind, parts in (("int8", [prompt]), ("int8", prompt.split(1, 1)), ("float", [prompt])):
        cache = model.new_cache(1, 64, 2, "fill", kind)
        for part in parts:
            model(part, 2, cache)
        found.append(cache.core[0].memory.matrix)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert float((found[0] - found[2]).abs().max()) > 1e-4


@torch.no_grad()
def test_documents_of_a_row_do_not_meet() -> None:
    """The end of one document changes nothing of the next; and the next does remember itself."""
    model = made("delta")
    tokens, documents = torch.tensor([IDS]), torch.tensor([[0] * 10 + [1] * 17])
    ctx = model.context(27, documents=documents)
    changed, later = tokens.clone(), tokens.clone()
    changed[0, 9], later[0, 10] = (tokens[0, 9] + 1) % 280, (tokens[0, 10] + 1) % 280
    runs = [list(model.states(ids, 3, ctx))[-1][0] for ids in (tokens, changed, later)]
    torch.testing.assert_close(runs[0][10:], runs[1][10:], rtol=0, atol=1e-12)
    assert float((runs[0][:10] - runs[1][:10]).abs().max()) > 1e-6
    assert float((runs[0][26] - runs[2][26]).abs().max()) > 1e-6, "beyond the window"


class Depths(LoopSchedule):
    """Given ones."""

    def __init__(self, depths: list[int]) -> None:
        super().__init__(TrainConfig(), 3)
        self.kind, self.given = "sampled", torch.tensor(depths)

    def depths(self, *_) -> Tensor:
        return self.given


@pytest.mark.parametrize("recompute", [False, True])
def test_training_at_mixed_depths_is_each_row_alone(recompute: bool) -> None:
    model = made("delta").train()
    tokens = torch.randint(0, 280, (3, 27), generator=torch.Generator().manual_seed(2))
    ids, depths = torch.arange(3), [2, 3, 1]
    batch = loop_loss(model, tokens, Depths(depths), 0, ids, loss_at="last", recompute=recompute)
    batch.loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(".memory.write_weight" in name for name in together)
    model.zero_grad()
    for row, depth in enumerate(depths):
        logits = model(tokens[[row], :-1], depth).logits[0]
        (F.cross_entropy(logits, tokens[row, 1:]) / 3).backward()
    for name, parameter in model.named_parameters():
        if ".memory." in name or "core" in name:
            torch.testing.assert_close(
                together[name], parameter.grad, rtol=1e-3, atol=1e-7
            )  # losses are float32


def test_loops_that_other_ranks_run_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose rows are done runs one of them on, unread, as deep as the deepest rank."""
    model = made("delta").train()
    tokens = torch.randint(0, 280, (2, 20), generator=torch.Generator().manual_seed(2))

    def loss(deepest: int) -> Tensor:
        monkeypatch.setattr(objective, "max_over_ranks", lambda *_: deepest)
        return loop_loss(model, tokens, Depths([1, 1]), 0, torch.arange(2)).loss

    assert float(loss(3).detach()) == pytest.approx(float(loss(1).detach()), abs=1e-9)


def test_the_rule_by_loss_measures_and_starts_over() -> None:
    model = made("delta").train()
    schedule = LoopSchedule(TrainConfig(loop_schedule="loss"), 3)
    tokens = torch.randint(0, 280, (4, 27), generator=torch.Generator().manual_seed(2))
    found = loop_loss(model, tokens, schedule, 0, torch.arange(4))
    found.loss.backward()
    assert found.mean_loops >= 1 and bool(found.loss.isfinite())
