"""`train --data a --data b --mix 3:1`: several sources by weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_cases import MOBY
from test_training_resume import TRAIN, place  # noqa: F401

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.run import TrainConfig
from looptx_core.data.mixture import MixedData
from looptx_core.data.own import open_data, own_data
from looptx_core.data.resolve import resolve_sources
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError, UsageError
from looptx_core.training.callbacks import read_metrics


@pytest.mark.parametrize(
    "mix, media, weights",
    [
        (None, [False, False], None),
        ("3:1", [False, False], (3, 1)),
        ("1:2", [True, False], (1, 2)),
        ("0:1", [True], None),
        ("1:2", [False, False, True], None),
        ("1:2:3", [False, True, True], (1, 2, 3)),
    ],
)
def test_weights_go_by_the_order_of_the_data(mix, media, weights) -> None:
    assert TrainConfig(mix=mix).source_weights(media) == weights


@pytest.mark.parametrize(
    "mix, items", [("1:2:3", 2), ("1:2", 3), ("3:1", 1), ("0:0", 2), ("1:nan", 2), ("2", 1)]
)
def test_weights_that_do_not_fit_are_refused(mix: str, items: int) -> None:
    with pytest.raises(UsageError, match="`mix`"):
        TrainConfig(mix=mix).source_weights([False] * items)


def test_texts_are_mixed_by_weight(
    place: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("whale", MOBY[:20_000]), ("digits", "4 1 3 2 0 9 8 7 6 5\n" * 1000)):
        Path(f"{name}.txt").write_text("\n\n".join([text] * 2), "utf-8")
    inputs = ["--data", "whale.txt", "--data", "digits.txt"]
    start = [*TRAIN[:-1], *inputs, "--seq-len", "16", "--steps", "2", "--mix"]
    assert main([*start, "3:1:1"]) == 2
    assert "--mix 3:1:1: 3 weights for 2 items of --data" in capsys.readouterr().err
    assert main([*start, "3:1", "--epochs", "1"]) == 2
    assert main([*start, "3:1"]) == 0
    assert [r["step"] for r in read_metrics(Path("run/metrics.jsonl")) if "val_loss" in r] == [2]
    note = json.loads(Path("run/final/data.json").read_text())
    assert note["weights"] == [3, 1] and len(note["inputs"]) == 2

    loaded = load_model(Path("run/final"))
    own = own_data(loaded.folder, loaded.facts)
    assert own is not None
    found = open_data(
        own, loaded.tokenizer, loaded.config, seq_len=16, rows=4, batches=40, val_batches=2, seed=0
    )
    assert isinstance(found, MixedData)
    rows = [row for batch in found.train_dataloader() for row in batch["tokens"]]
    digits = sum(set(loaded.tokenizer.decode(row.tolist())) <= set("0123456789 \n") for row in rows)
    assert 0.15 < digits / len(rows) < 0.35, "a quarter"
    both = [set(loaded.tokenizer.decode(found.val[i]["tokens"].tolist())) for i in (0, -1)]
    assert both[0] - both[1], "both are held out"

    capsys.readouterr()
    other = resolve_sources(["whale.txt"], 300)[0]
    with pytest.raises(DataError, match="made with another tokenizer than"):
        MixedData(
            [other, resolve_sources(["whale.txt"], 320)[0]], (), loaded.config, mix=(1, 1),
            seq_len=16, micro_batch=2, batches=1,
        )  # fmt: skip
    mixed = resolve_sources([other, "digits.txt"])
    assert len({open_shards(folder).manifest.tokenizer for folder in mixed}) == 1
