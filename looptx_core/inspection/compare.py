"""Runs side by side: one JSON document, from which all tables and figures are made."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looptx_core.atomic import write_file
from looptx_core.checkpoint.run_summary import RunDetails, read_run
from looptx_core.documents import read_json
from looptx_core.errors import LooptxError, UsageError
from looptx_core.inspection.figures import FIGURES
from looptx_core.inspection.tables import Table

SCHEMA_VERSION = 1

# Settings that make no difference to the result, and what the data decides.
_NO_SETTINGS = {"out", "save_every", "keep", "log_every", "workers", "nvme_path",
                "model.vocab_size"}  # fmt: skip
_REPORT = "report.json"

Document = dict[str, Any]


def compare(folders: Sequence[Path]) -> Document:
    """What runs reached, and the settings in which they differ.

    A run has a `frontier` where `looptx inspect-loops` measured it: its newest `report.json`, in
    the run's folder, in one within it, or in an `inspect-loops-<n>` beside it.

    Raises `DataError` or `UsageError` for a folder that is no run, or a damaged one.
    """
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": _differences(runs),
        "runs": [_row(name, run) for name, run in zip(names, runs)],
    }


def table(document: Document) -> Table:
    """A row for each run: its figures, then the settings in which the runs differ."""
    columns = {key: title for key, title in _COLUMNS.items() if _any(document, key)}
    settings = document["settings"]
    rows = []
    for place, run in enumerate(document["runs"]):
        values = [run["name"], *(run[key] for key in columns)]
        rows.append([*values, *(chosen[place] for chosen in settings.values())])
    return ["run", *columns.values(), *settings], rows


_COLUMNS = {
    "steps": "steps",
    "tokens": "tokens",
    "best_loss": "loss",
    "best_bits_per_byte": "bits per byte",
    "mean_loops": "mean loops",
    "tokens_per_second": "tokens/s",
    "training_flops": "training FLOPs",
    "bytes": "bytes",
    "ece": "ECE",
    "auroc": "AUROC",
    "exit_loops": "loops by the exit",
    "exit_loss": "loss by the exit",
}


def _any(document: Document, key: str) -> bool:
    return any(run[key] is not None for run in document["runs"])


def _row(name: str, run: RunDetails) -> Document:
    summary, facts = run.summary, run.facts
    report = _report_of(summary.folder)
    choice = report.get("choice") if isinstance(report.get("choice"), dict) else {}
    assert isinstance(choice, dict)
    return {
        "name": name,
        **{key: value for key, value in summary.to_dict().items() if key != "name"},
        "tokens": _number(facts.get("tokens")),
        "training_flops": _number(facts.get("training_flops")),
        "mean_loops": _last(run.records, "mean_loops"),
        "tokens_per_second": _mean(run.records, "tokens_per_second"),
        "loss_by_loop": _numbers(facts.get("loss_by_loop")),
        "bits_per_byte_by_loop": _numbers(facts.get("bits_per_byte_by_loop")),
        "training_curve": _curve(run.records, "train_loss"),
        "validation_curve": _curve(run.records, "val_loss"),
        "ece": _number(report.get("ece")),
        "auroc": _number(report.get("auroc")),
        "exit_loops": _number(choice.get("mean_loops")),
        "exit_loss": _number(choice.get("loss")),
        "frontier": _frontier(report),
        "report": report.get("file"),
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _differences(runs: Sequence[RunDetails]) -> dict[str, list[Any]]:
    """The value in each run of the settings in which they differ; None where a run has no such."""
    keys = {key: None for run in runs for key in run.settings.values if key not in _NO_SETTINGS}
    found = {key: [_shown(run.settings.values.get(key)) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _curve(records: Sequence[Document], key: str) -> list[list[float]]:
    """[step, value] of the records that have a value."""
    points = ((record["step"], _number(record.get(key))) for record in records)
    return [[step, value] for step, value in points if value is not None]


def _last(records: Sequence[Document], key: str) -> float | None:
    curve = _curve(records, key)
    return curve[-1][1] if curve else None


def _mean(records: Sequence[Document], key: str) -> float | None:
    values = [value for _, value in _curve(records, key)]
    return sum(values) / len(values) if values else None


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _numbers(values: Any) -> list[float]:
    found = [_number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]


def _report_of(folder: Path) -> Document:
    """The newest report of a run, with its `file`; empty where there is none that can be read."""
    beside = sorted(folder.resolve().parent.glob(f"inspect-loops-*/{_REPORT}"))
    own = [folder / _REPORT, *sorted(folder.glob(f"*/{_REPORT}"))]
    found = []
    for file in (*own, *beside):
        try:
            report = read_json(file)
            when = file.stat().st_mtime
        except (LooptxError, OSError, RecursionError):
            continue
        model = report.get("model")
        if file in own or (isinstance(model, str) and _is_of(Path(model), folder)):
            found.append((when, {**report, "file": str(file)}))
    return max(found, key=lambda pair: pair[0], default=(0.0, {}))[1]


def _is_of(model: Path, folder: Path) -> bool:
    return model.resolve() in (folder.resolve(), (folder / "final").resolve())


def _frontier(report: Document) -> list[Document] | None:
    """The points of a report: `rule`, `mean_loops`, `flops` and `loss`."""
    points = report.get("frontier")
    keys = ("mean_loops", "flops", "loss")
    kept = [
        {"rule": str(point.get("rule")), **{key: _number(point.get(key)) for key in keys}}
        for point in (points if isinstance(points, list) else [])
        if isinstance(point, dict)
    ]
    return [point for point in kept if None not in point.values()] or None


def plot_comparison(document: Document, file: Path) -> None:
    """Curves over the steps, held-out loss by loop and frontiers, one colour a run.

    file: its suffix, one of `FIGURES`, says the format. What is there is replaced.

    Raises `UsageError` for another suffix, `LooptxError` where it can't be written.
    """
    if file.suffix.lower() not in FIGURES:
        raise UsageError(f"{file}: a figure is one of {', '.join(FIGURES)}; choose another `out`")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = document["runs"]
    panels = [_draw_curves]
    panels += [_draw_loops] if any(run["loss_by_loop"] for run in runs) else []
    panels += [_draw_frontiers] if any(run["frontier"] for run in runs) else []
    # Names of runs are no formulas, and texts of an SVG stay texts.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
        for axis, panel in zip(axes[0], panels):
            for place, run in enumerate(runs):
                panel(axis, run, f"C{place % 10}")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        content = io.BytesIO()
        figure.savefig(content, format=file.suffix.lower()[1:], dpi=150)
        plt.close(figure)
    write_file(file, content.getvalue())


def _draw_curves(axis: Any, run: Document, colour: str) -> None:
    if run["training_curve"]:
        axis.plot(*zip(*run["training_curve"]), color=colour, alpha=0.3, linewidth=1)
    if curve := run["validation_curve"]:
        axis.plot(*zip(*curve), color=colour, marker=".", label=run["name"])
    else:
        axis.plot([], [], color=colour, alpha=0.3, label=run["name"])
    axis.set(xlabel="step", ylabel="loss (nats a token)", title="Held-out; pale: training")


def _draw_loops(axis: Any, run: Document, colour: str) -> None:
    losses = run["loss_by_loop"]
    axis.plot(range(1, len(losses) + 1), losses, color=colour, marker="o")
    axis.set(xlabel="loop", ylabel="loss (nats a token)", title="Held-out, by loop")


def _draw_frontiers(axis: Any, run: Document, colour: str) -> None:
    """Early exits (lines, the best for the compute) against fixed depths (crosses)."""
    points = run["frontier"] or []
    by_rule: dict[str, list[tuple[float, float]]] = {"fixed": [], "exit": []}
    for point in points:
        if point["rule"] != "oracle":
            kind = "fixed" if point["rule"] == "fixed" else "exit"
            by_rule[kind].append((point["mean_loops"], point["loss"]))
    if by_rule["fixed"]:
        axis.plot(*zip(*sorted(by_rule["fixed"])), "x", color=colour)
    if best := _lower_edge(by_rule["exit"]):
        axis.plot(*zip(*best), color=colour, marker=".")
    axis.set(xlabel="mean loops", ylabel="loss (nats a token)",
             title="Early exits; crosses: fixed depths")  # fmt: skip


def _lower_edge(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
