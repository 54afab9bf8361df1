"""The held-out data that an inspection measures on: text, or a model's own records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.batches import held_out, text_windows
from looptx_core.data.shards import Shards, open_shards
from looptx_core.errors import UsageError
from looptx_core.inspection.survey import Survey, alternate_surveys, two_surveys

if TYPE_CHECKING:  # looking at text needs no trainer
    from looptx_core.data.datamodule import Batches


def measure_text(
    loaded: LoadedModel, data: Path, config: InspectConfig, loops: int
) -> tuple[Survey, Survey, float, Shards]:
    """Surveys of shards, to calibrate on and to report on, their tokens a byte, and the shards."""
    shards = open_shards(data, verify=True)
    _, val = text_windows(data, shards, config.seq_len)
    count = min(len(val), config.val_batches * config.batch_size)
    if count < 2:
        raise UsageError(f"{data}: one held-out sequence is too few; pass a smaller `seq_len`")
    fit, shown = two_surveys(loaded.model, held_out(val, count, config.batch_size), loops)
    counts = shards.manifest.splits["val"]
    return fit, shown, counts.tokens / counts.bytes, shards


def measure_records(
    loaded: LoadedModel, data: Batches, config: InspectConfig, loops: int
) -> tuple[Survey, Survey, float]:
    """Surveys of records, by every other batch, and the tokens a byte of the answers."""
    count = min(len(data.val), config.val_batches * config.batch_size)
    if count < 2:
        raise UsageError("one held-out sequence of records is too few; give others by `data`")
    rows = min(config.batch_size, count // 2)
    tokens = size = 0
    for batch in held_out(data.val, count, rows):
        targets = batch["tokens"][:, 1:]
        for row, counted in zip(targets, batch.get("weights", targets >= 0) > 0):
            ids = row[counted].tolist()
            tokens += len(ids)
            size += len(loaded.tokenizer.decode(ids).encode())
    fit, shown = alternate_surveys(loaded.model, held_out(data.val, count, rows), loops)
    return fit, shown, tokens / max(1, size)
