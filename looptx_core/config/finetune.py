"""What a finetuning run is, beyond what it shares with training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looptx_core.config.run import RunConfig
from looptx_core.errors import UsageError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Settings of `looptx finetune`, after merging."""

    model: str | None = None
    """The base: a run, a model folder or hf:OWNER/NAME; absent: the newest finished run, else the
    bundled one."""
    data: tuple[str, ...] = ()
    """JSON lines, Parquet, text, or hf:NAME[@CONFIG][:SPLIT]; absent: the bundled questions."""
    out: str | None = None
    """The run's folder; absent: runs/finetune-<n>."""

    lora: bool = False
    """Train low-rank adapters (arXiv 2106.09685) and not the weights."""
    qlora: bool = False
    """Adapters on a quantised base (QLoRA, arXiv 2305.14314)."""
    quantization: Literal["nf4", "int8"] = "nf4"
    """qlora: the base's number type, by bitsandbytes."""
    dora: bool = False
    """Adapters with a magnitude of their own (DoRA, arXiv 2402.09353)."""
    lora_per_loop: bool = False
    """An adapter for each loop; it can't be merged. Without: one for all loops, which can."""
    lora_layers: Literal["all", "core", "later"] = "all"
    """Which layers get adapters: all, those of the loop, or those of the loop from its second pass
    on. With later, one loop stays the base, and depths are drawn from two on."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    target_modules: tuple[str, ...] = TARGETS
    """Names of the layers that get an adapter."""

    columns: tuple[str, ...] = ()
    """Names of the data's columns for the keys of a record, as prompt=question."""
    train_on_prompt: bool = False
    """Every token has a loss, and not the responses alone."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of examples longer than seq_len."""
    val_fraction: float = 0.1
    """Share of examples held out for validation."""

    steps: int = 400
    """Optimizer steps; fixes the schedule of the learning rate."""
    seq_len: int = 256
    """Tokens a sequence; short examples share one, each to itself."""
    batch_size: int = 8
    """Sequences an optimizer step, over all devices."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """On matrices only."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """muon: for the blocks' matrices, with AdamW for all else."""
    beta2: float = 0.99
    """AdamW's second decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_columns(self.columns)
        if self.qlora and self.sharding not in ("none", "ddp"):
            raise UsageError(
                f"`qlora` with {self.sharding} is refused: four-bit weights are packed bytes with "
                "scales beside them, which sharding neither cuts nor casts rightly; use `lora`"
            )
        if self.sharding == "fsdp":
            raise UsageError(
                "`strategy` fsdp is for looptx train: its checkpoints hold what is frozen too; "
                "use `zero3`"
            )
        if self.dora and self.lora_per_loop:
            raise UsageError("`dora` with `lora_per_loop` is not supported; leave one out")
        if self.lora_layers == "later" and self.lora_per_loop:
            raise UsageError(
                "`lora_per_loop` gives the first loop an adapter too, and `lora_layers` later "
                "none; leave one out"
            )
        if self.lora_layers != "all" and not self.adapts:
            raise UsageError(f"`lora_layers` {self.lora_layers} is of adapters; add `lora`")
        if self.lora_layers == "later" and self.loops == 1:
            raise UsageError(
                "`lora_layers` later trains nothing in one loop; give `loops` 2 or more, or leave "
                "it out"
            )
        if self.dora and self.qlora and self.quantization == "int8":
            raise UsageError("`dora` can't read int8 weights; use `quantization` nf4")

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not the weights themselves."""
        return self.lora or self.qlora or self.dora or self.lora_per_loop or self.rslora

    @property
    def method(self) -> str:
        """In a word or two, for people."""
        if not self.adapts:
            return "full"
        name = "DoRA" if self.dora else "rsLoRA" if self.rslora else "LoRA"
        name = f"Q{name} ({self.quantization})" if self.qlora else name
        name += {"all": "", "core": " in the loop", "later": " from the second loop on"}[
            self.lora_layers
        ]
        return name + (", one adapter a loop" if self.lora_per_loop else "")


_KEYS = ("text", "prompt", "response", "messages", "group", "instruction", "input",
         "output", "conversations")  # fmt: skip


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """The data's column for each key of a record. Raises `UsageError` for what is no KEY=COLUMN."""
    found: dict[str, str] = {}
    for item in columns:
        key, _, column = item.partition("=")
        if key not in _KEYS or not column or key in found:
            raise UsageError(
                f"`columns` {item}: expected KEY=COLUMN once for a key, the keys being "
                f"{', '.join(_KEYS)}"
            )
        found[key] = column
    return found
