"""What the loops do while a model writes an item of a medium: each code's depth and confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.documents import printable
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import MediaPrompt
from looptx_core.media.base import Figure
from looptx_core.media.registry import MEDIA
from looptx_core.model.confidence import top_log_odds
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.calibration import reported_confidence

_UNLIMITED = 4096  # tokens of an item where the context has no limit
_SHOWN = 4  # loops on a terminal
_WIDTH = 16  # columns on a terminal, each the mean of some rows of codes


def inspect_written(
    loaded: LoadedModel,
    text: str,
    settings: ExitSettings,
    loops: int,
    seed: int,
    report: Callable[[str], object],
) -> list[dict[str, Any]]:
    """JSON values for an item of each medium that the model writes, written for a text.

    An item is drawn as `generate` draws it, and has `kind`, `text`, its grid of codes by `rows` and
    `columns`, `seconds` (None for a medium without time), and in the order of the codes `loops` and
    `confidence` as they were written. `confidence_by_loop`, (loops, codes), is what it would
    be after each loop, also after the exit. `shown` is the item as rows of pixels.

    An item that does not end in the model's context is left out, and `report` told.
    """
    engine = Engine(loaded.model, loaded.tokenizer, settings, ends=loaded.special.ends)
    found = []
    for name, writer in engine.writers.items():
        prompt = MediaPrompt(text, write=name)
        ids = list(engine.encode(prompt))
        limit = loaded.config.context_limit
        room = _UNLIMITED if limit is None else max(1, limit - len(ids))
        options = GenerationOptions(seed=seed, max_new_tokens=room)
        (result,) = engine.complete([prompt], options)
        if not result.outputs:
            report(f"a {MEDIA[name].noun} of the prompt did not end within {room:,} tokens")
            continue
        (output,), (media,) = result.outputs, result.media
        places = [
            place for place, token in enumerate(output.ids, start=len(ids)) if token in output.codes
        ]
        sure = _confidence_by_loop(loaded.model, [*ids, *output.ids], places, settings, loops)
        rows, columns = writer.grid(output.ids)
        found.append(
            {
                "kind": name,
                "text": text,
                "rows": rows,
                "columns": columns,
                "seconds": output.seconds,
                "loops": media["loops"],
                "confidence": [round(share, 4) for share in media["confidence"]],
                "confidence_by_loop": [[round(v, 4) for v in loop] for loop in sure.tolist()],
                "shown": writer.shown(output.content),
            }
        )
    return found


@torch.no_grad()
def _confidence_by_loop(
    model: LoopedTransformer,
    ids: Sequence[int],
    places: Sequence[int],
    settings: ExitSettings,
    loops: int,
) -> Tensor:
    """The confidence that would be reported with the tokens at some places after each loop,
    (loops, places)."""
    ctx = model.context(len(ids))
    tokens = torch.tensor([list(ids)], device=model.embedding.weight.device)
    before = [place - 1 for place in places]  # the position that predicts a token
    sure = []
    for loop, state in enumerate(model.states(tokens, loops, ctx=ctx), start=1):
        odds = model.confidence(state, loop).logit[0, before].float()
        logits = model.logits(model.coda_hidden(state, ctx)[0, before]).float()
        top = top_log_odds(logits.log_softmax(-1))
        sure.append(reported_confidence(odds, top, settings).cpu())
    return torch.stack(sure)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """An item in words."""
    codes = len(found["loops"])
    means = [sum(loop) / codes for loop in found["confidence_by_loop"]]
    sure = ", ".join(f"{mean:.0%} after loop {loop}" for loop, mean in enumerate(means, 1))
    return [
        f"{_name(found)}: {codes} codes, {sum(found['loops']) / codes:.2f} loops a code; the model "
        f"is sure of {sure}."
    ]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Loops and confidence along the rows of an item, or along time, for a terminal."""
    rows = found["rows"]
    per = -(-rows // _WIDTH)
    starts = range(0, rows, per)

    def means(values: Sequence[float]) -> list[float]:
        parts = [values[s * found["columns"] : (s + per) * found["columns"]] for s in starts]
        return [sum(part) / len(part) for part in parts]

    def line(head: str, values: Sequence[float], digits: int) -> str:
        return f"{head:<12}" + "".join(f"{value:>6.{digits}f}" for value in values)

    shown = [f"{_name(found)}: loops, and how sure the model is of its codes"]
    if found["seconds"] is None:
        shown.append(line("row", [start + 1 for start in starts], 0))
    else:
        shown.append(line("seconds", [start * found["seconds"] / rows for start in starts], 2))
    shown.append(line("loops", means(found["loops"]), 1))
    shown.append(line("sure, %", [100 * mean for mean in means(found["confidence"])], 0))
    for loop, sure in enumerate(found["confidence_by_loop"][:_SHOWN], 1):
        shown.append(line(f"after loop {loop}", [100 * mean for mean in means(sure)], 0))
    return shown


def figures(found: Mapping[str, Any], number: int) -> dict[str, Figure]:
    """The item beside maps of its codes. number: of the item, for the file's name."""
    title = f"Loops and confidence of the codes of {_name(found)}"
    return {title: Figure(f"written-{number}.png", partial(_plot, found=found), 4)}


def _name(found: Mapping[str, Any]) -> str:
    return f"the {MEDIA[found['kind']].noun} '{printable(found['text'])[:40]}'"


def _plot(axes: Any, found: Mapping[str, Any]) -> None:
    """The item, then loops, confidence, and confidence by loop; in time, where it has one."""
    columns, seconds = found["columns"], found["seconds"]
    within: dict[str, Any] = {"xlabel": "seconds"} if seconds else {"xticks": []}
    if found["shown"]:
        axes[0].imshow(found["shown"], aspect="auto" if seconds else "equal", cmap="magma")
    axes[0].set(title=printable(found["text"])[:40], xticks=[], yticks=[])
    deepest = len(found["confidence_by_loop"])
    for axis, key, most in ((axes[1], "loops", deepest), (axes[2], "confidence", 1)):
        values = found[key]
        grid = [values[start : start + columns] for start in range(0, len(values), columns)]
        if seconds:  # along time, low bands below
            grid = [list(band) for band in reversed(list(zip(*grid)))]
        shape = {"aspect": "auto", "extent": (0, seconds, 0, columns)} if seconds else {}
        drawn = axis.imshow(grid, vmin=0, vmax=most, cmap="viridis", **shape)
        axis.figure.colorbar(drawn, ax=axis)
        axis.set(title=key, yticks=[], **within)
    length = seconds or len(found["loops"])
    drawn = axes[3].imshow(
        found["confidence_by_loop"], vmin=0, vmax=1, cmap="viridis", aspect="auto",
        extent=(0, length, deepest + 0.5, 0.5),
    )  # fmt: skip
    axes[3].figure.colorbar(drawn, ax=axes[3])
    axes[3].set(title="confidence by loop", xlabel="seconds" if seconds else "code", ylabel="loop")
