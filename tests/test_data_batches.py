"""Windows and batches: what a training step reads."""

from __future__ import annotations

from pathlib import Path

from data_cases import MOBY

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
