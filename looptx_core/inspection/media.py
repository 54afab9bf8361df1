"""What the loops do to items of media, and what the model says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import end_id
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import MediaPrompt
from looptx_core.media.batch import MediaItem, batch_items, to_device
from looptx_core.media.registry import MEDIA


def inspect_media(
    loaded: LoadedModel, files: Mapping[str, Sequence[str]], settings: ExitSettings, loops: int
) -> dict[str, list[dict[str, Any]]]:
    """JSON values for each item, by the plural of its medium.

    An item is read as `generate` reads it without a prompt: its name, its extents, `caption`, the
    greedy one, with its `mean_loops`, and what `Medium.inspect` adds. files: by medium.

    Raises `DataError` for a file that can't be read.
    """
    engine = Engine(loaded.model, loaded.tokenizer, settings, ends=loaded.special.ends)
    options = GenerationOptions(temperature=0, max_new_tokens=40)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, some in files.items():
        medium = MEDIA[name]
        for file in some:
            item = medium.read(file, loaded.config)
            (said,) = engine.complete([MediaPrompt("", (item,))], options)
            entry = {
                medium.noun: Path(file).name,
                **dict(zip(medium.grid_names, item.grid)),
                "caption": said.text.strip(),
                "mean_loops": said.mean_loops,
                **medium.inspect(_Walk(loaded, item, loops), item),
            }
            found.setdefault(medium.plural, []).append(entry)
    return found


class _Walk:
    """The loops over an item after an end token, as a record of training begins."""

    head: nn.Module | None
    config: ModelConfig

    def __init__(self, loaded: LoadedModel, item: MediaItem, loops: int) -> None:
        self.model, self.config, self.loops = loaded.model, loaded.config, loops
        self.medium = MEDIA[item.medium]
        self.head = self.model.heads().get(item.medium)
        device = self.model.norm.weight.device
        placeholders = [self.medium.token(loaded.config)] * item.length
        self.tokens = torch.tensor([[end_id(loaded.tokenizer), *placeholders]], device=device)
        self.media = to_device(batch_items([item]), device)

    @torch.no_grad()
    def __call__(self, hidden: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        model, tokens, media = self.model, self.tokens, self.media
        if hidden is not None:
            name, batch = self.medium.name, self.media[self.medium.name]
            media = {name: replace(batch, hidden=hidden.to(tokens.device))}
        ctx = model.context(tokens.shape[1], layout=model.layout(tokens, media))
        for state in model.states(tokens, self.loops, ctx=ctx, media=media):
            yield state[0, 1:], model.coda_hidden(state, ctx)[0, 1:]
