"""What is finetuned on: records, packing, and which tokens count."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finetuning_cases import SHAPE, logits, write
from hypothesis import given, settings
from hypothesis import strategies as st

from looptx_core.checkpoint.folder import load_model
from looptx_core.config.run import TrainConfig
from looptx_core.data.bundled import bundled_questions
from looptx_core.data.corpus import Corpus
from looptx_core.data.examples import Example, PackedExamples, pack, read_examples
from looptx_core.data.hops import hop_questions
from looptx_core.data.split import hold_out
from looptx_core.data.tokenizer import END
from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.training.evaluate import evaluate_batch
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_packing_loses_nothing(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= 20 for row in rows)
    # No two rows that would fit into one: best fit never opens a row in vain.
    assert sum(sum(lengths[i] for i in row) <= 10 for row in rows) <= 1


def test_examples_in_one_sequence_do_not_see_each_other(tiny: Path, questions: Path) -> None:
    loaded = load_model(tiny, dtype=torch.float64)
    found = read_examples([str(questions)], loaded.tokenizer, seq_len=100)
    packed = PackedExamples(found.kept, 100, 1)
    assert max(len(row) for row in packed.rows) > 1
    for index in range(3):
        row = packed[index]
        ctx = loaded.model.context(100, documents=row["documents"][None])
        *_, state = loaded.model.states(row["tokens"][None, :-1], 3, ctx=ctx)
        together = loaded.model.head(loaded.model.coda_hidden(state, ctx))[0]
        start = 0
        for number in packed.rows[index]:
            example = found.kept[number]
            ids = torch.from_numpy(example.ids.astype(np.int64))
            seen = min(len(ids), 100 - start)
            alone = logits(loaded.model, ids[None, :seen])[0]
            # RoPE's angles are float32, and stand elsewhere here.
            assert torch.allclose(together[start : start + seen], alone, atol=1e-5)
            start += len(ids)


def test_the_loss_is_of_the_responses_alone(tiny: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny)
    records = [{"prompt": "map ab bb: Where does a end?", "response": " B"},
               {"prompt": "map", "response": " ca ab bb and after"}]  # fmt: skip
    found = read_examples([write(tmp_path / "a.jsonl", *records)], loaded.tokenizer, seq_len=64)
    for record, example in zip(records, found.kept):
        learned = example.ids[example.counted].tolist()
        end = loaded.tokenizer.token_to_id(END)
        assert learned[-1] == end
        assert loaded.tokenizer.decode(learned[:-1]) == record["response"]
    packed = PackedExamples(found.kept, 20, 1)
    batch = {key: torch.stack([packed[i][key] for i in range(len(packed))]) for key in packed[0]}
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), SHAPE.max_loops)
    rest = {name: batch[name] for name in ("documents", "weights")}
    result = loop_loss(
        loaded.model, batch["tokens"], schedule, 0, batch["ids"], **rest, loss_at="last"
    )
    total = count = 0.0
    for example in found.kept:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        with torch.no_grad():
            out = loaded.model(ids[:, :-1], 2).logits.log_softmax(-1)
        each = -out.gather(-1, ids[:, 1:, None])[0, :, 0]
        kept = torch.from_numpy(example.counted)[1:]
        total, count = total + float(each[kept].sum()), count + int(kept.sum())
    assert float(result.loss.detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(result.deepest) == pytest.approx(total / count, rel=1e-5)
    evaluation = evaluate_batch(loaded.model, batch, 2)
    assert evaluation.tokens == count
    assert evaluation.loss_by_loop[1] == pytest.approx(total / count, rel=1e-5)
    everything = read_examples(
        [str(tmp_path / "a.jsonl")], loaded.tokenizer, seq_len=64, train_on_prompt=True
    )
    assert all(example.counted.all() for example in everything.kept)


def test_json_lines_and_parquet_are_alike(tiny: Path, questions: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": "a?"},
                           {"role": "assistant", "content": "b"}]}] * 3  # fmt: skip
    tokenizer = load_model(tiny).tokenizer
    for rows in (records, chats):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        left = read_examples([write(tmp_path / "a.jsonl", *rows)], tokenizer, seq_len=64).kept
        right = read_examples([str(tmp_path / "a.parquet")], tokenizer, seq_len=64).kept
        for one, other in zip(left, right, strict=True):
            assert np.array_equal(one.ids, other.ids) and np.array_equal(one.counted, other.counted)


def test_a_long_text_becomes_several_examples(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_model(tiny).tokenizer
    (tmp_path / "a.txt").write_text(text := "map ab bb: Where does a end? B " * 20)
    found = read_examples([str(tmp_path / "a.txt")], tokenizer, seq_len=32).kept
    ids = [*found[0].ids, *(token for example in found[1:] for token in example.ids[1:])]
    assert tokenizer.decode(ids) == text
    assert all(example.counted.all() and len(example.ids) <= 32 for example in found)


def test_too_long_is_an_explicit_choice(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_model(tiny).tokenizer
    long, cut = "map " * 50, {"prompt": "a", "response": "b " * 60}
    data = [write(tmp_path / "a.jsonl", {"prompt": long, "response": "b"}, cut,
                  *[{"prompt": "a", "response": "b"}] * 3)]  # fmt: skip
    with pytest.raises(UsageError, match=r"line 1: longer .* 2 examples .* longest of \d+ tokens"):
        read_examples(data, tokenizer, seq_len=32)
    dropped = read_examples(data, tokenizer, seq_len=32, too_long="drop")
    assert (len(dropped.kept), dropped.dropped, dropped.truncated) == (3, 2, 0)
    kept = read_examples(data, tokenizer, seq_len=32, too_long="truncate")
    # One loses its end; the other would lose its whole response.
    assert (len(kept.kept), kept.dropped, kept.truncated) == (4, 1, 1)


def test_equal_examples_are_held_out_together() -> None:
    examples = [Example(np.array([i % 10, 7], np.int32), np.ones(2, bool)) for i in range(100)]
    parts = hold_out([example.ids.tobytes() for example in examples], 0.2, seed=3)
    train, val = ([examples[i] for i in part] for part in parts)
    assert (len(train), len(val)) == (80, 20)
    assert not {int(e.ids[0]) for e in train} & {int(e.ids[0]) for e in val}


def test_one_question_again_and_again_is_on_both_sides_only_if_asked() -> None:
    keys = [b"often"] * 12 + [b"once"] * 2
    for seed in range(6):
        train, held = hold_out(keys, 0.2, seed, whole=False)
        assert (len(train), len(held)) == (11, 3)
        train, held = hold_out(keys, 0.2, seed)
        assert sorted([*train, *held]) == list(range(14))
        assert not {keys[i] for i in train} & {keys[i] for i in held} or len(train) == 1


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "a"}', "it has prompt: str"),
        ('{"prompt": "a", "response": 3}', "response: int"),
        ("[1]", "list is no record"),
        ("{", "not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "needs a role of system"),
        ('{"messages": [{"role": "user"}]}', "needs a role"),
        ('{"messages": "hello"}', "must be a list"),
    ],
)
def test_bad_records(line: str, word: str, tiny: Path, tmp_path: Path) -> None:
    good = '{"prompt": "a", "response": "b"}\n'
    (tmp_path / "a.jsonl").write_text(good + line + "\n")
    with pytest.raises(DataError, match="line 2: ") as caught:
        read_examples([str(tmp_path / "a.jsonl")], load_model(tiny).tokenizer, seq_len=32)
    assert word in str(caught.value)


def test_names_of_data_sets(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingError, match="hf:some/set: the package datasets is not"):
            Corpus(["hf:some/set"])
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool):
        asked.append((name, config, split, streaming))
        return iter([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"}])

    fake = types.ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = read_examples(["hf:some/set@main:test"], load_model(tiny).tokenizer, seq_len=32)
    assert len(found.kept) == 2 and asked == [("some/set", "main", "test", True)]


def test_the_bundled_questions_are_what_the_code_makes() -> None:
    lines = [json.dumps(record) + "\n" for record in hop_questions(0, 4000)]
    assert bundled_questions().read_text("utf-8") == "".join(lines)


@pytest.mark.parametrize(
    "theirs",
    [
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        {"prompt": "add\n\n1 and 2\n\n", "response": "3"},
        {"q": "add\n\n1 and 2\n\n", "a": "3"},
    ],
)
def test_alpaca_and_columns_are_a_prompt_with_its_response(theirs: dict[str, str]) -> None:
    from looptx_core.data.records import parse, rename_columns

    columns = ("prompt=q", "response=a") if "q" in theirs else ()
    found = parse(rename_columns(theirs, columns, "line 1"), "line 1", Path())
    assert [turn.content for turn in found.turns] == [(("add\n\n1 and 2\n\n",),), (("3",),)]
    assert found.form == "prompt"


def test_sharegpt_is_a_conversation() -> None:
    from looptx_core.data.records import parse

    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"},
             {"from": "gpt", "value": "hello"}]  # fmt: skip
    found = parse({"id": 1, "conversations": turns}, "line 1", Path())
    assert [(turn.role, turn.content) for turn in found.turns] == [
        ("system", (("be brief",),)), ("user", (("hi",),)), ("assistant", (("hello",),)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "needs a value of text"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "content of text"),
        ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, "needs a value of text"),
        ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "needs a role"),
        ({"messages": [{"role": [], "content": "x"}]}, "needs a role"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be text"),
    ],
)
def test_damaged_foreign_records(record: dict[str, object], told: str) -> None:
    from looptx_core.data.records import parse

    with pytest.raises(DataError, match=told):
        parse(record, "line 1", Path())


def test_columns_that_can_not_be() -> None:
    from looptx_core.config.finetune import FinetuneConfig
    from looptx_core.data.records import rename_columns
    from looptx_core.errors import UsageError

    for columns in (("question",), ("prompt=",), ("prompt=a", "prompt=b"), ("x=y",)):
        with pytest.raises(UsageError, match="columns"):
            FinetuneConfig(columns=columns)
    with pytest.raises(DataError, match=r"no column q.*it has question"):
        rename_columns({"question": "x"}, ("prompt=q",), "line 1")
