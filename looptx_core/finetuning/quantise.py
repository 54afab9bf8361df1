"""A frozen base in 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.errors import MissingError
from looptx_core.finetuning.quiet_peft import load_bitsandbytes
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.loop import LoopedTransformer


def quantise(model: LoopedTransformer, kind: str) -> None:
    """Replace the blocks' linear layers, in place; embedding and output head become bf16.

    Norms, injection and the confidence head stay as they are, and so does the activations' type.

    kind: nf4 (QLoRA's, arXiv 2305.14314, its scales quantised too) or int8 (LLM.int8(),
    arXiv 2208.07339).
    Raises `MissingError` where bitsandbytes is missing or can't run.
    """
    _check(kind)
    for stack in (model.prelude, model.core, model.coda):
        for parent in list(stack.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, _quantised(layer, kind))
    _narrow(model)
    # PEFT looks here, and a merge goes wrong without.
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


class _NarrowEmbedding(nn.Embedding):
    """Stored in bf16, its output float32."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).float()


class _NarrowHead(nn.Linear):
    """Stored in bf16, computed in its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _narrow(model: LoopedTransformer) -> None:
    embedding, head = model.embedding, model.head
    tied = head.weight is embedding.weight
    with init_empty_weights():
        words, width = embedding.weight.shape
        model.embedding = _NarrowEmbedding(words, width)
        model.head = _NarrowHead(width, words, bias=False)
    narrow = [nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
              for layer in (embedding, head)]  # fmt: skip
    model.embedding.weight = narrow[0]
    model.head.weight = narrow[0] if tied else narrow[1]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they lie in memory, with what quantisation adds; tied ones once."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _quantised(layer: nn.Linear, kind: str) -> nn.Module:
    bnb = load_bitsandbytes()

    new: Any
    shape: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "bias": layer.bias is not None,
    }
    weight = layer.weight.detach()
    if kind == "nf4":
        new = bnb.nn.Linear4bit(**shape, quant_type="nf4", compress_statistics=True)
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        # Its own layout for evaluation on CPUs would be read as the other one in training.
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return new.to(weight.device)


def _check(kind: str) -> None:
    try:
        with torch.no_grad():
            found = _quantised(nn.Linear(64, 64, bias=False), kind)(torch.ones(1, 64))
        assert found.isfinite().all()
    except ImportError as error:
        raise MissingError(
            "`qlora` needs bitsandbytes, which can't be imported here "
            f"({str(error).splitlines()[0]}); pip install bitsandbytes, or use `lora`"
        ) from error
    except Exception as error:  # what a missing kernel raises depends on the platform
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingError(
            f"`qlora`: bitsandbytes can't run {kind} here ({reason}); "
            "install a build for this machine, or use `lora`"
        ) from error
