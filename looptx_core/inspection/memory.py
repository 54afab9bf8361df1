"""What a model's memory is good for: its gates, and the loss beyond the window with and without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from looptx_core.model.block import Block
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.memory import LayerMemory
from looptx_core.training.evaluate import evaluate_loops


def memories(model: LoopedTransformer) -> list[LayerMemory]:
    """Of the core's layers."""
    found = [block.attention.memory for block in model.core if isinstance(block, Block)]
    return [memory for memory in found if memory is not None]


def inspect_memory(
    model: LoopedTransformer, texts: Iterable[Tensor], loops: int
) -> dict[str, Any] | None:
    """JSON values; None for a model without a memory, or where no text is longer than its window.

    texts: batches of ids, (rows, length + 1), all of one length.

    `gates`: for each core layer each head's mean share of what it takes from the memory, over
    loops and tokens that may read. `positions`, `loss` and `loss_without`: by block of a sequence,
    its first position and the mean loss after the last loop, with the memory and without.
    `beyond` and `beyond_without`: these losses over all tokens that may read.
    """
    config = model.config
    if not config.has_memory:
        return None
    given = list(texts)
    length = given[0].shape[1] - 1
    if length <= config.memory_window:
        return None
    with _gates(model) as gates:
        loss = _by_position(model, given, loops)
    with _without(model):
        without = _by_position(model, given, loops)
    starts = list(range(0, length, config.memory_block))

    def by_block(values: Tensor) -> list[float]:
        return [float(values[at : at + config.memory_block].mean()) for at in starts]

    return {
        "kind": config.memory,
        "window": config.memory_window,
        "gates": [(total / count).tolist() for total, count in gates],
        "positions": starts,
        "loss": by_block(loss),
        "loss_without": by_block(without),
        "beyond": float(loss[config.memory_window :].mean()),
        "beyond_without": float(without[config.memory_window :].mean()),
    }


def _by_position(model: LoopedTransformer, texts: list[Tensor], loops: int) -> Tensor:
    """The mean loss after the last loop at each position, (length,)."""
    parts = [
        evaluate_loops(model, tokens, loops).token_loss[-1].view(len(tokens), -1)
        for tokens in texts
    ]
    return torch.cat(parts).double().mean(0)


@contextmanager
def _gates(model: LoopedTransformer) -> Iterator[list[list[Tensor]]]:
    """Within, sums up each layer's gates of tokens that may read: [(heads,), how many]."""
    sums = [[torch.zeros(model.config.n_heads).double(), torch.zeros(())] for _ in model.core]

    def watch(at: list[Tensor]) -> Any:
        def see(part: nn.Module, given: tuple[Any, ...]) -> None:
            attended, x, _, past = given
            assert isinstance(part, LayerMemory)
            readable = past.readable[:, None, :, None].expand(-1, 1, attended.shape[2], 1)
            shares = part.gates(x).detach() * readable
            at[0] += shares.expand(len(x), -1, x.shape[1], -1).sum((0, 2, 3)).double().cpu()
            at[1] += float(readable.sum())

        return see

    hooks = [part.register_forward_pre_hook(watch(at)) for part, at in zip(memories(model), sums)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without(model: LoopedTransformer) -> Iterator[None]:
    """Within, attention's output stays as it is, and no memory is mixed in."""
    hooks = [part.register_forward_hook(lambda _, given, out: given[0]) for part in memories(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def memory_sentences(found: Mapping[str, Any]) -> list[str]:
    """What it comes to, in words."""
    gates = [gate for layer in found["gates"] for gate in layer]
    gain = 1 - found["beyond"] / found["beyond_without"]
    return [
        f"The {found['kind']} memory: heads take {min(gates):.0%} to {max(gates):.0%} from it; "
        f"beyond the window of {found['window']} tokens the loss is {found['beyond']:.3f} with it "
        f"and {found['beyond_without']:.3f} without it ({-gain:+.1%}). Figures by loop are of "
        "texts whose memory the deepest loop wrote."
    ]
