r"""What a codec of pictures keeps, by loops and steps, beside the best linear one of its size.

    python -m benchmarks.pictures.emoji
    looptx tokenize --codec picture benchmarks/.data/emoji/train.jsonl \
        --out benchmarks/.data/codec --steps 2000 --batch-size 32 --max-minutes 27 \
        --val-fraction 0.04 --set codec_model.width=96 \
        --set codec_model.encoder_width=96 --set codec_model.encoder_layers=2 \
        --set codec_model.max_loops=3
    python -m benchmarks.drawing.codec [--codec FOLDER] [--check]

Judged on emoji held out by name. The control is linear: as many principal components of a patch as
a code has digits, as floats that are not quantised. `--check` takes few pictures and leaves no
record.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.codecs import codec_settings
from benchmarks.common.corpora import DATA
from benchmarks.common.record import finish
from benchmarks.pictures.emoji import TEST, fetch_emoji
from looptx_core.checkpoint.codec_folder import load_codec, read_facts
from looptx_core.config.codec import CodecConfig
from looptx_core.media.image.coded import read_patches
from looptx_core.training.codec import decibels, from_bytes, judge_codec

SEED = 0
JUDGED = 250
"""Pictures of each set that are judged."""
FITTED = 2000
"""Pictures that the linear codec is fitted to."""


def patches_of(records: list[dict[str, Any]], config: CodecConfig, count: int) -> Tensor:
    """(pictures, patches, numbers) of bytes, of so many records drawn at random."""
    chosen = random.Random(SEED).sample(records, min(count, len(records)))
    folder = fetch_emoji()
    return torch.stack([read_patches(folder / record["image"], config) for record in chosen])


def linear(fitted: Tensor, judged: Tensor, digits: int) -> float:
    """PSNR of the mean patch plus so many principal components, in dB."""
    flat = from_bytes(fitted).flatten(0, 1)
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = vectors[:, -digits:]
    pictures = from_bytes(judged)
    found = ((pictures - mean) @ basis @ basis.T + mean).clamp(-1, 1)
    return float(decibels((found - pictures).square().mean((1, 2))).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, default=DATA / "codec")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    records = list(map(json.loads, (fetch_emoji() / "all.jsonl").read_text("utf-8").splitlines()))
    codec, fingerprint = load_codec(arguments.codec)
    config, few = codec.config, arguments.check
    known = [r for r in records if not r["unseen"] and r["style"] not in TEST]
    fitted = patches_of(known, config, 50 if few else FITTED)
    sets = {
        "names held out": [r for r in records if r["unseen"] and r["style"] not in TEST],
        "names and styles held out": [r for r in records if r["unseen"] and r["style"] in TEST],
    }
    rows = []
    for name, some in sets.items():
        judged = patches_of(some, config, 8 if few else JUDGED)
        report = judge_codec(codec, judged, SEED)
        rows.append(
            {
                "part": name,
                "pictures": report.held_out,
                "psnr_1_step": report.psnr[1],
                "psnr_8_steps": report.psnr[8],
                "psnr_1_step_by_loop": report.psnr_by_loop,
                "codes_used": report.codes_used,
                "linear_psnr": linear(fitted, judged, len(config.levels)),
            }
        )
        print(
            f"{name}: {report.psnr[1]:.2f} dB in one step, {report.psnr[8]:.2f} in eight, linear "
            f"{rows[-1]['linear_psnr']:.2f}; {report.codes_used:.0%} of the codes used"
        )
    return finish(
        "drawing.codec", __doc__.splitlines()[0], rows, few,
        codes_a_picture=config.rows * config.columns, bits_a_picture=report.bits,
        trained_pictures=read_facts(arguments.codec).get("pictures"),
        **codec_settings(codec, fingerprint, arguments.codec),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
