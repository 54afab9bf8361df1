"""What the loops do to a clip: how far each further one moves the states of each step of time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from looptx_core.documents import printable
from looptx_core.media.base import POSITION, Figure, Walk
from looptx_core.media.batch import MediaItem

_SHOWN = 4  # loops on a terminal


def inspect(walk: Walk, item: MediaItem) -> dict[str, Any]:
    """JSON values for one clip.

    `change_by_loop`: from the second loop on, for each step of two frames and each row and column
    of patches the state's relative step |s[t] - s[t-1]| / |s[t]|. `seconds`: of the clip.
    """
    states = torch.stack([state for state, _ in walk()]).float()
    moved = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    steps, rows, columns, positions = item.grid
    maps = moved.view(-1, steps, rows, columns)
    rounded = [[[[round(v, 4) for v in row] for row in m] for m in loop] for loop in maps.tolist()]
    return {"seconds": round(steps * positions * POSITION, 2), "change_by_loop": rounded}


def sentences(found: Mapping[str, Any]) -> list[str]:
    means = [sum(loop) / len(loop) for loop in _over_time(found)]
    steps = ", ".join(f"{mean:.1%} at loop {loop}" for loop, mean in enumerate(means, 2))
    return [
        f"{found['clip']}, {found['seconds']:g} s: '{found['caption']}'; its states move by "
        f"{steps or 'nothing, with one loop'}."
    ]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The first loops below each other over time, in percent."""
    changes = _over_time(found)[:_SHOWN]
    if not changes:
        return []
    each = found["seconds"] / len(changes[0])
    times = "".join(f"{step * each:5.1f}" for step in range(len(changes[0])))
    shown = [f"{found['clip']}: how far a loop moves each step of time, %", f"seconds {times}"]
    for loop, values in enumerate(changes, 2):
        shown.append(f"loop {loop:<3}" + "".join(f"{100 * value:5.0f}" for value in values))
    return shown


def figures(found: Mapping[str, Any], number: int) -> dict[str, Figure]:
    title = f"How far each loop moves the steps of {found['clip']}"
    return {title: Figure(f"steps-{number}.png", partial(_plot, found=found), 1)}


def _plot(axes: Any, found: Mapping[str, Any]) -> None:
    changes = _over_time(found)
    if changes:
        extent = (0, found["seconds"], len(changes) + 1.5, 1.5)
        drawn = axes.imshow(changes, aspect="auto", extent=extent, vmin=0, cmap="viridis")
        axes.figure.colorbar(drawn, ax=axes, label="|change| / |state|")
    axes.set(title=printable(found["caption"][:40]), xlabel="seconds", ylabel="loop")


def _over_time(found: Mapping[str, Any]) -> list[list[float]]:
    """The mean over each step's patches, by loop and step."""
    patches = found["rows"] * found["columns"]
    return [[sum(map(sum, step)) / patches for step in loop] for loop in found["change_by_loop"]]
