"""A second kind of memory, a window of the last tokens, where keys and values of all are the rule.

Nothing but `LoopedTransformer.new_layer_state` is told of it: the engine, batches, exits and
teacher-forced scoring run on it as they are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from looptx_core.config.generation import EXIT_RULES, ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.model.layer_state import Attended, LayerState, StateSpec
from looptx_core.model.loop import LoopedTransformer

WINDOW = 5
CONFIG = ModelConfig(vocab_size=280, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
                     prelude_layers=1, core_layers=2, coda_layers=1, max_loops=4,
                     max_seq_len=64)  # fmt: skip
SETTINGS = ExitSettings(confidence=0.4, gain=0.05, kl=1.5, entropy=2.0, maxprob=0.5)
GREEDY = GenerationOptions(temperature=0.0, max_new_tokens=14, ignore_eos=True)
PROMPTS = ["Call me", "some years ago", "a", "never mind how long precisely", "Ishmael"]


class RingState(LayerState):
    """The keys and values of each row's last tokens, column c in slot c modulo the window.

    It can't be rolled back, as what a new token replaces is gone.
    """

    can_roll_back = False
    capacity = None

    def __init__(self, spec: StateSpec) -> None:
        config = spec.config
        self.depths = spec.loops if spec.policy == "fill" else 1
        self.deepest = spec.loops if spec.policy == "fill" else config.max_loops
        shape = (self.depths, spec.batch, WINDOW, config.n_kv_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=spec.dtype) for _ in range(2))
        # Which column each slot holds; -1: none.
        self.columns = torch.full(shape[:3], -1)

    def _slot(self, loop: int | Tensor, rows: Tensor) -> Tensor:
        return torch.as_tensor(loop).expand(len(rows)).clamp(max=self.depths) - 1

    def _write(self, depth: Tensor, rows: Tensor, columns: Tensor, keys, values) -> None:
        """keys, values: (rows, new, kv_heads, head_dim)."""
        kept = slice(-WINDOW, None)
        columns = columns[:, kept].expand(len(rows), -1)
        at = depth[:, None], rows[:, None], columns % WINDOW
        self.columns[at] = columns
        self.keys[at], self.values[at] = keys[:, kept], values[:, kept]

    def update(self, view, loop, keys, values, mask) -> Attended:
        rows = torch.tensor(view.rows)
        depth, queries = self._slot(loop, rows), view.columns.expand(len(rows), -1)
        old = self.columns[depth, rows]
        # Under `last` the slots hold these very columns, of the loop before.
        old = old.masked_fill(old >= queries[:, :1], -1)
        columns = torch.cat([old, queries], 1)[:, None, None]
        q = queries[:, None, :, None]
        mask = (columns <= q) & (columns > q - WINDOW) & (columns >= 0)
        seen = [
            torch.cat([store[depth, rows], new.transpose(1, 2)], 1).transpose(1, 2)
            for store, new in ((self.keys, keys), (self.values, values))
        ]
        self._write(depth, rows, queries, keys.transpose(1, 2), values.transpose(1, 2))
        return Attended(*seen, mask)

    def needs_backfill(self, loop: int) -> bool:
        return loop < self.deepest

    def backfill(self, view, loop, entries) -> None:
        rows, columns = torch.tensor(view.rows), view.columns.expand(len(view.rows), -1)
        if entries is None:
            if self.depths == 1:
                return
            kept = columns[:, -WINDOW:]
            at = self._slot(loop, rows)[:, None], rows[:, None], kept % WINDOW
            entries, columns = (self.keys[at], self.values[at]), kept
        else:
            entries = tuple(part.transpose(1, 2) for part in entries)
        for depth in range(min(loop, self.depths - 1), self.depths):
            self._write(torch.full((len(rows),), depth), rows, columns, *entries)

    def reset_row(self, row: int) -> None:
        self.columns[:, row] = -1

    def select_rows(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.columns = self.columns[:, rows]

    def roll_back(self, row: int, tokens: int) -> None:
        raise AssertionError("nobody may ask")

    def wipe(self) -> None:
        self.columns.fill_(-1)

    @property
    def bytes_per_token(self) -> int:
        return 0


class WindowedModel(LoopedTransformer):
    def new_layer_state(self, spec: StateSpec) -> LayerState:
        return RingState(spec)


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    model = WindowedModel(CONFIG).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.startswith("confidence") else 0.4
            parameter.add_(torch.randn_like(parameter) * scale)
        model.confidence.out.bias.zero_()
    text = " ".join(PROMPTS) + " nothing particular to interest me on shore"
    return Engine(model, train_tokenizer([text], 280), SETTINGS, batch_size=3)


def whole(model: LoopedTransformer, ids: list[int], loops: int) -> Tensor:
    """Logits of the last token without a cache: attention masked to the window."""
    column = torch.arange(len(ids))
    band = (column[:, None] >= column) & (column > column[:, None] - WINDOW)
    ctx = replace(model.context(len(ids)), mask=band[None, None])
    *_, state = model.states(torch.tensor([ids]), loops, ctx)
    return model.head(model.coda_hidden(state, ctx))[0, -1]


@pytest.mark.parametrize("loops", [1, 3, 4])
@torch.no_grad()
def test_a_fixed_depth_equals_uncached_windows(engine: Engine, loops: int) -> None:
    options = replace(GREEDY, loops=loops, kv_policy="fill")
    for found, prompt in zip(engine.complete(PROMPTS, options), PROMPTS):
        ids = engine.tokenizer.encode(prompt).ids
        for step in found.tokens:
            logs = whole(engine.model, ids, loops).log_softmax(-1)
            assert step.id == logs.argmax()
            assert step.logprob == pytest.approx(float(logs.max()), abs=1e-9)
            ids.append(step.id)
        assert len(ids) > 2 * WINDOW, "the window was never full"


@pytest.mark.parametrize("rule", EXIT_RULES)
@pytest.mark.parametrize("policy", ["fill", "last"])
def test_a_batch_equals_single_runs(engine: Engine, rule: str, policy: str) -> None:
    """Five requests on three rows, so that rows are used again."""
    options = replace(GREEDY, exit=rule, kv_policy=policy)
    depths = set()
    for prompt, one in zip(PROMPTS, engine.complete(PROMPTS, options)):
        [alone] = engine.complete([prompt], options)
        assert [(s.id, s.loops) for s in one.tokens] == [(s.id, s.loops) for s in alone.tokens]
        assert [s.logprob for s in one.tokens] == pytest.approx(
            [s.logprob for s in alone.tokens], abs=1e-9
        )
        depths |= {step.loops for step in one.tokens[1:]}
    assert len(depths) >= 2, "the case is too easy"


def test_teacher_forced_scores_are_those_of_decoding(engine: Engine) -> None:
    [made] = engine.complete(["some years ago"], GREEDY)
    prompt = engine.tokenizer.encode("some years ago").ids
    ids = torch.tensor([prompt + [step.id for step in made.tokens]])
    scores = engine.score_forced(ids, len(prompt), GREEDY)
    assert scores.loops[0].tolist() == [step.loops for step in made.tokens]
    assert (-scores.loss[0]).tolist() == pytest.approx(
        [step.logprob for step in made.tokens], abs=1e-6
    )
    assert bool(scores.hit.all())


def test_speculation_is_refused_in_one_line(engine: Engine) -> None:
    with pytest.raises(UsageError, match="can't take back") as refusal:
        engine.generate(["a"], replace(GREEDY, loops=4, speculate=2, draft_loops=1))
    assert "\n" not in str(refusal.value)


def test_kernels_refuse_it_and_torch_runs(engine: Engine) -> None:
    """In float32 the compiled kernel is chosen for the model, and leaves this memory to torch."""
    model = WindowedModel(CONFIG).eval()
    model.load_state_dict(engine.model.state_dict())
    found = [
        Engine(model, engine.tokenizer, SETTINGS, kernel=kernel).complete(PROMPTS[:2], GREEDY)
        for kernel in ("auto", "torch")
    ]
    for one, other in zip(*found):
        assert [s.id for s in one.tokens] == [s.id for s in other.tokens]
