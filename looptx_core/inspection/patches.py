"""What the loops do to a picture: how far each further one moves the state of each patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.data.pictures import read_picture
from looptx_core.data.tokenizer import end_id
from looptx_core.generation.engine import Engine, PicturePrompt
from looptx_core.model.vision import Picture, Pictures, together
from looptx_core.training.reconstruction import draw, places_of


def look_at(
    loaded: LoadedModel, files: Sequence[str], settings: ExitSettings, loops: int
) -> list[dict[str, Any]]:
    """JSON values for each picture, as `generate --image` would read it without a prompt.

    `change_by_loop`: from the second loop on, for each row and column of patches the state's
    relative step |s[t] - s[t-1]| / |s[t]|. `caption`: the greedy one, with `mean_loops`. `shown`:
    what the model sees, rows of pixels of red, green and blue. Where hidden patches were learned to
    be drawn: `confidence_by_loop`, for each patch how sure the model is to draw it well from the
    others, and `error_by_loop`, how it does, in the patch's own deviations; absent elsewhere.

    Raises `DataError` for a picture that can't be read.
    """
    engine = Engine(loaded.model, loaded.tokenizer, settings)
    options = GenerationOptions(temperature=0, max_new_tokens=40)
    found = []
    for file in files:
        picture = read_picture(file, loaded.config)
        (said,) = engine.complete([PicturePrompt("", (picture,))], options)
        found.append(
            {
                "picture": Path(file).name,
                "rows": picture.rows,
                "columns": picture.columns,
                "caption": said.text.strip(),
                "mean_loops": said.mean_loops,
                "change_by_loop": _changes(loaded, picture, loops),
                "shown": _pixels(picture, loaded.config.patch_size),
                **(_restored(loaded, picture, loops) if loaded.config.reconstruct else {}),
            }
        )
    return found


@torch.no_grad()
def _changes(loaded: LoadedModel, picture: Picture, loops: int) -> list[list[list[float]]]:
    """(loops - 1, rows, columns)."""
    tokens, pictures = _alone(loaded, picture)
    states = torch.cat([state for state, _ in _walk(loaded, tokens, pictures, loops)])
    states = states[:, 1:].float()  # the end token stands before the picture
    moved = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    return _maps(moved.cpu(), picture)


@torch.no_grad()
def _restored(loaded: LoadedModel, picture: Picture, loops: int) -> dict[str, Any]:
    """Each patch is hidden once, with others that lie apart from it."""
    tokens, pictures = _alone(loaded, picture)
    count = len(picture.patches)
    row, column = torch.arange(count) // picture.columns, torch.arange(count) % picture.columns
    turn = 2 * (row % 2) + column % 2
    sure, error = torch.zeros(loops, count), torch.zeros(loops, count)
    for hidden in (turn == number for number in range(4)):
        if hidden.any():
            there = hidden.to(tokens.device)
            covered = replace(pictures, hidden=there)
            places = places_of(tokens, loaded.config.image_token, there)
            for loop, (_, decoded) in enumerate(_walk(loaded, tokens, covered, loops)):
                drawn = draw(loaded.model, decoded, places, covered)
                sure[loop, hidden] = drawn.logit.float().sigmoid().cpu()
                error[loop, hidden] = drawn.error.float().cpu()
    return {"confidence_by_loop": _maps(sure, picture), "error_by_loop": _maps(error, picture)}


def _alone(loaded: LoadedModel, picture: Picture) -> tuple[Tensor, Pictures]:
    """The picture after an end token, as a record of training begins."""
    pictures = together([picture])
    assert pictures is not None
    images = [loaded.config.image_token] * len(picture.patches)
    device = loaded.model.norm.weight.device
    tokens = torch.tensor([[end_id(loaded.tokenizer), *images]], device=device)
    return tokens, pictures.to(device)


def _walk(
    loaded: LoadedModel, tokens: Tensor, pictures: Pictures, loops: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The state after each loop, and what the head reads of it."""
    model = loaded.model
    around = model.surroundings(tokens.shape[1], layout=model.layout(tokens, pictures))
    for state in model.states(tokens, loops, around=around, pictures=pictures):
        yield state, model.decode(state, around)


def _maps(values: Tensor, picture: Picture) -> list[list[list[float]]]:
    """(maps, patches) by row and column."""
    grids = values.view(-1, picture.rows, picture.columns).tolist()
    return [[[round(value, 4) for value in row] for row in grid] for grid in grids]


def _pixels(picture: Picture, side: int) -> list[list[list[int]]]:
    patches = picture.patches.view(picture.rows, picture.columns, side, side, 3)
    whole = patches.permute(0, 2, 1, 3, 4).reshape(picture.rows * side, picture.columns * side, 3)
    return ((whole + 1) * 127.5).round().int().tolist()
