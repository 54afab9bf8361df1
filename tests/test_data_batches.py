"""Windows and batches: what a training step reads."""

from __future__ import annotations

from pathlib import Path

from data_cases import MOBY

from looptx_core.data.batches import SeededBatches
from looptx_core.data.datamodule import TokenData
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.data.tokenizer import END


def test_windows_number_their_documents(tmp_path: Path) -> None:
    out = tmp_path / "data"
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(MOBY[300 * number : 300 * number + 250])
    tokenize_corpus([tmp_path / "texts"], out, vocab_size=300)
    data = TokenData(out, seq_len=256, micro_batch=2, batches=1)
    end = data.shards.tokenizer.token_to_id(END)
    item = data.train[0]
    tokens, documents = item["tokens"][:-1], item["documents"]
    assert documents[0] == 0 and int(documents.max()) >= 1
    for place in range(1, 256):
        assert documents[place] == documents[place - 1] + int(tokens[place - 1] == end)
    assert (
        "documents"
        not in TokenData(out, seq_len=256, micro_batch=2, batches=1, document_mask=False).train[0]
    )


def test_batches_are_functions_of_the_seed() -> None:
    whole = list(SeededBatches(10, 4, 7, seed=1))
    later = SeededBatches(10, 4, 7, seed=1)
    later.start = 3
    assert list(later) == whole[3:] and len(later) == 7
    assert sorted([i for batch in whole for i in batch][:10]) == list(range(10))
    ranks = [list(SeededBatches(10, 2, 7, 1, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == whole
