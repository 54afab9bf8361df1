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
    """A run, a model folder or hf:OWNER/NAME; absent: the newest finished run that can be written
    as asked, else the bundled model."""
    from_hf: str | None = None
    """Read this folder of Hugging Face's format, or hf:OWNER/NAME: one of `to_hf`, or a plain
    Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) or OLMo 2."""
    from_gguf: str | None = None
    """Read this GGUF file, llama.cpp's format, with a plain Llama, Qwen2, Qwen3, Gemma 3 or OLMo 2,
    or a looped Nanbeige (extra `gguf`)."""
    core: str | None = None
    """from_hf, from_gguf: loop the layers A to B-1 of a plain model, as A:B, counted from 0; auto
    takes those from 0.4 to 0.6 of the depth. One loop stays the source; absent: one loop alone."""
    max_loops: int | None = None
    """core: the most loops, 2 or more; absent: 4, and 2 with half_steps."""
    injection: Literal["bridge", "half_steps"] | None = None
    """core: what later loops are. bridge: they add nothing until they are trained; half_steps: the
    second one takes the core in half steps, untrained; absent: bridge."""
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

    memory: Literal["infini", "delta"] | None = None
    """Give the model a memory of what leaves a window of attention, with gates that start nearly
    closed; train or finetune it afterwards."""
    memory_window: int = 128
    """memory: tokens that are attended to exactly, a multiple of memory_block."""
    memory_block: int = 64
    """memory: tokens that are written into it at once."""

    adapter: str | None = None
    """An adapter of looptx finetune, for `merge_adapter`."""
    merge_adapter: bool = False
    """Put the adapter into its base's weights."""

    to_hf: bool = False
    """Write a folder that transformers opens by itself, with trust_remote_code."""
    to_onnx: bool = False
    """Write a graph of a fixed depth that onnxruntime and onnxruntime-genai open (extra `onnx`)."""
    to_gguf: bool = False
    """Write a GGUF file of a fixed depth for llama.cpp and Ollama, of a model that is a stack of
    their layers (extra `gguf`)."""
    loops: int | None = None
    """to_onnx, to_gguf: loops that are written; absent: the depth of a plain call, which training
    stores."""
    dtype: Literal["float32", "bf16", "fp16", "int8"] | None = None
    """Number type of the stored weights; int8: the matrices, each row with a scale, or Q8_0 in a
    GGUF file; absent: as they are."""
    shard_size: str = "5GB"
    """The most bytes in a file of weights, such as 500MB."""

    def __post_init__(self) -> None:
        check_ranges(self)
        steps = (self.to_bitnet, self.to_hf, self.to_onnx, self.to_gguf, self.foreign, self.dtype,
                 self.merge_adapter, self.memory)  # fmt: skip
        if not any(steps):
            raise UsageError(
                "nothing to convert to; pass `to_bitnet`, `to_hf`, `to_onnx`, `to_gguf`, `from_hf` "
                "FOLDER, `from_gguf` FILE, `dtype`, `memory` or `adapter` A with `merge_adapter`"
            )
        for name in ("memory", "to_onnx", "to_gguf"):
            for other in ("to_bitnet", "to_hf", "memory", "to_onnx"):
                if name != other and getattr(self, name) and getattr(self, other):
                    raise UsageError(f"`{name}` and `{other}` are two steps; leave one of them out")
        if self.loops is not None and not self.unrolled:
            raise UsageError("`loops` is the depth of `to_onnx` or `to_gguf`; pass one of them too")
        if self.to_onnx and self.dtype in ("bf16", "fp16"):
            raise UsageError(
                f"`to_onnx` stores float32 or int8, not {self.dtype}; give another `dtype`"
            )
        if self.unrolled and self.shard_size != type(self).shard_size:
            raise UsageError(
                f"`shard_size` is not for `{self.unrolled}`, whose weights lie in one file; leave "
                "it out"
            )
        if self.to_gguf and self.out and self.out.endswith(".gguf"):
            raise UsageError(
                f"`out` {self.out}: a folder, in which the file gets a name with its number type; "
                "leave .gguf out"
            )
        if self.direct and not self.to_bitnet:
            raise UsageError("`direct` is a way of `to_bitnet`; pass both")
        if self.dtype == "int8" and (self.to_bitnet or self.to_hf):
            raise UsageError(
                "`dtype` int8 is looptx's own storage of a model that is neither ternary nor for "
                "transformers; leave out `to_bitnet` and `to_hf`, or give another `dtype`"
            )
        if self.merge_adapter != bool(self.adapter):
            raise UsageError("`adapter` and `merge_adapter` go together; pass both")
        name = "from_hf" if self.from_hf else "from_gguf"
        if self.foreign and (self.model or self.adapter):
            raise UsageError(f"`{name}` reads a model of its own; leave `model` and `adapter` out")
        if self.from_hf and self.from_gguf:
            raise UsageError("`from_hf` and `from_gguf` each read a model; pass one of them")
        if self.foreign and (then := self.unrolled):
            again = {"to_onnx": "looptx convert --to-onnx --model FOLDER",
                     "to_gguf": "looptx convert --to-gguf --model FOLDER"}[then]  # fmt: skip
            raise UsageError(
                f"`{name}` and `{then}` are two steps; leave `{then}` out, then run {again} on "
                "what the first one wrote"
            )
        if self.core is not None and not self.foreign:
            raise UsageError("`core` is for a plain model of `from_hf` or `from_gguf`; pass one")
        if self.core is not None and not re.fullmatch(r"auto|\d{1,6}:\d{1,6}", self.core):
            raise UsageError(f"`core` must be A:B, such as 12:18, or auto, not {self.core!r}")
        # Beside a model of ours it is without effect: LOOPTX_MAX_LOOPS may be set for trainings.
        if self.max_loops is not None and self.foreign and self.core is None:
            raise UsageError("`max_loops` is of the layers of `core`; pass `core` auto or A:B too")
        if self.core is not None and self.max_loops == 1:
            raise UsageError(
                "`max_loops` 1: `core` is what later loops run; give 2 or more, or leave `core` out"
            )
        if self.injection is not None and self.core is None:
            raise UsageError("`injection` is of the loops of `core`; pass `core` auto or A:B too")
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", self.shard_size):
            raise UsageError(f"shard_size must be such as 500MB or 5GB, not {self.shard_size!r}")

    @property
    def foreign(self) -> str | None:
        """The folder or the file of another format that is read."""
        return self.from_hf or self.from_gguf

    @property
    def unrolled(self) -> Literal["to_onnx", "to_gguf"] | None:
        """The format of others in which a fixed depth is written."""
        return "to_onnx" if self.to_onnx else "to_gguf" if self.to_gguf else None

    @property
    def suffix(self) -> str:
        """What the new folder's name says was done."""
        steps = (
            (bool(self.foreign), "looptx"),
            (self.merge_adapter, "merged"),
            (self.memory is not None, self.memory),
            (self.to_bitnet, "bitnet"),
            (self.dtype is not None, self.dtype),
            (self.to_hf, "hf"),
            (self.to_onnx, "onnx"),
            (self.to_gguf, "gguf"),
        )
        return "-".join(str(name) for done, name in steps if done)
