"""The same on a base in 4 bits: QLoRA. The adapter then runs on the full-precision base.

python examples/finetune_qlora.py [--steps 200] [--data my.jsonl] [--out qadapter]
"""

import argparse
from pathlib import Path

from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.data.bundled import bundled_questions
from looptx_core.finetuning.merge import merge_adapter
from looptx_core.finetuning.run import finetune, prepare

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--data", default=str(bundled_questions()))
parser.add_argument("--out", type=Path, default=Path("qadapter"))
args = parser.parse_args()

config = FinetuneConfig(qlora=True, quantization="nf4", steps=args.steps)
args.out.mkdir(parents=True, exist_ok=True)
ready = prepare(config, base=bundled_model(), data=[args.data], report=print)
result = finetune(ready, folder=args.out)
print(
    f"loss {result.loss_by_loop_before[-1]:.3f} before; after, {result.quantised_loss:.3f} on the "
    f"4-bit base and {result.loss_by_loop[-1]:.3f} on the full-precision one"
)
merged = merge_adapter(bundled_model(), result.model_folder)
print(f"merged: {sum(p.numel() for p in merged.parameters()):,} parameters, as the base")
