"""inspect-loops measures a model on what it was made for, or says that it can't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.data.own import open_data, own_data
from looptx_core.training.evaluate import evaluate_all

QUICK = ["--steps", "2", "--seq-len", "64", "--batch-size", "2", "--val-batches", "1"]
SMALL = ["--seq-len", "32", "--batch-size", "4", "--val-batches", "8", "--decode-tokens", "0"]


def test_a_finetuned_model_is_measured_on_its_records(
    tiny: Path, questions: Path, workplace: Path, capsys
) -> None:
    records = Path(shutil.copy(questions, "mine.jsonl"))
    assert main(["finetune", "--model", str(tiny), "--data", str(records), *QUICK,
                 "--val-fraction", "0.5", "--out", "run", "--quiet"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["inspect-loops", "--model", "run", *SMALL, "--json"]) == 0
    found = capsys.readouterr()
    assert "own held-out records, mine.jsonl" in found.err
    document = json.loads(found.out)
    assert document["data"] == "mine.jsonl" and not document["tasks"]
    loaded = load_model("run/final")
    own = own_data(loaded.folder, loaded.facts)
    assert own is not None
    batches = open_data(own, loaded.tokenizer, loaded.config, seq_len=32, rows=4, batches=1)
    whole = evaluate_all(loaded.model, batches.val_dataloader(), document["loops"])
    assert document["tokens"] + document["tokens_to_calibrate"] == whole.tokens

    records.unlink()
    assert main(["inspect-loops", "--model", "run", *SMALL, "--json"]) == 0
    found = capsys.readouterr()
    assert "bundled text" in found.err and "own data are gone: " in found.err
    Path("run/final/data.json").unlink()
    assert main(["inspect-loops", "--model", "run", *SMALL, "--json"]) == 0
    assert "own data are not known" in capsys.readouterr().err
