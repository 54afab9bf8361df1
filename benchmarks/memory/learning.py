"""What the benchmarks of memory share: prose, training on drawn rows, reading without output."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.common.corpora import fetch_sotu
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.run import TrainConfig
from looptx_core.model.block import Block
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer, clip_by_part, learning_rate_factor

KINDS: dict[str, dict[str, Any]] = {
    "delta": {"memory": "delta"},
    "infini": {"memory": "infini"},
    "infini with delta": {"memory": "infini", "infini_delta": True},
    "window alone": {"memory": "infini"},
}
"""Settings of a model's config; `set_gates` makes the last what it is called."""

Draw = Callable[[np.random.Generator, float], tuple[Tensor, Tensor, Tensor]]
"""Tokens to train on, what follows each, and how much that counts, all (rows, length).

Called with the share of the training that is done. A memory learns to find what attention has
learned to find, as they share queries, keys and values: rows that fit into the window come first.
"""

NEAR = 0.25
"""The share of a training in which rows fit into the window."""


@functools.cache
def prose(text: str = "moby dick") -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text by the bundled tokenizer: the first four fifths, and the last one.

    text: moby dick, or speeches, of which every fifth is held out, and those are one text.
    """
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    if text == "moby dick":
        book = (bundled_model().parent / "moby-dick.txt").read_text("utf-8")
        ids = np.array(tokenizer.encode(book, add_special_tokens=False).ids)
        return ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    speeches = [file.read_text("utf-8") for file in sorted(fetch_sotu().glob("*.txt"))]
    parts = [speech for number, speech in enumerate(speeches) if number % 5], speeches[::5]
    whole, held_out = (
        np.concatenate([e.ids for e in tokenizer.encode_batch(part, add_special_tokens=False)])
        for part in parts
    )
    return whole, held_out


def vocabulary() -> int:
    """How many ids `prose` may have."""
    return Tokenizer.from_file(str(bundled_model() / "tokenizer.json")).get_vocab_size()


def cuttings(rng: np.random.Generator, ids: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Stretches of a text, (rows, length) int32, from a place of its own each."""
    starts = rng.integers(len(ids) - length + 1, size=rows)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def set_gates(model: LoopedTransformer, kind: str) -> None:
    """Half open in all heads, as any may have learned to find; shut for good for `window alone`."""
    for block in model.core:
        assert isinstance(block, Block) and block.attention.memory is not None
        gates = block.attention.memory.gate_bias
        if kind == "window alone":
            gates.requires_grad_(False).fill_(-torch.inf)
        else:
            gates.data.zero_()


class Learned(NamedTuple):
    """A model, its loss over the last 50 steps in nats a token, and the CPU seconds of training."""

    model: LoopedTransformer
    loss: float
    seconds: float


def learn(model: LoopedTransformer, draw: Draw, settings: TrainConfig, name: str) -> Learned:
    """Train at the model's own depth on what `draw` gives; each step's loss is the last loop's.

    settings: steps, batch size, learning rate and seed. name: for the lines of progress.
    """
    model.train()
    schedule, optimizer = (
        LoopSchedule(settings, model.config.loops),
        build_optimizer(model, settings),
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings))
    rng = np.random.default_rng((settings.seed, 1))
    began, losses = time.process_time(), []
    for step in range(settings.steps):
        tokens, targets, weights = draw(rng, step / settings.steps)
        loss = loop_loss(
            model, tokens, schedule, step, torch.arange(len(tokens)), targets=targets,
            weights=weights / weights.mean(), loss_at="last",
        )  # fmt: skip
        optimizer.zero_grad()
        (loss.loss + loss.confidence_loss).backward()
        clip_by_part(model, 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(loss.deepest))
        if step % 50 == 49:
            seconds = time.process_time() - began
            print(f"  {name} {step + 1}: {np.mean(losses[-50:]):.3f} nats, {seconds:.0f} s",
                  flush=True)  # fmt: skip
    return Learned(model.eval(), float(np.mean(losses[-50:])), time.process_time() - began)


def kept(
    folder: Path | None, name: str, model: LoopedTransformer, train: Callable[[], Learned]
) -> Learned:
    """`train`, which trains `model`, or what it left in this folder before, under this name."""
    if folder is None:
        return train()
    file = folder / f"{name}.safetensors"
    if not file.exists():
        learned = train()
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"loss": str(learned.loss), "seconds": str(learned.seconds)}
        save_model(learned.model, str(file), facts)
    load_model(model, file)
    with safe_open(file, "pt") as stored:
        facts = stored.metadata()
    return Learned(model.eval(), float(facts["loss"]), float(facts["seconds"]))


def options(**numbers: float) -> argparse.ArgumentParser:
    """What every benchmark here asks for: seeds, each of these numbers, --models and --check."""
    made = argparse.ArgumentParser()
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, default in numbers.items():
        made.add_argument(f"--{name}", type=type(default), default=default)
    made.add_argument("--models", type=Path, help="Keep the trained models in this folder.")
    made.add_argument("--check", action="store_true", help="Three steps, and no record.")
    return made


def settings_in(args: argparse.Namespace, *axes: str) -> dict[str, Any]:
    """What a record says of a whole run: all but the axes that its rows name."""
    kept_out = {"seeds", "models", "check", *axes}
    return {key: value for key, value in vars(args).items() if key not in kept_out}


def settings_of(steps: int, batch: int, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=batch, lr=lr, seed=seed,
                       loop_schedule="fixed", loss_at="last", weight_decay=0.0)  # fmt: skip


@torch.inference_mode()
def read(model: LoopedTransformer, tokens: Tensor, cache: LoopCache, loops: int) -> float:
    """Take in texts, (rows, length), that nothing is asked about; the seconds of CPU time.

    The last block at the last loop only writes its keys and values, as nothing reads its output.
    """
    began = time.process_time()
    cache.deepest = [loops] * len(cache.deepest)
    *blocks, last = model.core
    assert isinstance(last, Block) and not model.coda
    for x, ctx in model.passes(tokens, cache):
        assert ctx.view is not None
        state = start = model.run_prelude(x, ctx)
        for _, after in model.iterate(start, start, ctx, range(1, loops)):
            state = after
        state = model.injection(state, start, loops)
        for layer, block in enumerate(blocks):
            state = block(state, ctx, ctx.view.core(layer, loops))
        ctx.view.core(len(blocks), loops).update(*last.entries(state, ctx), ctx.mask)
        ctx.view.advance()
    return time.process_time() - began
