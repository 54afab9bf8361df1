"""Train with a Lightning Trainer of your own, then compare the depths on held-out text.

python examples/own_trainer.py [--steps 100] [--batch-size 32]
"""

import argparse

import lightning as L

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.module import LoopedLM

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

config = TrainConfig(steps=args.steps, loop_schedule="sampled")
model = LoopedTransformer(ModelConfig(prelude_layers=0, core_layers=1, coda_layers=0))
shards = bundled_shards(vocab_size=2048)
data = TokenData(shards, batches=args.steps, micro_batch=args.batch_size, seq_len=128)
trainer = L.Trainer(max_steps=args.steps, logger=False, enable_checkpointing=False)
trainer.fit(LoopedLM(model, config), datamodule=data)
(scores,) = trainer.validate(LoopedLM(model, config), datamodule=data, verbose=False)
for loop in (1, 2, 4, 10):
    print(f"{loop} loops: {scores[f'val_loss/{loop}']:.3f} nats a token")
