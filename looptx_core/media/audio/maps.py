"""What the loops do to a recording: how far each further one moves the state of each moment."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from looptx_core.documents import printable
from looptx_core.media.base import POSITION, Figure, Walk
from looptx_core.media.batch import MediaItem

_SHOWN = 4  # loops that are shown on a terminal
_WIDTH = 24  # moments on a terminal, each the mean of some tokens


def inspect(walk: Walk, item: MediaItem) -> dict[str, Any]:
    """JSON values for one recording.

    `seconds`. `change_by_loop`: from the second loop on, for each token of 80 ms the state's
    relative step |s[t] - s[t-1]| / |s[t]|. `loudness`: the mean log-mel of each token.
    """
    states = torch.stack([state for state, _ in walk()]).float()
    moved = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    return {
        "seconds": round(item.length * POSITION, 2),
        "change_by_loop": [[round(value, 4) for value in loop] for loop in moved.tolist()],
        "loudness": [round(value, 4) for value in item.features.mean(1).tolist()],
    }


def sentences(found: Mapping[str, Any]) -> list[str]:
    means = [sum(loop) / len(loop) for loop in found["change_by_loop"]]
    steps = ", ".join(f"{mean:.1%} at loop {loop}" for loop, mean in enumerate(means, 2))
    return [
        f"{found['recording']}, {found['seconds']:g} s: '{found['caption']}'; its states move by "
        f"{steps or 'nothing, with one loop'}."
    ]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The first loops below each other over time, in percent."""
    changes = found["change_by_loop"][:_SHOWN]
    if not changes:
        return []
    per = -(-len(changes[0]) // _WIDTH)
    starts = range(0, len(changes[0]), per)
    times = "".join(f"{start * POSITION:5.1f}" for start in starts)
    shown = [f"{found['recording']}: how far a loop moves each moment, %", f"seconds {times}"]
    for loop, values in enumerate(changes, 2):
        means = [sum(values[s : s + per]) / len(values[s : s + per]) for s in starts]
        shown.append(f"loop {loop:<3}" + "".join(f"{100 * mean:5.0f}" for mean in means))
    return shown


def figures(found: Mapping[str, Any], number: int) -> dict[str, Figure]:
    title = f"How far each loop moves the moments of {found['recording']}"
    return {title: Figure(f"moments-{number}.png", partial(_plot, found=found), 2)}


def _plot(axes: Any, found: Mapping[str, Any]) -> None:
    """The loudness over time, and below the map of loops over time."""
    loudness, changes = found["loudness"], found["change_by_loop"]
    seconds = [n * POSITION for n in range(len(loudness))]
    axes[0].plot(seconds, loudness)
    axes[0].set(title=printable(found["caption"][:40]), xlabel="seconds", ylabel="loudness")
    if changes:
        extent = (0, found["seconds"], len(changes) + 1.5, 1.5)
        drawn = axes[1].imshow(changes, aspect="auto", extent=extent, vmin=0, cmap="viridis")
        axes[1].figure.colorbar(drawn, ax=axes[1], label="|change| / |state|")
    axes[1].set(xlabel="seconds", ylabel="loop")
