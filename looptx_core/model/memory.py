"""A layer's memory of what left its window of attention: one matrix for each key and value head.

A text is cut into blocks of `memory_block` tokens, counted in columns of its row. A token attends
exactly to its own block and to the blocks before it that the window still holds (`memory_window`
tokens in all); all earlier blocks are in the memory, which every query reads once:

    output = (1 - gate) * attention + gate * read          gate = sigmoid(...), a head

A query whose memory is empty takes the attention alone.

**Which entries are folded, and when.** A block is folded when the next block that does not fit
into the window begins, after the last token of the block before has run all its loops. Folded are
the keys and values that the cache holds for the deepest loop, thus those of each token's own last
loop (of the loop after it in the first core layer, where an early exit left them; see
`looptx_core.model.layer_state`). So a text is run block by block, all loops of a block before the
next. Training, prompts and decoding follow this one rule. Queries and keys of a memory are without
RoPE. All loops of a layer share its memory, or have one each (`memory_per_loop`).

Two kinds. With q, k, v of a token and M (head_dim, head_dim), keys by values:

- `infini`, Infini-attention (arXiv 2404.07143): s = ELU + 1, read = s(q) M / (s(q) z), and a block
  adds s(k) v^T to M and s(k) to z. With `infini_delta` v is less what M returned for s(k) before
  the block. The gate is one number a head.
- `delta`, a gated delta rule (arXiv 2412.06464) with unit keys, token after token:
  M <- a M + b k (v - a M^T k)^T, read = M^T q with unit q. a (what is kept) and b (what is
  written) follow from k and v, and the gate from the token. Without z a repeated text changes M
  no further, and a is exactly 1 for tokens that need not be forgotten, so that no length of such
  text wears a memory out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.rope import Rotary, rotate

_FREE_DECAY = 1e-3  # decays below this, in nats a token, count as none
_EPS = 1e-6


class Memory(NamedTuple):
    """What some rows remember in one layer.

    matrix: (..., rows, kv_heads, head_dim, head_dim), keys by values. norm: (..., rows, kv_heads,
    head_dim), infini's z; of width 0 for delta. document: (..., rows), the number of the document
    that is remembered, -1 for none. All are float32 at least.
    """

    matrix: Tensor
    norm: Tensor
    document: Tensor

    def rows(self, index: Tensor | slice) -> Memory:
        """Some rows of a memory that has no dimensions before them."""
        return Memory(self.matrix[index], self.norm[index], self.document[index])


class Remembered(NamedTuple):
    """What queries read: a memory, and which of them may, (rows, new or 1), True or False."""

    memory: Memory
    readable: Tensor


class LayerMemory(nn.Module):
    """The memory's parameters in one layer, and its arithmetic.

    `gate_bias` is (n_heads,). Of delta alone: `gate_weight`, (n_heads, d_model), and `write_weight`
    with `write_bias`, (2, kv_heads, 2 * head_dim) and (2, kv_heads), for b and a.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.subtracts = config.memory, config.infini_delta
        self.shape = config.n_kv_heads, config.head_dim
        self.gate_bias = nn.Parameter(torch.empty(config.n_heads))
        if self.kind == "delta":
            self.gate_weight = nn.Parameter(torch.empty(config.n_heads, config.d_model))
            self.write_weight = nn.Parameter(torch.empty(2, self.shape[0], 2 * config.head_dim))
            self.write_bias = nn.Parameter(torch.empty(2, self.shape[0]))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Return to the parameters that training begins with."""
        # Trained heads end at attention, at memory, or between (arXiv 2404.07143, figure 3).
        self.gate_bias.copy_(torch.linspace(-3.0, 3.0, len(self.gate_bias)))
        if self.kind == "delta":
            self.gate_weight.zero_()
            self.write_weight.zero_()
            # b is a half; a is so near 1 that a thousand tokens keep nine tenths.
            self.write_bias.copy_(torch.tensor([[0.0], [-6.81]]).expand_as(self.write_bias))

    @torch.no_grad()
    def close(self) -> None:
        """Nearly shut the gates, as a trained model gets that had no memory."""
        self.gate_bias.fill_(-6.0)
        if self.kind == "delta":
            self.gate_weight.zero_()

    def empty(self, *rows: int, dtype: torch.dtype, device: torch.device | str) -> Memory:
        """A memory of nothing. rows: the dimensions before the heads."""
        heads, width = self.shape
        wide = torch.promote_types(dtype, torch.float32)
        norm = width if self.kind == "infini" else 0
        return Memory(
            torch.zeros(*rows, heads, width, width, dtype=wide, device=device),
            torch.zeros(*rows, heads, norm, dtype=wide, device=device),
            torch.full(rows, -1, device=device),
        )

    def gates(self, x: Tensor) -> Tensor:
        """Each head's share of the memory, (rows, heads, new, 1). x: (rows, new, d_model), the
        attention's input."""
        if self.kind == "infini":
            return self.gate_bias.sigmoid()[None, :, None, None]
        logits = F.linear(x, self.gate_weight.to(x.dtype), self.gate_bias.to(x.dtype))
        return logits.sigmoid().transpose(1, 2)[..., None]

    def forward(self, attended: Tensor, x: Tensor, queries: Tensor, past: Remembered) -> Tensor:
        """Mix attention and memory.

        attended: attention's output, (rows, heads, new, head_dim), and so is the result. x: see
        `gates`. queries: as attended, without RoPE.
        """
        read = self.read(queries, past.memory).to(attended.dtype)
        gates = self.gates(x) * past.readable[:, None, :, None]
        return torch.lerp(attended, read, gates.to(attended.dtype).expand_as(attended))

    def read(self, queries: Tensor, memory: Memory) -> Tensor:
        """What the memory returns, (rows, heads, new, head_dim); queries as in `forward`."""
        with torch.autocast(queries.device.type, enabled=False):
            return self._read(queries, memory)

    def _read(self, queries: Tensor, memory: Memory) -> Tensor:
        rows, heads, new, width = queries.shape
        q = self._feature(queries.to(memory.matrix.dtype))
        q = q.reshape(rows, self.shape[0], -1, width)  # heads that share a key head, one after one
        read = q @ memory.matrix
        if self.kind == "infini":
            read = read / (q @ memory.norm[..., None]).clamp(min=_EPS)
        return read.view(rows, heads, new, width)

    def fold(
        self, memory: Memory, keys: Tensor, values: Tensor, documents: Tensor | None = None
    ) -> Memory:
        """The memory after one block.

        keys, values: (rows, kv_heads, tokens, head_dim), keys without RoPE. documents: (rows,
        tokens), numbers; only the last token's document is remembered. None: all are one.
        """
        # What is added up over a whole text is float32, also where products are bfloat16.
        with torch.autocast(keys.device.type, enabled=False):
            return self._fold(memory, keys, values, documents)

    def _fold(
        self, memory: Memory, keys: Tensor, values: Tensor, documents: Tensor | None
    ) -> Memory:
        keys, values = keys.to(memory.matrix.dtype), values.to(memory.matrix.dtype)
        if documents is None:
            document, kept = torch.zeros_like(memory.document), None
        else:
            document = documents[:, -1].expand_as(memory.document)
            kept = (documents == documents[:, -1:])[:, None, :, None]
            goes_on = (memory.document == document)[:, None, None]
            memory = Memory(memory.matrix * goes_on[..., None], memory.norm * goes_on, document)
        k = self._feature(keys)
        if self.kind == "delta":
            return Memory(self._delta(memory.matrix, keys, k, values, kept), memory.norm, document)
        if kept is not None:
            k = k * kept
        if self.subtracts:
            # An empty memory has returned nothing.
            values = values - k @ memory.matrix / (k @ memory.norm[..., None]).clamp(min=_EPS)
        return Memory(memory.matrix + k.mT @ values, memory.norm + k.sum(-2), document)

    def _delta(
        self, matrix: Tensor, keys: Tensor, unit: Tensor, values: Tensor, kept: Tensor | None
    ) -> Tensor:
        """The delta rule over a block at once, by a triangular system (arXiv 2406.06484).

        With g the product of a up to a token, its update u = b (v - a M^T k) solves
        u_t + sum over i < t of b_t (g_t / g_i) (k_t . k_i) u_i = b_t (v_t - g_t M^T k_t).
        """
        written, decayed = self._writes(keys, values)
        if kept is not None:
            written, decayed = written * kept, decayed * kept
        log_g = decayed.cumsum(-2)
        between = (log_g - log_g.mT).tril().exp()
        system = (written * between * (unit @ unit.mT)).tril(-1)
        wanted = written * (values - log_g.exp() * (unit @ matrix))
        updates = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        last = log_g[..., -1:, :]
        return last.exp() * matrix + (unit * (last - log_g).exp()).mT @ updates

    def _writes(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """b, and the logarithm of a, of each token, (rows, kv_heads, tokens, 1)."""
        weight = self.write_weight.to(keys.dtype)
        by_head = torch.einsum("rhtd,nhd->nrht", torch.cat([keys, values], -1), weight)
        strength, decay = by_head + self.write_bias.to(keys.dtype)[:, None, :, None]
        free = (F.softplus(decay) - _FREE_DECAY).relu()
        return strength.sigmoid()[..., None], -free[..., None]

    def _feature(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=_EPS) if self.kind == "delta" else F.elu(x) + 1


def without_rope(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys, (batch, length, heads, head_dim), back from their positions."""
    cos, sin = rotary
    return rotate(x, (cos, -sin))


def window_mask(
    length: int, config: ModelConfig, device: torch.device, documents: Tensor | None,
    groups: Tensor | None,
) -> Tensor:  # fmt: skip
    """What each token of whole rows attends to exactly, (rows or 1, 1, length, length).

    documents, groups: (rows, length), numbers; a token attends within its document, and both ways
    within a group as far as its own block goes.
    """
    column = torch.arange(length, device=device)
    block = column // config.memory_block
    behind = block[:, None] - block
    held = behind < config.memory_window // config.memory_block
    mask = ((column[:, None] >= column) & held)[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    if groups is not None:
        same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, None, :]
        mask = mask | (same & (behind == 0))[:, None]
    return mask
