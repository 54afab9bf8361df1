"""Calibrations of the predicted gain, against the state's change as a rule of its own.

What the rule `gain` loses against full depth at a mean of some loops, where a token stops as soon
as its calibrated gain is below a threshold. Calibrated on one half of the held-out sequences,
measured on the other:

    default              looptx's: the gain's logarithm, linear in the prediction and in that of the
                         state's relative change (`looptx_core.training.calibration.fit_gain`)
    line                 the former default: least squares, a slope and an offset for each loop
    binned and change    least squares on the means in 24 bins of the prediction and of the change
    change               no head: the state's relative change alone

    python -m benchmarks.exits.gain --models FOLDER [FOLDER ...] [--data SHARDS]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.clock import BUNDLED
from benchmarks.common.record import rows_by, write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.inspection.survey import Survey, two_surveys
from looptx_core.stopping.rule import exit_depths
from looptx_core.training.calibration import fit_gain

BINS, THRESHOLDS = 24, 200
AT = (1.25, 1.5, 1.75, 2.0, 2.2, 2.4, 2.6, 3.0)


def binned(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The mean of y by bins of x, rising, in straight lines between them."""
    order = x.argsort()
    means = [torch.stack([part.mean() for part in values[order].chunk(BINS)]) for values in (x, y)]
    places, heights = means[0], means[1].cummax(0).values
    right = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    width = (places[right] - places[right - 1]).clamp(min=1e-12)
    share = ((at - places[right - 1]) / width).clamp(0, 1)
    return heights[right - 1].lerp(heights[right], share)


def regressed(inputs: list[Tensor], wanted: Tensor, given: list[Tensor]) -> Tensor:
    """Least squares with an offset, fitted on the inputs and applied to what is given."""
    before = torch.stack([torch.ones_like(wanted), *inputs], 1)
    weights = torch.linalg.lstsq(before, wanted[:, None]).solution[:, 0]
    return torch.stack([torch.ones_like(given[0]), *given], 1) @ weights


def forecasts(fit: Survey, shown: Survey) -> dict[str, Tensor]:
    """By calibration: what each token of `shown` is to gain, (loops - 1, tokens)."""
    found: dict[str, list[Tensor]] = {}
    seen = fit.evaluation
    slope, power, offset = fit_gain(seen.gain, seen.change, seen.token_loss)
    fitted = ExitSettings(gain_slope=slope, gain_power=power, gain_offset=offset)
    default = shown.signals(fitted)["gain"]
    for loop in range(fit.loops - 1):
        drop = (fit.loss[loop] - fit.loss[loop + 1]).double()
        gain, gain_here = (s.evaluation.gain[loop].double() for s in (fit, shown))
        moved, moved_here = (s.evaluation.change[loop].double() for s in (fit, shown))
        own = [binned(gain, drop, gain), binned(moved, drop, moved)]
        here = [binned(gain, drop, gain_here), binned(moved, drop, moved_here)]
        ways = {
            "default": default[loop],
            "line": regressed([gain], drop, [gain_here]),
            "binned and change": regressed(own, drop, here),
            "change": moved_here,
        }
        for way, values in ways.items():
            found.setdefault(way, []).append(values)
    return {way: torch.stack(values) for way, values in found.items()}


def lost(shown: Survey, signal: Tensor) -> dict[str, float | None]:
    """Per cent of full depth's loss, at a mean of some loops."""
    full = float(shown.loss[-1].double().mean())
    finite = signal[signal.isfinite()].sort().values
    points = []
    for place in torch.linspace(0, len(finite) - 1, THRESHOLDS).long().tolist():
        stops = torch.cat([signal < finite[place], torch.ones_like(signal[:1], dtype=torch.bool)])
        depth = exit_depths(stops)
        loss = float(shown.loss.gather(0, depth[None] - 1).double().mean())
        points.append((float(depth.double().mean()), 100 * (loss / full - 1)))
    points.sort()
    found: dict[str, float | None] = {}
    for loops in AT:
        below = [p for p in points if p[0] <= loops]
        above = [p for p in points if p[0] > loops]
        found[str(loops)] = None
        if below and above:
            (a, first), (b, second) = below[-1], above[0]
            found[str(loops)] = round(first + (second - first) * (loops - a) / (b - a), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[BUNDLED])
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--val-batches", type=int, default=40)
    parser.add_argument("--variant", default="", help="What the record is called beside others.")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for folder in args.models:
        loaded = load_model(folder)
        data = TokenData(
            args.data or bundled_shards(loaded.config.vocab_size), seq_len=128, micro_batch=32,
            batches=1, val_batches=args.val_batches,
        )  # fmt: skip
        surveys = two_surveys(loaded.model, data.val_dataloader(), loaded.config.max_loops)
        runs.append({way: lost(surveys[1], s) for way, s in forecasts(*surveys).items()})
    rows = rows_by(dict(enumerate(runs)), "model", "calibration")
    settings = {"values": "per cent of the loss lost at a mean of so many loops"}
    write("exits.gain", __doc__.splitlines()[0], rows, variant=args.variant, settings=settings)


if __name__ == "__main__":
    main()
