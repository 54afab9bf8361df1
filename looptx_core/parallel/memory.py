"""What one process of a training run holds in memory, counted before it starts.

Weights, gradients and optimizer follow from the number of parameters and from what ZeRO cuts over
the processes (arXiv 1910.02054). Activations are counted by what autograd keeps of each block,
loop and read-out. Both meet in the backward pass, in which activations go and gradients come, so
the peak is looked for along it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.machine.heap import KEPT_BLOCK
from looptx_core.model.depths import sample_depths
from looptx_core.model.flops import parameter_count

# DeepSpeed's own sizes, in elements.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
UPDATES = 8
"""Parts in which looptx lets ZeRO-3 update."""
_RARE = 0.999  # the batch that is deeper than all but one of a thousand
# C's allocator keeps freed blocks for itself (`freed_memory_kept`), so that on the CPU activations
# and gradients don't take each other's place, and leaves gaps: this share of such gradients, as
# benchmarks/scale/memory_plan.py measures.
_HEAP_GAPS = 0.65
SPARE_BUFFERS = 8  # of weights read from a disk, beside those of the looped ones
_MATRICES = 7  # of a block
_BF16_ACTIVATIONS = 0.72  # of float32's bytes, as autograd keeps them; normalisations stay float32


Kind = Literal["none", "ddp", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class ParallelLayout:
    """How a run lies over processes.

    kind: 'none', 'ddp', 'zero2', 'zero3' or 'fsdp'. world: processes in all; local: on one machine.
    """

    kind: Kind = "none"
    world: int = 1
    local: int = 1

    @staticmethod
    def of(config: RunConfig) -> ParallelLayout:
        """As the settings say."""
        return ParallelLayout(cast(Kind, config.sharding), config.world_size, config.devices)

    @property
    def stage(self) -> int:
        """ZeRO's stage, 0 without it."""
        return {"zero2": 2, "zero3": 3}.get(self.kind, 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by what they are for; each is counted where it is largest."""

    weights: int
    """What the forward pass reads: all of them, or this process's share."""
    masters: int
    """ZeRO's copies in float32 that the optimizer changes."""
    moments: int
    """AdamW's two numbers a weight, or Muon's one."""
    gradients: int
    buffers: int
    """Whole weights in use, gradients on their way, weights in bf16."""
    activations: int
    overlap: int
    """Negative for activations that are gone before the last gradients are there, positive for
    what is there beside both."""
    update: int = 0
    """Flat copies that ZeRO-3's update works on, by parts; a CPU's allocator keeps all of them."""
    gaps: int = 0
    """What the CPU's allocator keeps of freed blocks."""
    pool: int = 0
    """Buffers in RAM for weights that are read from a disk, where they are offloaded to it."""
    unswapped: int = 0
    """Of the weights, what stays in RAM then: the embedding and the head."""
    group: int = 0
    """The most masters that ZeRO-3 updates at once."""

    def to_dict(self) -> dict[str, int]:
        """Without what is not there, in the order of a table."""
        found = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.moments,
            "master weights": self.masters,
            "buffers": self.buffers,
            "update": self.update,
            "activations": self.activations,
            "not at the same time" if self.overlap < 0 else "beside them": self.overlap,
            "allocator's gaps": self.gaps,
        }
        return {name: size for name, size in found.items() if size}

    @property
    def total(self) -> int:
        return sum(self.to_dict().values())


@dataclass(frozen=True)
class Counts:
    """Parameters of a model by where they are, tied ones once."""

    all: int
    prelude: int
    core: int
    coda: int
    embedding: int
    head: int
    """0 where it is the embedding's."""
    matrices: int
    """Elements of the blocks' matrices, which Muon takes."""
    alike: int
    """Elements of the most of them that have one shape, which Muon takes together."""
    block: int
    """Of one block."""
    matrix: int
    """Of a block's largest."""


@functools.cache
def count(model: ModelConfig) -> Counts:
    """Parameters by part."""
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    matrices = model.d_model * (2 * queries + 2 * keys) + 3 * model.d_model * model.d_ff
    normed = queries + keys if model.qk_norm_over == "all" else 2 * model.head_dim
    vectors = model.qk_norm * normed + model.qkv_bias * (queries + 2 * keys)
    norms = 4 if model.norm_position == "both" else 2
    block = matrices + norms * model.d_model + vectors
    blocks = model.prelude_layers + model.core_layers + model.coda_layers
    words = model.vocab_size * model.d_model
    return Counts(
        all=parameter_count(model),
        prelude=model.prelude_layers * block,
        core=model.core_layers * (block + _remembering(model)),
        coda=model.coda_layers * block,
        embedding=words,
        head=0 if model.tie_embeddings else words,
        matrices=blocks * matrices,
        alike=2 * blocks * model.d_model * max(model.d_ff, queries),
        block=block,
        matrix=model.d_model * max(model.d_ff, queries),
    )


def _remembering(model: ModelConfig) -> int:
    """Parameters of a core layer's memory."""
    if not model.has_memory:
        return 0
    gates = model.n_heads
    if model.memory == "delta":
        gates += model.n_heads * model.d_model + 2 * model.n_kv_heads * (2 * model.head_dim + 1)
    return gates


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward and backward pass keeps, by part, in the order of the pass."""

    prelude: int
    loops: list[int]
    """Kept by each loop until its turn in the backward pass."""
    again: int
    """With checkpointing: what one loop keeps while it is run again."""
    heads: int
    """Coda and read-outs."""
    logits: int
    """Of all read-outs, once; their gradients come beside what `heads` counts."""

    @property
    def total(self) -> int:
        return self.prelude + sum(self.loops) + self.again + self.heads


def count_activations(
    model: ModelConfig, config: RunConfig, rows: int, bf16: bool = False
) -> Activations:
    """What autograd keeps for the deepest batch in a thousand. rows: sequences a forward pass."""
    width, length = model.d_model, config.seq_len
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    attention = (3 if model.qk_norm else 1) * (queries + keys) + keys + 2 * queries
    # A mask is kept as numbers, once for each call of the attention.
    mask = length if getattr(config, "document_mask", False) or model.has_memory else 0
    block = 7 * width + attention + 4 * model.d_ff + mask
    looped = block
    if model.has_memory:  # queries without RoPE, the read, its mixture; keys once a block that sees
        blocks = model.memory_window // model.memory_block
        looped += 6 * queries + 2 * keys * blocks + min(length, model.memory_window) - mask
    injected = {"none": 0, "half_steps": 0, "streams": 4 * width + 2 * model.state_width}
    loop = model.core_layers * looped + injected.get(model.injection, 8 * width)
    by_loop = deepest_rows(model, config, rows)
    readouts = {
        "last": rows,
        "pair": sum(by_loop[:1]) + (by_loop[1] if len(by_loop) > 1 else 0),
        "all": sum(by_loop),
    }[config.loss_at]
    token = 4 * length * (_BF16_ACTIVATIONS if bf16 else 1.0)
    logits = 4 * length * readouts * model.vocab_size
    kept = width + model.state_width if config.grad_checkpointing else loop
    return Activations(
        prelude=int(token * rows * model.prelude_layers * block),
        loops=[int(token * here * kept) for here in by_loop],
        again=int(token * by_loop[0] * loop) if config.grad_checkpointing else 0,
        heads=int(token * readouts * (model.coda_layers * block + 5 * width)) + 2 * logits,
        logits=logits,
    )


def deepest_rows(model: ModelConfig, config: RunConfig, rows: int) -> list[int]:
    """Sequences of a micro batch that run each loop: of the deepest of a thousand batches.

    By the rule `loss` any sequence may be sent deeper, so all of them are counted as if they were.
    """
    most = config.max_loops or model.max_loops
    if config.loop_schedule == "fixed":
        return [rows] * (config.loops or most)
    low = min((config.loops or 1) + (config.loop_schedule == "loss"), most)
    rng = np.random.default_rng(0)
    depths = sample_depths(rng, 1000 * rows, config.mean_loops, low, most).reshape(1000, rows)
    sums = depths.sum(1)
    chosen = depths[sums.argsort()[math.ceil(_RARE * 1000) - 1]]
    return [int((chosen >= loop).sum()) for loop in range(1, int(chosen.max()) + 1)]


def rank_need(
    model: ModelConfig,
    config: RunConfig,
    spread: ParallelLayout,
    rows: int,
    bf16: bool = False,
    heap: bool = False,
) -> MemoryEstimate:
    """What one process holds at its peak, with nothing offloaded. heap: on the CPU."""
    counts = count(model)
    activations = count_activations(model, config, rows, bf16)
    each = 2 if bf16 and spread.stage else 4  # bytes of a weight as the forward pass reads it
    share = math.ceil(counts.all / spread.world)
    cut = spread.kind in ("zero3", "fsdp")
    whole = counts.all
    muon = config.optimizer == "muon" and spread.kind in ("none", "ddp")
    moments = 8 * counts.all - (4 * counts.matrices if muon else 0)
    if spread.kind not in ("none", "ddp"):
        moments = 8 * share
    gradients = each * (share if spread.stage or cut else whole)
    accumulates = config.batch_size > rows * spread.world
    peak = _peak_of_backward(counts, activations, each, accumulates or bool(spread.stage))
    overlap = peak - activations.total - each * (whole if not spread.stage else share)
    if spread.stage or cut:  # whose gradients are cut as soon as they are there
        overlap = 0
    if muon:  # updates, these in one piece, and two of the same size while it multiplies
        step = (4 + 3 * (2 if bf16 else 4)) * counts.alike
        # On a CPU its pieces are large, and fresh, while activations stay with the allocator.
        overlap = max(overlap, step - (0 if heap else activations.total))
    small = 4 * max(model.d_ff, model.n_heads * model.head_dim) * model.d_model < KEPT_BLOCK
    return MemoryEstimate(
        weights=each * (share if cut else whole),
        masters=4 * share if spread.stage else 0,
        moments=moments,
        gradients=gradients,
        buffers=_buffers(counts, spread, each, bf16),
        activations=activations.total,
        overlap=max(0, overlap) if heap else overlap,
        update=4 * share // (1 if heap else UPDATES) if spread.stage == 3 else 0,
        gaps=int(_HEAP_GAPS * gradients) if heap and small else 0,
        pool=each
        * (_MATRICES * model.core_layers + SPARE_BUFFERS)
        * math.ceil(counts.matrix / spread.world),
        unswapped=each * math.ceil((counts.embedding + counts.head) / spread.world),
        group=max(
            4 * share // UPDATES,
            4 * math.ceil(max(counts.embedding, counts.head) / spread.world),
        ),
    )


def _buffers(counts: Counts, spread: ParallelLayout, each: int, bf16: bool) -> int:
    if spread.kind == "none":
        return 2 * counts.matrices if bf16 else 0
    if spread.kind == "ddp":  # gradients in buckets beside the gradients
        return 4 * counts.all + (2 * counts.matrices if bf16 else 0)
    if spread.kind == "fsdp":
        # All but prelude and coda, with its gradient, for the whole step; two blocks of these, the
        # second fetched ahead, with the gradient of one.
        rest = counts.all - counts.prelude - counts.coda
        whole = 4 * (2 * rest + (3 * counts.block if counts.prelude + counts.coda else 0))
        return whole + (2 * counts.matrices if bf16 else 0)  # autograd keeps the rounded ones
    bucket = each * min(REDUCE_BUCKET, counts.all)
    if spread.kind == "zero2":
        return bucket
    live = min(LIVE_PARAMETERS, counts.all) if spread.world > 1 else 0
    # A gradient is whole until the last loop has added to it.
    summed = counts.core + max(counts.embedding, counts.head)
    return bucket + each * (live + summed)


def _peak_of_backward(
    counts: Counts, activations: Activations, each: int, all_gradients: bool
) -> int:
    """The most that activations and gradients take together, in bytes.

    all_gradients: they are there from the start, as when several passes are accumulated.
    """
    left, made = activations.total - activations.again, each * counts.all if all_gradients else 0
    words = each * max(counts.embedding, counts.head)
    peak = left + made + activations.logits  # the gradient of the logits
    stages = [(activations.heads, counts.head or counts.embedding, 0),
              (0, counts.coda, 0)]  # fmt: skip
    stages += [(kept, counts.core if first else 0, activations.again)
               for first, kept in zip((True, *[False] * len(activations.loops)),
                                      reversed(activations.loops))]  # fmt: skip
    stages += [(activations.prelude, counts.prelude, 0)]
    for freed, new, again in stages:
        made += 0 if all_gradients else each * new
        peak = max(peak, left + made + again)
        left -= freed
    # The embedding's own gradient comes last, beside the head's where both are one matrix.
    return max(peak, made + words)
