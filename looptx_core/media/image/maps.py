"""What the loops do to an image: how far each further one moves the state of each patch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from looptx_core.documents import printable
from looptx_core.media.base import Figure, Walk
from looptx_core.media.batch import MediaBatch, MediaItem
from looptx_core.media.image.masked import reconstruct

_SHOWN = 4  # loops of an image that are plotted


def inspect(walk: Walk, item: MediaItem) -> dict[str, Any]:
    """JSON values for one image.

    `change_by_loop`: from the second loop on, for each row and column of patches the state's
    relative step |s[t] - s[t-1]| / |s[t]|. `shown`: what the model sees, rows of pixels of red,
    green and blue. Where hidden patches were learned to be drawn: `confidence_by_loop`, for each
    patch how sure the model is to draw it well from the others, and `error_by_loop`, its error in
    the patch's own variance; absent elsewhere.
    """
    return {
        "change_by_loop": _changes(walk, item),
        "shown": _pixels(item, walk.config.patch_size),
        **(_restored(walk, item) if walk.head is not None else {}),
    }


def sentences(found: Mapping[str, Any]) -> list[str]:
    patches = found["rows"] * found["columns"]
    means = [sum(map(sum, grid)) / patches for grid in found["change_by_loop"]]
    steps = ", ".join(f"{mean:.1%} at loop {loop}" for loop, mean in enumerate(means, 2))
    said = [
        f"{found['picture']}, {found['rows']} x {found['columns']} patches: "
        f"'{found['caption']}'; their states move by {steps or 'nothing, with one loop'}."
    ]
    if "confidence_by_loop" in found:
        sure, error = (
            sum(map(sum, found[key][-1])) / patches
            for key in ("confidence_by_loop", "error_by_loop")
        )
        said.append(
            f"Each patch hidden once: it is {sure:.0%} sure to draw one well, and is off by "
            f"{error:.2f} of a patch's variance."
        )
    return said


def lines(found: Mapping[str, Any]) -> list[str]:
    """Maps of the first loops side by side, in percent."""
    maps = found["change_by_loop"][:_SHOWN]
    if not maps:
        return []
    width = 4 * found["columns"] + 3
    heads = (f"loop {loop}".ljust(width) for loop in range(2, 2 + len(maps)))
    shown = [
        f"{found['picture']}: how far a loop moves each patch, %",
        "".join(heads).rstrip(),
    ]
    for row in zip(*maps):
        cells = ("".join(f"{100 * value:4.0f}" for value in part).ljust(width) for part in row)
        shown.append("".join(cells).rstrip())
    return shown


def figures(found: Mapping[str, Any], number: int) -> dict[str, Figure]:
    changes = found["change_by_loop"]
    most = max((value for grid in changes for row in grid for value in row), default=1.0)
    moved = partial(
        _plot, found=found, maps=changes, first=2, most=most, label="|change| / |state|"
    )
    made = {
        f"How far each loop moves the patches of {found['picture']}": Figure(
            f"patches-{number}.png", moved, 1 + min(_SHOWN, len(changes))
        )
    }
    if sure := found.get("confidence_by_loop"):
        hidden = partial(_plot, found=found, maps=sure, first=1, most=1.0, label="P(drawn well)")
        made[f"How sure the model is to draw a hidden patch of {found['picture']}"] = Figure(
            f"hidden-{number}.png", hidden, 1 + min(_SHOWN, len(sure))
        )
    return made


def _plot(
    axes: Any, found: Mapping[str, Any], maps: Any, first: int, most: float, label: str
) -> None:
    """The image, and a map for each loop from `first` on."""
    axes = axes if hasattr(axes, "__len__") else [axes]
    axes[0].imshow(found["shown"])
    axes[0].set(title=printable(found["caption"][:40]), xticks=[], yticks=[])
    for loop, (axis, grid) in enumerate(zip(axes[1:], maps), start=first):
        drawn = axis.imshow(grid, vmin=0, vmax=most, cmap="viridis")
        axis.set(title=f"loop {loop}", xticks=[], yticks=[])
        if axis is axes[-1]:
            axis.figure.colorbar(drawn, ax=axis, label=label)


@torch.no_grad()
def _changes(walk: Walk, item: MediaItem) -> list[list[list[float]]]:
    """(loops - 1, rows, columns)."""
    states = torch.stack([state for state, _ in walk()]).float()
    moved = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    return _maps(moved.cpu(), item)


@torch.no_grad()
def _restored(walk: Walk, item: MediaItem) -> dict[str, Any]:
    """Each patch is hidden once, with others that lie apart from it."""
    assert walk.head is not None
    count, columns = len(item.features), item.grid[1]
    row, column = torch.arange(count) // columns, torch.arange(count) % columns
    turn = 2 * (row % 2) + column % 2
    sure: list[Tensor] = []
    error: list[Tensor] = []
    for hidden in (turn == number for number in range(4)):
        if hidden.any():
            numbers = torch.arange(count).masked_fill(~hidden, -1)
            for loop, (_, decoded) in enumerate(walk(hidden)):
                if loop == len(sure):
                    sure.append(torch.zeros(count))
                    error.append(torch.zeros(count))
                there = numbers.to(decoded.device)
                batch = MediaBatch(item.features.to(decoded.device), torch.tensor([item.grid]))
                drawn = reconstruct(walk.head, decoded[None], there[None], batch)
                sure[loop][hidden] = drawn.logit.float().sigmoid().cpu()
                error[loop][hidden] = drawn.error.float().cpu()
    return {
        "confidence_by_loop": _maps(torch.stack(sure), item),
        "error_by_loop": _maps(torch.stack(error), item),
    }


def _maps(values: Tensor, item: MediaItem) -> list[list[list[float]]]:
    """(maps, patches) by row and column."""
    grids = values.view(-1, *item.grid).tolist()
    return [[[round(value, 4) for value in row] for row in grid] for grid in grids]


def _pixels(item: MediaItem, side: int) -> list[list[list[int]]]:
    rows, columns = item.grid
    patches = item.features.view(rows, columns, side, side, 3)
    whole = patches.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    return ((whole + 1) * 127.5).round().int().tolist()
