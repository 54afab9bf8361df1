"""Teach the bundled model a task by a LoRA adapter, then ask it.

python examples/finetune_lora.py [--steps 200] [--data my.jsonl] [--out adapter]

A line of data is {"prompt": "...", "response": "..."}.
"""

import argparse
from pathlib import Path

from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.data.bundled import bundled_questions
from looptx_core.finetuning.adapters import load_adapter
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.generation.engine import Engine

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--data", default=str(bundled_questions()))
parser.add_argument("--out", type=Path, default=Path("adapter"))
args = parser.parse_args()

config = FinetuneConfig(lora=True, steps=args.steps)
args.out.mkdir(parents=True, exist_ok=True)
result = finetune(
    prepare(config, base=bundled_model(), data=[args.data], report=print), folder=args.out
)
print(f"loss {result.loss_by_loop_before[-1]:.3f} before, {result.loss_by_loop[-1]:.3f} after")

loaded = load_adapter(load_model(bundled_model()), result.model_folder)
engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
question = "map ga cc fc dd aa hb bb ed: Where ends g"
(answer,) = engine.complete([question], GenerationOptions(temperature=0.0, max_new_tokens=4))
print(question, "->", answer.text.strip())
