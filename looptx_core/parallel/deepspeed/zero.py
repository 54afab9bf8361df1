"""DeepSpeed's ZeRO under Lightning, on GPUs and on the CPU (arXiv 1910.02054, 2104.07857).

What differs from Lightning's own strategy: it runs on the CPU accelerator, gradients are clipped
by part as everywhere here, and checkpoints are `fragments`, which hold what is swapped too and
are read without unpickling.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from looptx_core.atomic import temporary_beside
from looptx_core.config.processes import is_first_here
from looptx_core.errors import UsageError
from looptx_core.parallel.deepspeed import checkpoint as fragments
from looptx_core.parallel.deepspeed.checkpoint import MOMENTS, Checkpoint, Group, TensorShard
from looptx_core.parallel.deepspeed.library import noise_to_stderr, prepare_deepspeed, restore_torch
from looptx_core.parallel.deepspeed.nvme import SwapFolder, Traffic, count_traffic
from looptx_core.parallel.deepspeed.plain_files import plain_files
from looptx_core.parallel.ranks import BarrierAtTeardown, any_rank

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
_HELD = -1  # no module's number


class ZeroStrategy(BarrierAtTeardown, DeepSpeedStrategy):
    """See the module's docstring. advice: how to go on where a process is lost."""

    def __init__(
        self, config: dict[str, Any], *, on_gpu: bool, swap: SwapFolder | None, advice: str
    ) -> None:
        prepare_deepspeed(on_gpu)
        with noise_to_stderr():
            super().__init__(
                config=config,
                process_group_backend=None if on_gpu else "gloo",
                remote_device="cpu",
                logging_level=logging.ERROR,
            )
        self.on_gpu, self.swap, self.advice = on_gpu, swap, advice
        self.traffic = Traffic()
        self.trunk_norm: Tensor | None = None

    # Where it runs.

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def teardown(self) -> None:
        super().teardown()
        restore_torch()

    def setup_environment(self) -> None:
        with noise_to_stderr():
            if self.on_gpu:
                super().setup_environment()
            else:
                DDPStrategy.setup_environment(self)  # Lightning's own refuses here

    def setup_distributed(self) -> None:
        if self.on_gpu:
            return super().setup_distributed()
        self.set_world_ranks()
        return self._init_deepspeed_distributed()

    def setup(self, trainer: Any) -> None:
        failed = None
        if self.swap is not None:
            try:
                if is_first_here():
                    self.swap.open()
            except Exception as error:
                failed = error
            if any_rank(failed is not None, self.root_device):
                raise failed or UsageError("another process can't use its swap folder")
            self.traffic = count_traffic()
        by_plain_files = self.swap is not None and not self.swap.by_libaio
        with noise_to_stderr(), plain_files() if by_plain_files else contextlib.nullcontext():
            self._init_config_if_needed()
            if self.zero_stage_3:
                # Left to DeepSpeed, this would take bf16 for the swap files of float32 weights
                # where the processor has no fp16 (0.19.8).
                import deepspeed

                deepspeed.zero.Init(
                    module=self.model,
                    config_dict_or_path=self.config,
                    param_swapper=self._swapper(),
                )
            super().setup(trainer)
        if trainer.training:
            self._clip_by_part()
            if self.zero_stage_3:
                self._forget_order()
            # Lightning has divided the loss by the micro-batches, and DeepSpeed would again.
            engine = self.deepspeed_engine
            engine.backward = functools.partial(engine.backward, scale_wrt_gas=False)

    def _swapper(self) -> Any:
        """DeepSpeed's own, whose buffers are all as large as the largest weight that it swaps: made
        for those of the blocks, as for an embedding's size they would take more than all weights.
        """
        assert isinstance(self.config, dict)
        place = self.config["zero_optimization"].get("offload_param", {}).get("device")
        if place != "nvme":
            return None
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
            AsyncPartitionedParameterSwapper,
        )

        class BlocksAlone(AsyncPartitionedParameterSwapper):
            def swappable_tensor(self, param: Any = None, numel: int | None = None) -> bool:
                size = param.ds_tensor.ds_numel if numel is None else numel
                return super().swappable_tensor(numel=size) and size <= self.elements_per_buffer

        # Weights keep their type where DeepSpeed's settings say bf16, and so do their swap files.
        dtype = next(self._module.parameters()).dtype
        return BlocksAlone(DeepSpeedConfig(self.config), dtype)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: checkpoints hold each rank's part, and gathering it here would need memory."""
        return {}

    # What it does at a step.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Once gathered, the looped weights stay to the end of the optimizer step.

        Left alone, DeepSpeed gathers them at each loop of each pass, unless the depth is the same
        as in the step before.
        """
        if self.holds_core:
            for p in self._module.model.core.parameters():
                p.ds_active_sub_modules.add(_HELD)  # cleared by its step, which cuts all again
        return super().training_step(*args, **kwargs)

    def _forget_order(self) -> None:
        """Keep DeepSpeed from expecting the last pass's order of modules in the next one.

        Depth changes from pass to pass. A pass that is alike up to some place and then is not can
        end in a "tracing error" (0.19.8), so that no order is ever taken for known; what is lost is
        reading ahead, which a change of order ended in any case.
        """
        order = self._zero.parameter_offload.get_param_coordinator()
        begin = order.reset_step

        def begin_anew() -> None:
            begin()
            if order.is_complete_trace():
                order._invalidate_trace()

        order.reset_step = begin_anew

    @property
    def holds_core(self) -> bool:
        """Whether the core's weights stay whole through a step: where they are not offloaded."""
        assert isinstance(self.config, dict)
        return self.zero_stage_3 and "offload_param" not in self.config["zero_optimization"]

    def _clip_by_part(self) -> None:
        """Give the trunk's and the head's gradients a norm each, as `clip_by_part` does."""
        zero = self._zero
        heads = [group.get("part") == "head" for group in zero.optimizer.param_groups]
        if self.zero_stage_3:
            heads = [heads[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups))]
        plain, norms, turn = zero.unscale_and_clip_grads, [Tensor(), Tensor()], iter([0])

        def remember(by_group: list[Tensor]) -> list[Tensor]:
            nonlocal turn
            for head in (False, True):
                mine = [n.float() for n, is_head in zip(by_group, heads) if is_head == head]
                norms[head] = torch.linalg.vector_norm(torch.stack(mine)) if mine else mine_none()
            self.trunk_norm = norms[False] / zero.loss_scale
            turn = iter(range(len(by_group)))
            return by_group

        def mine_none() -> Tensor:
            return torch.zeros((), device=self.root_device)

        if self.zero_stage_3:
            by_group = zero._get_norm_groups
            zero._get_norm_groups = lambda: remember(by_group())
            zero.unscale_and_clip_grads = lambda i, total: plain(i, norms[heads[i]])
            return
        from deepspeed.runtime.utils import combine_grad_norm_groups

        def of_group(i: int) -> Tensor:
            mine = zero.params_in_partition[i]
            if zero.cpu_offload:
                return zero.complete_grad_norm_calculation_for_cpu_offload(mine)
            return zero.get_grad_norm_direct(zero.averaged_gradients[i], mine)

        def total(norm_type: int = 2) -> Tensor:
            return combine_grad_norm_groups(
                remember([of_group(i) for i in range(len(zero.bit16_groups))])
            )

        zero.scaled_global_norm = total
        zero.unscale_and_clip_grads = lambda grads, total: plain(grads, norms[heads[next(turn)]])

    # What it saves.

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write `fragments` by all ranks, whole or not at all. Raises `OSError` on all of them."""
        folder = Path(self.broadcast(str(filepath)))
        temporary = folder
        with self._all_ranks():
            if self.is_global_zero:
                temporary = temporary_beside(folder)
                temporary.mkdir(parents=True)
        partial = Path(self.broadcast(str(temporary)))  # one folder for all ranks
        with self._all_ranks(partial):
            names = self._names()
            elements = sum(math.prod(shape) for shape in self._shapes().values())
            needed = 4 * (1 + len(MOMENTS)) * elements // self.world_size
            fragments.write(partial, self.global_rank, self._groups(names), needed)
        with self._all_ranks(partial):
            if self.is_global_zero:
                left_out = ("state_dict", "optimizer_states")
                common = {key: v for key, v in checkpoint.items() if key not in left_out}
                module = self._module
                common["buffers"] = {name: b.detach().cpu() for name, b in module.named_buffers()}
                common["lr"] = [group["lr"] for group in self._zero.optimizer.param_groups]
                fragments.commit(partial, folder, common, self._shapes(), self.world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """Take over weights, moments and counters, whatever ranks wrote them."""
        saved = Checkpoint(Path(checkpoint_path))
        common = saved.common()
        for name, buffer in self._module.named_buffers():
            if name in common["buffers"]:
                buffer.data.copy_(common["buffers"][name])
        self._restore(saved)
        # A schedule sets the rate after a step; the first one takes what the optimizer has.
        for group, lr in zip(self._zero.optimizer.param_groups, common["lr"], strict=True):
            group["lr"] = lr
        return common

    @contextlib.contextmanager
    def _all_ranks(self, partial: Path | None = None) -> Iterator[None]:
        """Do this on all ranks; where one fails all do, and what was written goes."""
        failed: OSError | None = None
        try:
            yield
        except OSError as error:
            failed = error
        if any_rank(failed is not None, self.root_device):
            if partial is not None and self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise failed or OSError("another process could not write")

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self._module.named_parameters()}

    def _shapes(self) -> dict[str, list[int]]:
        return {
            name: list(getattr(p, "ds_shape", p.shape))
            for name, p in self._module.named_parameters()
            if p.requires_grad
        }

    def _groups(self, names: dict[int, str]) -> Iterator[Group]:
        """This rank's pieces, a group after the other; changes made to their tensors are lost."""
        for number, flat in enumerate(self._flats()):
            with self._in_memory(number):
                state = self._zero.optimizer.state.get(flat, {})
                whole = {"": flat, **{key: state[key] for key in MOMENTS if key in state}}
                for key in MOMENTS:
                    whole.setdefault(key, torch.zeros_like(flat))
                pieces = [
                    TensorShard(names[id(p)], start,
                          {key: t.narrow(0, place, size) for key, t in whole.items()})
                    for p, start, place, size in self._cuts(number)
                ]  # fmt: skip
                yield Group(pieces, int(state.get("step", 0)))

    @torch.no_grad()
    def _restore(self, saved: Checkpoint) -> None:
        zero, names = self._zero, self._names()
        if self.zero_stage_3:
            zero.checkpoint_event_prologue()
        step = saved.step
        for number, flat in enumerate(self._flats()):
            with self._in_memory(number, keep=True):
                state = zero.optimizer.state[flat]
                state["step"] = torch.tensor(float(step), device=flat.device)
                for key in MOMENTS:
                    if key not in state:
                        state[key] = torch.zeros_like(flat)
                for p, start, place, size in self._cuts(number):
                    for key, tensor in (("", flat), *((key, state[key]) for key in MOMENTS)):
                        piece = saved.read(names[id(p)], key, start, start + size)
                        tensor.narrow(0, place, size).copy_(piece)
                if self.zero_stage_3:
                    zero._reassign_or_swap_out_partitioned_parameters(number)
                else:
                    mine = zero.parallel_partitioned_bit16_groups[number]
                    mine[self.global_rank].data.copy_(flat)
        if self.zero_stage_3:
            zero.checkpoint_event_epilogue()
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        for number in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(number)

    def _flats(self) -> list[Tensor]:
        """This rank's master weights, a flat tensor a group; empty while swapped out."""
        zero = self._zero
        if self.zero_stage_3:
            return zero.fp32_partitioned_groups_flat
        return zero.single_partition_of_fp32_groups

    def _cuts(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """For each piece of a group: its parameter, where it begins there and in the group's
        flat tensor, and its size."""
        zero, rank = self._zero, self.global_rank
        if self.zero_stage_3:
            for p in zero.fp16_groups[number]:
                _, place, size = zero.grad_position[zero.get_param_id(p)]
                yield p, rank * size, place, size
            return
        length = int(zero.partition_size[number])
        begin = rank * length
        offsets = zero.round_robin_bit16_offsets[number]
        for p, offset in zip(zero.round_robin_bit16_groups[number], offsets):
            first, last = max(offset, begin), min(offset + p.numel(), begin + length)
            if first < last:
                yield p, first - offset, first - begin, last - first

    @contextlib.contextmanager
    def _in_memory(self, number: int, keep: bool = False) -> Iterator[None]:
        """Read a swapped group; afterwards write it back to keep changes, or let it go."""
        zero = self._zero
        swapped = self.zero_stage_3 and zero._swappable_optimizer_subgroup(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped and keep:
            zero._optimizer_states_and_gradient_swap_out(number)
        elif swapped:
            zero._release_swap_buffers(number)


def make_plain(module: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Undo what ZeRO did to a module, and give it these whole weights by name.

    Parameters without one are left empty: frozen ones, which a caller has from elsewhere.
    """
    by_name = dict(weights)
    fresh: dict[int, nn.Parameter] = {}
    for name, p in module.named_parameters():
        value = by_name.get(name, torch.empty(0, dtype=p.dtype))
        fresh[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
    for part in module.modules():
        plain = {name: None if p is None else fresh[id(p)] for name, p in part._parameters.items()}
        part._parameters = plain
        for hooks in _HOOKS:
            getattr(part, hooks).clear()
