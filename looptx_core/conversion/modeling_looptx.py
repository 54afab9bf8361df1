"""A looped model as transformers' AutoModelForCausalLM opens it.

This file and those that it imports are the model's own sources; `looptx convert --to-hf` copies
them beside the weights, so that the folder needs no other package than torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model(input_ids, loops=4).logits            absent: the depth that config.json has as `loops`
    model.generate(input_ids, loops=4)          absent: each new token stops by the stored rule
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.generation.running_batch import RunningBatch
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.resolve import resolve_exit

TESTED = ("5.0", "5.23")
"""The first and the last version of transformers that this was tested with."""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


if not _version(TESTED[0]) <= _version(transformers.__version__) <= _version(TESTED[1]):
    raise ImportError(
        f"this looptx model was tested with transformers {TESTED[0]} to {TESTED[1]}, not "
        f"{transformers.__version__}; pip install 'transformers>={TESTED[0]},<={TESTED[1]}.99', or "
        "run it by looptx itself"
    )


class LooptxConfig(PretrainedConfig):
    """The model's shape, as `ModelConfig` has it, and under `exit` its own exit rule."""

    model_type = "looptx"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(self, exit: dict[str, Any] | None = None, **kwargs: Any) -> None:
        own = [field.name for field in fields(ModelConfig) if field.name in kwargs]
        shape = ModelConfig(**{name: kwargs.pop(name) for name in own})
        kwargs["tie_word_embeddings"] = shape.tie_embeddings
        super().__init__(**kwargs)
        for name, value in shape.to_dict().items():
            setattr(self, name, value)
        self.exit = exit or {}

    def shape(self) -> ModelConfig:
        names = [field.name for field in fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    def exit_settings(self) -> ExitSettings:
        known = {field.name for field in fields(ExitSettings)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.exit.items()
            if name in known
        }
        return ExitSettings(**given)


class LooptxCache(Cache):
    """A `LoopCache` behind transformers' cache interface."""

    def __init__(self, loop_cache: LoopCache) -> None:
        super().__init__(layers=[])
        self.loop_cache = loop_cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.loop_cache.length

    def get_max_length(self, layer_idx: int = 0) -> int | None:
        return self.loop_cache.capacity

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.loop_cache.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.loop_cache.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.loop_cache.start), device=self.loop_cache.start.device)
        self.loop_cache.select_rows(rows.repeat_interleave(repeats))

    def crop(self, columns: int) -> None:
        """Below 0: drop so many columns. 0: drop none. Above, as versions before 5.23 ask: keep
        so many."""
        kept = self.loop_cache.length - columns
        self.loop_cache.truncate(-columns if columns <= 0 else max(0, kept))


@dataclass
class LooptxOutput(CausalLMOutputWithPast):
    """With the depth of each row's last position, (batch,)."""

    loops: Tensor | None = None


class LooptxForCausalLM(PreTrainedModel, GenerationMixin):
    """A looped transformer. `loops`: a depth, or 'auto', by which new tokens stop by a rule."""

    config_class = LooptxConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: LooptxConfig) -> None:
        super().__init__(config)
        self.model = LoopedTransformer(config.shape())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The model drew its own."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LooptxCache | None = None,
        labels: Tensor | None = None,
        loops: int | str | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Any:
        """input_ids, labels: (batch, new). attention_mask: (batch, seen), 0 for padding.

        logits_to_keep: of so many last places, of all for 0, or of these places, (places,).
        num_items_in_batch: targets of all the batches that a step accumulates, as Trainer counts
        them; their losses then add up to the mean. Absent: the mean over this batch.
        loops: absent: the configuration's `loops`. 'auto' needs the cache that `generate` makes;
        without one, and for a prompt, it is the maximum.
        """
        if past_key_values is None:
            logits, depths = self._uncached(input_ids, attention_mask, loops, logits_to_keep)
        else:
            cache = past_key_values.loop_cache
            if cache.length == 0 and attention_mask is not None:
                cache.pad_left(_padding(attention_mask))
            logits, depths = self._cached(input_ids, cache, loops, logits_to_keep)
        loss = None
        if labels is not None:
            flat, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            if num_items_in_batch is None:
                loss = F.cross_entropy(flat, targets, ignore_index=-100)
            else:
                loss = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        out = LooptxOutput(loss=loss, logits=logits, past_key_values=past_key_values, loops=depths)
        return out if return_dict is not False else out.to_tuple()

    def _uncached(
        self, tokens: Tensor, mask: Tensor | None, loops: int | str | None, keep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        # Padding is a document of its own: nobody else looks at it.
        padded = mask is not None and not bool(mask.all())
        ctx = self.model.context(
            tokens.shape[1], documents=mask.long() if padded and mask is not None else None
        )
        return self._fixed(tokens, self._depth(loops), ctx, keep)

    def _cached(
        self, tokens: Tensor, cache: LoopCache, loops: int | str | None, keep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        new = tokens.shape[1]
        # Drafts that transformers has verified are tokens like those without: each by the rule.
        drafts = keep - (cache.length == 0) if isinstance(keep, int) and keep > 1 else 0
        if loops == "auto" and 0 < drafts <= new:
            found = []
            if new > drafts:
                found.append(self._cached(tokens[:, : new - drafts], cache, loops, 1))
            for place in range(new - drafts, new):
                found.append(self._cached(tokens[:, place : place + 1], cache, loops, 1))
            return torch.cat([logits for logits, _ in found], 1), found[-1][1]
        if loops != "auto" or new > 1 or cache.length == 0:  # a prompt, or more of it
            view = cache.view(new)
            ctx = self.model.context(new, view)
            logits, depths = self._fixed(tokens, self._depth(loops), ctx, keep)
            view.advance()
            return logits, depths
        settings = self.config.exit_settings()
        own = resolve_exit(settings, GenerationOptions(), self.model.config)
        batch = RunningBatch(TorchBackend(self.model), cache)
        batch.add(range(len(tokens)), tokens[:, 0].tolist(), [own] * len(tokens))
        outputs = batch.run()
        rows = [row for output in outputs for row in output.rows]
        order = torch.tensor(rows, device=tokens.device).argsort()
        loops_by_row = torch.tensor([depth for output in outputs for depth in output.loops])
        logits = torch.cat([output.logits for output in outputs])
        return logits[order][:, None], loops_by_row[order.cpu()]

    def _fixed(
        self, tokens: Tensor, loops: int, ctx: Any, keep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        state = embedding = self.model.embed(tokens, ctx)
        for _, after in self.model.iterate(embedding, embedding, ctx, range(1, loops + 1)):
            state = after
        if ctx.view is not None and ctx.view.cache.needs_backfill(loops):
            self.model.backfill(state, embedding, loops, ctx)
        hidden = self.model.coda_hidden(state, ctx)
        logits = self.model.head(
            hidden[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]
        )
        return logits, torch.full((len(tokens),), loops)

    def _depth(self, loops: int | str | None) -> int:
        if loops is None:
            return self.model.config.loops
        if loops == "auto":
            return self.model.config.max_loops
        if not isinstance(loops, int) or loops < 1:
            raise ValueError(f"loops={loops!r}: a depth of at least 1, or 'auto'")
        return loops

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("loops") is None:
            kwargs["loops"] = "auto"
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *_: Any,
    ) -> None:
        """Give `generate` a cache with a slot for each layer and loop."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        loops = model_kwargs.get("loops")
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        settings = self.config.exit_settings()
        fixed = isinstance(loops, int)
        # An assistant's cache serves all its drafts, and the first tells nothing of the last.
        drafts = bool(getattr(generation_config, "is_assistant", False))
        capacity = self.model.config.max_seq_len if drafts else max_cache_length + 1
        model_kwargs["past_key_values"] = LooptxCache(
            self.model.new_cache(
                batch=batch_size * copies,
                capacity=capacity,
                loops=self._depth(loops or "auto"),
                policy="fill" if fixed else settings.kv_policy,
                kind=settings.kv_type,
            )
        )

    def _supports_default_dynamic_cache(self) -> bool:
        return False


def _padding(mask: Tensor) -> Tensor:
    """How many columns at the left are padding, (batch,)."""
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("pad at the left to generate: tokenizer.padding_side = 'left'")
    return (mask == 0).sum(1)
