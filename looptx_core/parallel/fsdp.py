"""PyTorch's fully sharded data parallelism, FSDP2 (arXiv 2304.11277), under Lightning.

Blocks that run once are gathered for their use alone. All else is one group: a looped core is
gathered once a pass forward and back, and its gradient reduced once, whatever the loops. It runs on
GPUs and, by gloo, on the CPU. Checkpoints are whole files by name, so that any number of processes
goes on. In bf16 weights are gathered in float32, and autograd keeps what was rounded of them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from looptx_core.model.code_rows import share_code_rows
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.ranks import BarrierAtTeardown


class FsdpStrategy(BarrierAtTeardown, ModelParallelStrategy):
    """Over all processes. advice: how to go on where one of them is lost."""

    def __init__(self, world_size: int, *, on_gpu: bool, advice: str) -> None:
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=None if on_gpu else "gloo",
        )
        self.advice = advice


def shard(model: LoopedTransformer, mesh: DeviceMesh | None) -> None:
    """Cut a model's weights over the processes of a mesh; a second call does nothing."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    assert mesh is not None, "made by the strategy before this"
    mesh = mesh["data_parallel"]
    for block in (*model.prelude, *model.coda):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # The first part of every pass gathers the weights, which stay until the backward pass is over.
    register_fsdp_forward_method(model, "embed")


class Gathered(L.Callback):
    """At the end the first process has the whole weights in `weights`, by the model's names."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        whole: dict[str, Any] = trainer.strategy.lightning_module_state_dict()
        prefix = "model."
        self.weights = {
            # Rows that part unevenly are padded in memory, which safetensors would not store.
            name.removeprefix(prefix): _alone(value)
            for name, value in whole.items()
            if name.startswith(prefix)
        }

    def model(self, like: LoopedTransformer) -> LoopedTransformer:
        """A model that is not cut, with these weights; in the other processes without any."""
        with init_empty_weights():
            plain = LoopedTransformer(like.config)
            if like.code_rows is not None:
                share_code_rows(plain)
        plain.attend = like.attend
        if self.weights:
            plain.load_state_dict(self.weights, assign=True)
            if like.config.tie_embeddings:
                plain.head.weight = plain.embedding.weight
        return plain


def _alone(whole: Tensor) -> Tensor:
    """In memory of its own size."""
    return whole.clone() if whole.untyped_storage().nbytes() > whole.nbytes else whole
