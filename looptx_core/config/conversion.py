"""What a conversion is: which steps lie between the model that is read and the one written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `looptx convert`, after merging."""

    model: str | None = None
    """A run or a model folder; absent: the newest finished run, else the bundled model."""
    from_hf: str | None = None
    """Read this folder of Hugging Face's format: one of `to_hf`, or a plain Llama or Qwen3."""
    out: str | None = None
    """The new model folder; absent: the model's name with what was done, such as x-bitnet."""

    to_bitnet: bool = False
    """Ternary weights, two bits each (BitNet b1.58, arXiv 2402.17764), trained into them."""
    direct: bool = False
    """to_bitnet: only round, without any training."""
    finetune_steps: int = 200
    """to_bitnet: optimizer steps of the training through the rounding."""
    max_minutes: float = 4.5
    """to_bitnet: train no longer than this."""
    lr: float = 1e-2
    """to_bitnet: peak learning rate."""
    data: tuple[str, ...] = ()
    """What to train on and to judge by: tokenised shards, raw text, records as for finetune, or
    records of media; absent: the model's own data."""
    seed: int = 0
    """to_bitnet: seed of the order of the data and of the depths."""

    adapter: str | None = None
    """An adapter of looptx finetune, for `merge_adapter`."""
    merge_adapter: bool = False
    """Put the adapter into its base's weights."""

    to_hf: bool = False
    """Write a folder that transformers opens by itself, with trust_remote_code."""
    dtype: Literal["float32", "bf16", "fp16"] | None = None
    """Number type of the stored weights; absent: as they are."""
    shard_size: str = "5GB"
    """The most bytes in a file of weights, such as 500MB."""

    def __post_init__(self) -> None:
        if not (self.to_bitnet or self.to_hf or self.from_hf or self.dtype or self.merge_adapter):
            raise UsageError(
                "nothing to convert to; pass `to_bitnet`, `to_hf`, `from_hf` FOLDER, `dtype` or "
                "`adapter` A with `merge_adapter`"
            )
        if self.direct and not self.to_bitnet:
            raise UsageError("`direct` is a way of `to_bitnet`; pass both")
        if self.merge_adapter != bool(self.adapter):
            raise UsageError("`adapter` and `merge_adapter` go together; pass both")
        if self.from_hf and (self.model or self.adapter):
            raise UsageError("`from_hf` reads a folder of its own; leave `model` and `adapter` out")
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", self.shard_size):
            raise UsageError(f"shard_size must be such as 500MB or 5GB, not {self.shard_size!r}")
        check_ranges(self)

    @property
    def suffix(self) -> str:
        """What the new folder's name says was done."""
        steps = (
            (bool(self.from_hf), "looptx"),
            (self.merge_adapter, "merged"),
            (self.to_bitnet, "bitnet"),
            (self.dtype is not None, self.dtype),
            (self.to_hf, "hf"),
        )
        return "-".join(str(name) for done, name in steps if done)
