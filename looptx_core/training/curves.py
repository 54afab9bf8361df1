"""Charts of a run, and its sentence: what the loops brought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from looptx_core.atomic import replacing
from looptx_core.documents import printable


def verdict(loss_by_loop: list[float], noise: float = 0.001) -> str:
    """One sentence on held-out loss by loop; differences below `noise` (0.1 %) count as none."""
    first, best = loss_by_loop[0], min(loss_by_loop)
    depth = loss_by_loop.index(best) + 1
    enough = next(i for i, loss in enumerate(loss_by_loop, 1) if loss <= best * (1 + noise))
    gain = 1 - best / first
    if gain <= noise:
        return "On the validation text further loops bring nothing: one loop is as good as any."
    if gain < 0.01:
        return (
            f"On the validation text the loops bring {gain:.1%} of the loss, "
            f"nearly all of it by loop {enough}."
        )
    return (
        f"On the validation text {depth} loops lower the loss by {gain:.1%} against one loop "
        f"({first:.3f} to {best:.3f} nats a token); loop {enough} is already within 0.1 % of it."
    )


def plot_run(records: list[dict[str, Any]], probes: dict[str, list[float]], file: Path) -> None:
    """Loss over the steps, held-out loss by loop, and accuracy by loop of each probe, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    from matplotlib import pyplot as plt

    train = [(r["step"], r["train_loss"]) for r in records if "train_loss" in r]
    val = [(r["step"], r["val_loss_by_loop"]) for r in records if "val_loss_by_loop" in r]
    figure, axes = plt.subplots(1, 2 + bool(probes), figsize=(5 * (2 + bool(probes)), 4))
    over, by_loop = axes[0], axes[1]
    if train:
        over.plot(*zip(*train), color="0.7", label="training, last loop", marker=_marker(train))
    if val:
        (steps, losses), last, mark = zip(*val), val[-1][1], _marker(val)
        over.plot(steps, [own[0] for own in losses], label="validation, loop 1", marker=mark)
        label = f"validation, loop {len(last)}"
        over.plot(steps, [own[-1] for own in losses], label=label, marker=mark)
        by_loop.plot(range(1, len(last) + 1), last, marker="o")
    over.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    if train or val:
        over.legend(frameon=False)
    by_loop.set(xlabel="loop", ylabel="loss (nats a token)", title="Held-out text, by loop")
    if probes:
        for name, accuracy in probes.items():
            axes[2].plot(range(1, len(accuracy) + 1), accuracy, marker="o", label=printable(name))
        axes[2].set(xlabel="loop", ylabel="accuracy", title="Lines that need depth", ylim=(0, 1))
        axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def _marker(points: list[Any]) -> str | None:
    """A line through a single point is nothing to be seen."""
    return "o" if len(points) == 1 else None
