"""What calibration brings: mean loops and loss by the rule `gain`, and how good a confidence is.

The bundled model on held-out tokens of its own data: half of them for the calibration, half for the
figures. States come from full depth, as in training.

    python -m benchmarks.exits.calibration [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import looptx_core
from benchmarks.common.record import flat, write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.stopping.calibration import calibrated, reported_confidence
from looptx_core.training import metrics
from looptx_core.training.calibration import fit_gain, fit_odds
from looptx_core.training.evaluate import evaluate_batch

THRESHOLD = 0.01  # nats, the default


def stopped(gain: Tensor, loss: Tensor) -> dict[str, float]:
    """Mean loops and mean loss when each token stops at the first predicted gain below."""
    low = torch.cat([gain[:-1] < THRESHOLD, torch.ones_like(gain[:1], dtype=torch.bool)])
    depth = low.int().argmax(0)
    return {
        "mean_loops": round(float((depth + 1).double().mean()), 3),
        "loss": round(float(loss.gather(0, depth[None]).double().mean()), 4),
    }


def confidences(*halves: Tensor) -> dict[str, dict[str, float | None]]:
    """Of the head alone, of the largest probability alone, and as stated, at the last loop; each
    calibrated on logit, sharp and hit of the first half, and measured on the second."""
    (fit_logit, fit_sharp, fit_hit), (logit, sharp, hit) = halves[:3], halves[3:]

    def alone(fit_on: Tensor, odds: Tensor) -> Tensor:
        offset, slope = fit_odds(fit_hit, fit_on)
        return torch.sigmoid(offset + slope * odds)

    told = ExitSettings(stated=fit_odds(fit_hit, fit_logit, fit_sharp))
    each = {
        "head": alone(fit_logit, logit),
        "largest probability": alone(fit_sharp, sharp),
        "stated": reported_confidence(logit, sharp, told),
    }
    return {
        name: {
            "auroc": metrics.auroc(values[-1], hit[-1]),
            "ece": metrics.calibration_error(values[-1], hit[-1]),
        }
        for name, values in each.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bundled = Path(looptx_core.__file__).parent / "assets" / "model"
    parser.add_argument("--model", type=Path, default=bundled)
    model = load_model(parser.parse_args().model).model
    data = TokenData(
        bundled_shards(model.config.vocab_size),
        seq_len=128, micro_batch=32, batches=1, val_batches=40,
    )  # fmt: skip
    parts = [evaluate_batch(model, batch, 10) for batch in data.val_dataloader()]
    gain = torch.cat([part.gain for part in parts], 1)
    loss = torch.cat([part.token_loss for part in parts], 1)
    order = torch.randperm(gain.shape[1], generator=torch.Generator().manual_seed(0))
    fit, show = order.chunk(2)
    change = torch.cat([part.change for part in parts], 1)
    slope, power, offset = fit_gain(gain[:, fit], change[:, fit], loss[:, fit])
    fitted = ExitSettings(gain_slope=slope, gain_power=power, gain_offset=offset)
    words = zip(gain[:, show], gain[:, show], change[:, show])
    told = torch.stack([calibrated(*w, loop, fitted)[1] for loop, w in enumerate(words, start=1)])
    by_loop = loss[:, show].double().mean(1).tolist()
    results = {
        "one loop": {"mean_loops": 1, "loss": round(by_loop[0], 4)},
        "all loops": {"mean_loops": len(by_loop), "loss": round(by_loop[-1], 4)},
        "as predicted": stopped(gain[:, show], loss[:, show]),
        "calibrated": stopped(told, loss[:, show]),
        "confidence": confidences(*(
            torch.cat([getattr(part, name) for part in parts], 1)[:, half]
            for half in (fit, show) for name in ("logit", "top_log_odds", "hit")
        )),
    }  # fmt: skip
    rows = [{"depth": name, **flat(found)} for name, found in results.items()]
    print(json.dumps(rows, indent=2))
    settings = {"tokens": len(show), "threshold": THRESHOLD}
    write("exits.calibration", __doc__.splitlines()[0], rows, settings=settings)


if __name__ == "__main__":
    main()
