"""A report's figures, drawn from its document alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from looptx_core.documents import printable
from looptx_core.media.base import Figure
from looptx_core.media.registry import MEDIA

Document = dict[str, Any]

_COLOURS = {
    "auto": "tab:blue",
    "confidence": "tab:orange",
    "gain": "tab:green",
    "kl": "tab:red",
    "entropy": "tab:purple",
    "maxprob": "tab:brown",
    "change": "tab:pink",
    "fixed": "black",
    "oracle": "0.6",
}


def plot_figures(document: Document, folder: Path) -> dict[str, Path]:
    """Write the PNGs and return them by title."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    from matplotlib import pyplot as plt

    makers = {
        "What each loop brings": ("loops.png", _loops, 3),
        "The confidence where tokens stop": ("confidence.png", _confidence, 2),
        "Quality against depth": ("frontier.png", _frontier, 2),
    }
    if document["tasks"]:
        makers["Lines that need depth"] = ("tasks.png", _tasks, 2)
    plots = {
        title: Figure(name, partial(make, document), count)
        for title, (name, make, count) in makers.items()
    }
    for medium in MEDIA.values():
        for number, found in enumerate(document[medium.plural], start=1):
            plots |= medium.figures(found, number)
    made = {}
    for title, (name, make, count) in plots.items():
        figure, axes = plt.subplots(1, count, figsize=(5 * count, 4))
        make(axes)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        made[title] = folder / name
    return made


def _loops(document: Document, axes: Any) -> None:
    loops = range(1, document["loops"] + 1)
    axes[0].plot(loops, document["bits_per_byte_by_loop"], marker="o")
    axes[0].set(xlabel="loop", ylabel="bits per byte", title="Held-out text")
    further = list(loops)[1:]
    axes[1].bar(further, [100 * x for x in document["fixed_by_loop"]], label="mended")
    axes[1].bar(further, [-100 * x for x in document["broken_by_loop"]], label="broken")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set(xlabel="loop", ylabel="% of tokens", title="Answers that the loop changed")
    axes[1].legend(frameon=False)
    axes[2].plot(further, document["state_change_by_loop"], marker="o", label="|change| / |state|")
    axes[2].plot(further, document["kl_by_loop"], marker="o", label="KL to the loop before, nats")
    axes[2].set(xlabel="loop", yscale="log", title="How far the loop moves the state")
    axes[2].legend(frameon=False)


def _confidence(document: Document, axes: Any) -> None:
    axes[0].plot([0, 1], [0, 1], color="0.8")
    for key, name in (("reliability_before", "as it comes"), ("reliability", "calibrated")):
        bins = document[key]
        error = document["ece_before" if key.endswith("before") else "ece"]
        axes[0].plot(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            marker="o",
            label=f"{name}, ECE {error:.3f}",
        )
    axes[0].set(xlabel="confidence", ylabel="accuracy", title="Reliability")
    axes[0].legend(frameon=False)
    rows = document["confidence_by_loop"]
    loops = range(1, len(rows) + 1)
    for key, name in (("auroc", "stated"), ("auroc_head", "by the confidence head alone"),
                      ("auroc_maxprob", "max-probability")):  # fmt: skip
        values = [float("nan") if row[key] is None else row[key] for row in rows]
        axes[1].plot(loops, values, marker="o", label=name)
    axes[1].set(xlabel="loop", ylabel="AUROC", title="Is the top token right?")
    axes[1].legend(frameon=False)


def _frontier(document: Document, axes: Any) -> None:
    full = document["choice"]["full_depth_loss"]
    for axis, key, label in ((axes[0], "mean_loops", "mean loops"),
                             (axes[1], "flops", "FLOPs, share of full depth")):  # fmt: skip
        for rule, colour in _COLOURS.items():
            points = sorted(
                (p[key], 100 * (p["loss"] / full - 1))
                for p in document["frontier"]
                if p["rule"] == rule
            )
            # `auto` has two thresholds, so that only its lower edge is a curve.
            best: list[tuple[float, float]] = []
            for point in points:
                if not best or point[1] < best[-1][1]:
                    best.append(point)
            if points:
                axis.plot(*zip(*best), color=colour, marker=".", label=rule)
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.set(xlabel=label, ylabel="loss above full depth, %")
        worst = max(100 * (p["loss"] / full - 1) for p in document["frontier"]
                    if p["rule"] == "fixed")  # fmt: skip
        axis.set_ylim(-max(worst, 0.2), max(1.3 * worst, 0.2))
    axes[0].set(title="Exit rules")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set(title="The same by compute, read-outs counted")


def _tasks(document: Document, axes: Any) -> None:
    for task in document["tasks"]:
        accuracy = task["accuracy_by_loop"]
        axes[0].plot(
            range(1, len(accuracy) + 1), accuracy, marker="o", label=printable(task["name"])
        )
    axes[0].set(xlabel="loop", ylabel="accuracy", ylim=(0, 1.02), title="By loop")
    axes[0].legend(frameon=False)
    names = [printable(task["name"]) for task in document["tasks"]]
    axes[1].bar(names, [task["mean_loops"] for task in document["tasks"]])
    axes[1].set(ylabel="mean loops", title="Depth that the exit chose")
