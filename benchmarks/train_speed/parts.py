"""Where a step of training on a CPU spends its time, and each part by the ways that were tried.

Shares of a step of `train_speed.py`'s sides at `small`, by torch's profiler; then milliseconds of
processor time of the parts, forward and backward.

    python -m benchmarks.train_speed.parts [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.record import rows_by, write
from benchmarks.train_speed.run import HERE, LAST, OURS, THEIRS, VOCAB, WARM, Where, ours, theirs
from looptx_core.data.corpus import bundled_text
from looptx_core.data.datamodule import TokenData
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model import fused
from looptx_core.model.attention import Attend, VarlenBatch, explicit, sdpa
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables
from looptx_core.training.muon import orthogonal

ROWS, LENGTH = HERE.rows, HERE.length
LINES = {
    "matrix products of the blocks": (
        "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm",
    ),
    "attention, forward": ("aten::_scaled_dot_product_flash_attention_for_cpu", "_Attend"),
    "attention, backward": (
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "_AttendBackward",
    ),
    "norms, RoPE, gates (fused)": (
        "_Norm", "_NormBackward", "_Turn", "_TurnBackward", "_GeluGate", "_GeluGateBackward",
    ),
    "loss over the vocabulary, without its products": (
        "aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::nll_loss_forward",
        "aten::nll_loss_backward", "aten::argmax", "_CrossEntropy", "_CrossEntropyBackward",
    ),
    "optimizer": ("aten::_fused_adamw_",),
}  # fmt: skip
"""Names of torch's profiler, by line of the table; what is in none is 'all else'."""


def profiled(step: Callable[[int], None]) -> dict[str, float]:
    """Share of a step by line. The vocabulary's three products have a line of their own."""
    for number in range(WARM):
        step(number)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step(WARM)
    line_of = {name: line for line, names in LINES.items() for name in names}
    shares: dict[str, float] = dict.fromkeys(
        (*LINES, "loss over the vocabulary, its products", "all else"), 0.0
    )
    for event in found.key_averages(group_by_input_shape=True):
        line = line_of.get(event.key, "all else")
        if event.key == "aten::mm" and any(VOCAB in shape for shape in event.input_shapes[:2]):
            line = "loss over the vocabulary, its products"
        shares[line] += event.self_cpu_time_total
    total = sum(shares.values())
    return {line: round(share / total, 4) for line, share in shares.items()}


def data_seconds() -> dict[str, float]:
    """To pack the tokens of a text into shards, and to read a batch back; seconds a batch."""
    with tempfile.TemporaryDirectory() as folder:
        source, shards = Path(folder) / "text.txt", Path(folder) / "shards"
        source.write_text(bundled_text().read_text("utf-8")[:300_000], "utf-8")
        start = time.process_time()
        tokenize_corpus([str(source)], shards, vocab_size=VOCAB)
        packing = time.process_time() - start
        data = TokenData(shards, seq_len=LENGTH, micro_batch=ROWS, batches=50)
        tokens = data.shards.manifest.splits["train"].tokens
        start = time.process_time()
        for _ in data.train_dataloader():
            pass
        reading = (time.process_time() - start) / 50
    return {
        "tokenizer and packing": round(packing * ROWS * LENGTH / tokens, 4),
        "data loader": round(reading, 4),
    }


def milliseconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Of processor time, the median."""
    function()
    each = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        each.append(time.process_time() - start)
    return round(1e3 * statistics.median(each), 2)


def parts() -> dict[str, dict[str, float]]:
    """Forward and backward of a block's parts by the ways that were tried, 2,048 tokens."""
    model = LoopedTransformer(HERE.model)
    block, model.head = model.core[0], nn.Identity()
    rotary = rotary_tables(torch.arange(LENGTH)[None, None], 64, 1e4, torch.float32)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    x, heads, wide = draw(ROWS, LENGTH, 512), draw(ROWS, LENGTH, 8, 64), draw(ROWS, LENGTH, 1536)
    logits, targets = draw(ROWS * LENGTH, VOCAB), torch.randint(0, VOCAB, (ROWS * LENGTH,))
    up, q, kv = draw(ROWS, LENGTH, 1536), draw(ROWS, 8, LENGTH, 64), draw(ROWS, 4, LENGTH, 64)
    steps: dict[str, Callable[[], object]] = {
        "norm": lambda: block.mlp_norm(x).sum().backward(),
        "norm and RoPE of queries": lambda: block.attention.q_norm(heads, rotary).sum().backward(),
        "gate": lambda: (
            fused.gated(wide, up) if fused.can_use_fused(wide) else F.gelu(wide) * up
        ).sum().backward(),
        "loss over 4,096 types": lambda: model.score(logits, targets)[0].sum().backward(),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {name: {} for name in steps}
    for way in ("plain", "fused"):  # the second stays on
        fused.enable_fused(way == "fused")
        for name, step in steps.items():
            found[name][way] = milliseconds(step)

    weight = torch.randn(1024, 512)
    rows = weight.split([512, 256, 256])
    plain = x.detach().view(-1, 512)
    found["queries, keys and values, forward product"] = {
        "joined": milliseconds(lambda: plain @ weight.T),
        "apart": milliseconds(lambda: [plain @ part.T for part in rows]),
    }

    documents = VarlenBatch.of((torch.arange(LENGTH) // 60).expand(ROWS, -1))

    def attention(attend: Attend, seen: VarlenBatch | torch.Tensor | None) -> Callable[[], object]:
        return lambda: attend(q, kv, kv, seen).sum().backward()

    for name, packed in (("attention", None), ("attention within documents of 60", documents)):
        found[name] = {"ours": milliseconds(attention(sdpa, packed))}
        fused.enable_fused(False)
        mask = packed and packed.mask()  # which a model makes once for all of its blocks
        found[name]["torch's fused"] = milliseconds(attention(sdpa, mask))
        found[name]["products and softmax"] = milliseconds(attention(explicit, mask))
        fused.enable_fused()
    matrices, coefficients = torch.randn(2, 256, 512), (3.4445, -4.775, 2.0315)

    def muon(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: orthogonal(matrices.to(dtype), coefficients, 5, 1e-7)

    found["Muon's iteration, two of 256 x 512"] = {
        "bf16": milliseconds(muon(torch.bfloat16), rounds=1),
        "float32": milliseconds(muon(torch.float32)),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"kernels": fused.enable_fused()}
    odd = Where(length=LENGTH - 1)  # so that no number of tokens is the vocabulary's size
    shares = {THEIRS: profiled(theirs(where=odd))}
    with freed_memory_kept():
        shares[OURS] = profiled(ours(False, odd, **LAST))
        shares["looptx, default recipe"] = profiled(ours(False, odd))
        each = parts()
    rows = [{"part": "share of a step", **row} for row in rows_by(shares, "side")]
    rows += [{"part": "milliseconds", **row} for row in rows_by(each, "operation")]
    rows.append({"part": "processor seconds a batch", **data_seconds()})
    write("train_speed.parts", __doc__.splitlines()[0], rows, settings=settings,
          peers=["transformers"])  # fmt: skip


if __name__ == "__main__":
    main()
