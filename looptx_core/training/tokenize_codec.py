"""`looptx tokenize --codec`: from pictures or recordings to a codec's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from looptx_core.checkpoint.codec_folder import save_codec
from looptx_core.config.codec import MEDIUM_OF, CodecConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.data.codec_data import read_items
from looptx_core.errors import Interrupted, LooptxError, UsageError
from looptx_core.machine.device import best_device
from looptx_core.media.codec.codec import Codec
from looptx_core.media.registry import MEDIA
from looptx_core.training.codec import CodecReport, judge_codec, train_codec

Progress = Callable[[str, int, int, float | None], object]
"""(read or train, done, all, the loss)."""


def make_codec(
    settings: TokenizeConfig,
    config: CodecConfig,
    folder: Path,
    on_progress: Progress = lambda stage, done, of, loss: None,
) -> tuple[CodecReport, str]:
    """Train a codec, judge it on items that are held out, and write its folder.

    Returns the report and the codec's fingerprint. Raises `Interrupted` after a Ctrl-C, when what
    was learned is saved, and what `read_items`, `train_codec` and
    `save_codec` raise.
    """
    plural = MEDIA[MEDIUM_OF[config.kind]].plural
    parts = "stretches" if config.kind == "speech" else plural
    if not settings.data:
        raise UsageError(f"`codec` needs {plural}: give a folder, or records that name some")
    trained, held = read_items(
        settings.data,
        config,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
        on_progress=lambda done, of: on_progress("read", done, of, None),
    )
    torch.manual_seed(settings.seed)
    codec = Codec(config).to(best_device())
    began = time.monotonic()
    steps = 0

    def watch(step: int, of: int, loss: float) -> None:
        nonlocal steps
        steps = step
        on_progress("train", step, of, loss)

    try:
        train_codec(codec, trained, settings, watch)
    except KeyboardInterrupt:
        if not steps:
            raise
        round_weights(codec)
        save_codec(folder, codec.cpu(), {"steps": steps, parts: len(trained)})
        raise Interrupted(
            f"stopped at step {steps} of {settings.steps}; {folder} holds the codec as it was then"
        ) from None
    seconds = time.monotonic() - began
    round_weights(codec)
    report = judge_codec(codec, held, settings.seed)
    report.steps, report.seconds = steps, seconds
    if not all(map(math.isfinite, report.psnr.values())):
        raise LooptxError(f"what the codec makes is not finite; lower `lr` ({settings.lr:g})")
    codec.cpu()
    return report, save_codec(folder, codec, {**asdict(report), parts: len(trained)})


@torch.no_grad()
def round_weights(codec: Codec) -> None:
    """Round weights to bfloat16, as which they are stored: half as large a folder."""
    for weight in codec.state_dict().values():
        weight.copy_(weight.bfloat16())
