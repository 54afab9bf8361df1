"""`--control`: after a looped training the same one without loops, in a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_cli.console import stdout
from looptx_cli.runs import RunFolder
from looptx_core.config.resolve import Resolved

if TYPE_CHECKING:
    from looptx_core.config.model import ModelConfig
    from looptx_core.config.run import RunConfig
    from looptx_core.training.control import Control


def train_control(
    result: Any,
    settings: RunConfig,
    resolved: Resolved,
    model: ModelConfig,
    counted: float,
    *,
    command: str,
    origin: Mapping[str, str],
    again: Callable[[Any, Path], Any],
    report: Callable[[str], object],
) -> Any:
    """The result with its control, which is a run in the folder `control` of the first.

    result: of the looped training, in place. settings, resolved: its own. model: what was trained.
    counted: the share of targets that count. again: trains with other settings in a folder.
    """
    from looptx_core.training.control import Control, control_changes

    folder = result.folder / "control"
    if (folder / "config.yaml").exists():
        report(f"control: the one in {folder} stays, and is not trained again")
        return result
    changes = control_changes(settings, model, result.flops, counted)
    report(f"control: {changes['steps']:,} steps without loops, for as many FLOPs, in {folder}")
    other = Resolved(
        {**resolved.values, **changes},
        {**resolved.origins, **dict.fromkeys(changes, "`control`")},
    )
    run = RunFolder(command, folder)
    with run:
        run.begin(other, origin, report)
        found = run.finish(again(other.build(type(settings)), folder))
    answers = getattr(found, "answers", None)
    control = Control(
        folder=str(folder),
        steps=found.steps,
        flops=found.flops,
        loss=found.loss_by_loop[0],
        accuracy=found.accuracy_by_loop[0],
        exact_match=answers and answers.share,
    )
    return replace(result, control=control)


def with_other_text(result: Any, base: Path) -> Any:
    """The result with the losses on the bundled text of the base, the model and its control.

    They show what training on other data has made a model forget. A result without a control stays
    as it is.
    """
    from looptx_core.checkpoint.registry import resolve_model
    from looptx_core.finetuning.load import load_resolved
    from looptx_core.training.control import text_loss

    if result.control is None:
        return result

    def other_text(place: Path, loops: int) -> tuple[float, ...]:
        return text_loss(load_resolved(resolve_model(place)), loops)

    loops = len(result.loss_by_loop)
    return replace(result, control=replace(
        result.control,
        text_loss_before=other_text(base, loops),
        text_loss_by_loop=other_text(result.folder, loops),
        text_loss=other_text(result.folder / "control", 1)[0],
    ))  # fmt: skip


def show_control(result: Any) -> None:
    """The looped model beside its control, as a table."""
    from rich.table import Table

    control: Control = result.control
    text = bool(control.text_loss_by_loop)
    answers = getattr(result, "answers", None)
    title = "Against no loops, at equal FLOPs"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("trained")
    columns = ["loops", "loss", "accuracy", *(["exact"] if answers else []),
               *(["loss on other text"] if text else [])]  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    last = len(result.loss_by_loop)

    def row(name: str, loops: int, loss: float | None, accuracy: float | None,
            exact: float | None, other: float | None) -> None:  # fmt: skip
        cells = [name, str(loops), "" if loss is None else f"{loss:.3f}",
                 "" if accuracy is None else f"{accuracy:.1%}"]  # fmt: skip
        cells += ["" if exact is None else f"{exact:.1%}"] if answers else []
        cells += ["" if other is None else f"{other:.3f}"] if text else []
        table.add_row(*cells)

    for loop, loss in enumerate(result.loss_by_loop):
        exact = answers.share if answers and loop + 1 == last else None
        other = control.text_loss_by_loop[loop] if text else None
        row("with loops", loop + 1, loss, result.accuracy_by_loop[loop], exact, other)
    row("control", 1, control.loss, control.accuracy, control.exact_match, control.text_loss)
    if text:
        before = getattr(result, "loss_by_loop_before", [None])[0]
        accurate = getattr(result, "accuracy_by_loop_before", [None])[0]
        row("base", 1, before, accurate, None, control.text_loss_before[0])
    stdout().print(table)
    stdout().print(
        f"control: {control.steps:,} steps, {control.flops:.3g} FLOPs against {result.flops:.3g}; "
        f"{control.folder}",
        soft_wrap=True,
    )
