"""What a run that trains is. A field's docstring is its help on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError


@dataclass(frozen=True)
class RunConfig:
    """What `train` and `finetune` share; `config.yaml` holds it with each value's origin."""

    data: tuple[str, ...] = ()
    """Tokenised shards, or raw text to tokenise; absent: the bundled text."""
    out: str | None = None
    """The run's folder; absent: runs/train-<n>."""
    seed: int = 0
    """Seed of the weights, the order of the data, the depths and dropout."""

    steps: int = 600
    """Optimizer steps; fixes the schedule of the learning rate."""
    epochs: float | None = None
    """Passes over the data, in place of `steps`."""
    max_minutes: float | None = None
    """Stop after so many minutes, saved; the learning rate's schedule does not change."""
    seq_len: int = 128
    """Tokens a sequence."""
    batch_size: int = 32
    """Sequences an optimizer step, over all devices."""
    micro_batch: int | None = None
    """Sequences a forward pass on one device; absent: its whole share of the batch."""
    workers: int = 0
    """Processes that read data."""
    augment: bool = True
    """Shift, scale, turn and tint the pictures, anew in each epoch."""
    skip_bad: bool = False
    """Leave out, and count, pictures and records that can't be used."""

    lr: float = 2e-2
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine falls to `min_lr` over all steps, wsd stays at the peak and falls
    to it over the last steps (arXiv 2405.18392), constant stays."""
    min_lr: float = 0.1
    """The last learning rate, as a share of the peak; constant has none."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    lr_decay: float = 0.2
    """wsd: share of the steps over which the learning rate falls."""
    weight_decay: float = 0.1
    """On matrices only."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: for the blocks' matrices, with AdamW for all else."""
    beta2: float = 0.95
    """AdamW's second decay."""
    clip: float = 1.0
    """Largest norm of the gradient, of the trunk and of the confidence head apart; 0: any."""

    loop_schedule: Literal["loss", "sampled", "grow", "fixed"] = "loss"
    """How deep each sequence goes in training; see `looptx_core.training.loop_schedule`."""
    loops: int | None = None
    """fixed: the depth (absent: the maximum). loss: the base depth (absent: 1). sampled, grow: the
    least (absent: 1)."""
    max_loops: int | None = None
    """The most loops in training; absent: the model's maximum."""
    mean_loops: float = 3.0
    """Mean of the distribution that depths are drawn from, before its truncation."""
    grow_share: float = 0.5
    """grow: share of the steps over which depths rise from the least to what sampled draws."""
    deeper_by: Literal["gain", "loss"] = "gain"
    """loss: what sends a sequence deeper, the loss that the confidence head predicts one more loop
    to remove, or the loss itself."""
    loss_threshold: float | None = None
    """loss: go deeper above this, in nats a token; absent: adaptive."""
    deeper_share: float = 0.6
    """loss, adaptive: the share of sequences that the threshold sends deeper."""
    explore: float = 0.6
    """loss: the share of sequences that draw their depth regardless of the rule."""
    loss_at: Literal["pair", "all", "last"] = "pair"
    """Loops with a loss: each sequence's last two, all, or its last alone."""
    loss_prior: float = 0.0
    """Loop t's loss counts t to this power, beside the sequence's others; 0: all alike."""

    teacher: str | None = None
    """A model folder with the same tokenizer whose probabilities are learned too (distillation,
    arXiv 1503.02531), or first-loop: those of the model's own first loop."""
    teacher_weight: float = 0.5
    """teacher: its share of the loss; the rest is the data's."""
    control: bool = False
    """Afterwards train the same model again without loops, for as many FLOPs, and compare."""

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 where a short probe finds it faster."""
    attention: Literal["auto", "sdpa", "flash", "explicit"] = "auto"
    """Back end of attention."""
    compile: bool = False
    """Compile the passes of the model with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute each loop in the backward pass to save memory."""
    devices: int = 1
    """Processes on each machine, one for each device."""
    nodes: int = 1
    """Machines; torchrun, SLURM or NODE_RANK say which this one is."""
    strategy: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """ddp: each process holds all. zero2: gradients and optimizer are cut over the processes, by
    DeepSpeed. zero3: the weights too. fsdp: the same cut as zero3, by PyTorch. auto: ddp where
    there is more than one process."""
    zero3: bool = False
    """The same as `strategy` zero3."""
    offload: Literal["none", "auto", "cpu", "nvme"] | None = None
    """Under ZeRO: keep weights and optimizer in memory, or swap them to a disk, between their uses.
    auto: what does not fit; absent: auto under ZeRO."""
    nvme_path: str | None = None
    """Where to swap to, a folder on a local disk; absent: the run's own."""
    deepspeed_config: str | None = None
    """A JSON file of DeepSpeed's settings, which win over looptx's."""

    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    keep_best: bool = False
    """Keep the weights with the lowest held-out loss too, and make the model of them."""
    val_every: int = 200
    """Steps between validations."""
    val_batches: int = 4
    """Batches of one validation."""
    eval_every: int | None = None
    """Steps between evaluations on tasks, whose figures join the metrics; absent: none."""
    eval_tasks: tuple[str, ...] = ()
    """Names of tasks of looptx evaluate, separated by commas; absent: all of looptx's own."""
    eval_limit: int | None = 50
    """The first so many lines of each task."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """A tracker that gets the metrics too, by the extra of its name; may be repeated.
    TensorBoard's files are always written."""
    profile: int | None = None
    """Profile so many steps after the first two: a trace and a table, in the run's profile."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.batch_size % (self.micro_batch_size * self.world_size):
            raise UsageError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch x devices "
                f"({self.micro_batch_size} x {self.world_size}); "
                f"pass `micro_batch` {self._fitting_micro()}"
            )
        self._check_strategy()

    def check_context(self, holds: int) -> None:
        """Raise `UsageError` for sequences longer than a model's context, which holds so many."""
        if self.seq_len > holds:
            raise UsageError(
                f"`seq_len` {self.seq_len} exceeds the model's max_seq_len ({holds}); set "
                "model.max_seq_len in the config"
            )

    def _check_strategy(self) -> None:
        if self.zero3 and self.strategy not in ("auto", "zero3"):
            raise UsageError(f"`zero3` contradicts `strategy` {self.strategy}; leave one out")
        zero = self.sharding.startswith("zero")
        if self.offload not in (None, "none") and not zero:
            raise UsageError(f"`offload` {self.offload} needs ZeRO; add `zero3`")
        if self.deepspeed_config and not zero:
            raise UsageError("`deepspeed_config` needs ZeRO; add `zero3`")
        if self.offload == "nvme" and self.sharding == "zero2":
            raise UsageError("`offload` nvme needs `zero3`; ZeRO-2 offloads to the CPU alone")
        for name in ("teacher", "control"):
            if getattr(self, name) and self.world_size > 1:
                raise UsageError(
                    f"`{name}` with several processes is refused; take one device, or leave it out"
                )
        if self.teacher and zero:
            raise UsageError("`teacher` with ZeRO is refused; leave one of them out")
        if self.eval_tasks and not self.eval_every:
            raise UsageError("`eval_tasks` does nothing without `eval_every`; add it")
        for name in ("keep_best", "eval_every"):
            if getattr(self, name) and self.sharding not in ("none", "ddp"):
                raise UsageError(
                    f"`{name}` with {self.sharding} is refused: no process has all weights; "
                    "leave it out"
                )
        if self.nvme_path and self.offload not in ("nvme", "auto", None):
            raise UsageError(f"`nvme_path` does nothing under `offload` {self.offload}")
        if self.nvme_path and not zero:
            raise UsageError("`nvme_path` needs ZeRO; add `zero3` and `offload` nvme")

    def _fitting_micro(self) -> int:
        per_device = max(1, self.batch_size // self.world_size)
        limit = min(self.micro_batch_size, per_device)
        fits = [m for m in range(1, limit + 1) if self.batch_size % (m * self.world_size) == 0]
        return fits[-1] if fits else 1

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.devices * self.nodes

    @property
    def sharding(self) -> str:
        """The strategy that is meant: 'none', 'ddp', 'fsdp', 'zero2' or 'zero3'."""
        if self.zero3:
            return "zero3"
        if self.strategy == "auto":
            return "ddp" if self.world_size > 1 else "none"
        return self.strategy

    @property
    def micro_batch_size(self) -> int:
        """Sequences a forward pass on one device."""
        return self.micro_batch or max(1, self.batch_size // self.world_size)

    @property
    def hidden_shares(self) -> Mapping[str, float]:
        """The share of each medium's rows to hide from its encoder, for the medium's own loss."""
        return {}

    @property
    def accumulation(self) -> int:
        """Forward passes of one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of `looptx train`, after merging."""

    preset: str = "nano"
    """nano, portable, small, medium, 1b or 7b."""
    init: str | None = None
    """Go on from the weights of a model, also hf:OWNER/NAME, with its shape and tokenizer, and a
    lower learning rate."""
    document_mask: bool = True
    """Tokens attend within their own document only."""
    mix: str | None = None
    """Weights of the items of `data` in their order, as 3:1, or of all text and all records of
    media; absent: texts are joined, and weigh as much as the records of media."""
    codec: str | None = None
    """A codec's folder, by which the model learns to draw; looptx tokenize --codec makes one."""
    direction: Literal["both", "read", "write"] = "both"
    """With a codec: whether a picture with its text is read, written or, as two records, both."""
    mask_patches: float = 0.0
    """Share of the patches to hide from the encoder and to draw back, with a loss of their own."""
    bitnet: bool = False
    """Ternary weights in the blocks (BitNet b1.58); looptx convert --to-bitnet packs them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix is not None:
            parse_mix(self.mix)

    @property
    def weights(self) -> tuple[float, float]:
        """`mix` as the weights of text and of records of media. Raises `UsageError`."""
        found = parse_mix(self.mix or "1:1")
        if len(found) != 2 or not found[1]:
            raise UsageError(
                f"`mix` {self.mix}: give the weights of text and of pictures, as 1:1 or 0:1"
            )
        return found[0], found[1]

    def source_weights(self, media: Sequence[bool]) -> tuple[float, ...] | None:
        """The weight of each item of `data`; None where they are not weighed one by one.

        media: whether each item has records of media. Raises `UsageError`.
        """
        if self.mix is None:
            return None
        found = parse_mix(self.mix)
        if len(found) == len(media):
            return found
        if any(media) and len(found) == 2:
            return None  # all text against all records
        items = "an item" if len(media) == 1 else f"{len(media)} items"
        raise UsageError(
            f"`mix` {self.mix}: {len(found)} weights for {items} of `data`; give one for each, in "
            "their order"
        )

    @property
    def hidden_shares(self) -> Mapping[str, float]:
        return {"image": self.mask_patches} if self.mask_patches else {}

    def check_hidden_shares(self, media: bool) -> None:
        """Raise `UsageError` for impossible shares. media: whether the data has any."""
        if not 0 <= self.mask_patches < 1 or (self.mask_patches and not media):
            raise UsageError(
                f"`mask_patches` {self.mask_patches}: a share below 1 of the patches of pictures; "
                "give pictures with texts too, as `data` pairs.jsonl"
            )


def continued_lr(d_model: int) -> float:
    """The default peak of the learning rate for a model that is trained already.

    A tenth of the presets' own at their widths, which falls about as the square of the width.
    """
    return max(2e-5, 2e-3 * (128 / d_model) ** 2)


def parse_mix(text: str) -> tuple[float, ...]:
    """'2:1' as weights, two or more. Raises `UsageError`."""
    try:
        found = tuple(float(part) for part in text.split(":"))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(0 <= weight < 1e6 for weight in found) or not any(found):
        raise UsageError(f"`mix` {text}: give weights from 0 up, as 3:1, not all of them 0")
    return found
