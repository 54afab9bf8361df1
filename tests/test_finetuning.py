"""Finetuning: what is learned and what stays, adapters as PEFT sees them, merging, bad input."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

from looptx_cli.main import main
from looptx_core.checkpoint.folder import LoadedModel, load_model, read_chat_template, save_model
from looptx_core.checkpoint.registry import resolve_adapter, resolve_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.ternary import pack_model
from looptx_core.data.bundled import bundled_questions
from looptx_core.data.chat import chat_prompt
from looptx_core.data.corpus import Corpus
from looptx_core.data.examples import Example, Packed, hold_out, pack, read_examples
from looptx_core.data.hops import hop_questions
from looptx_core.data.pictures import read_picture
from looptx_core.data.tokenizer import END, train_tokenizer
from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.finetuning.adapters import attach, load_adapter
from looptx_core.finetuning.merge import merge, merge_adapter
from looptx_core.finetuning.quantise import quantise, stored_bytes
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.generation.engine import ChatPrompt, Engine, PicturePrompt
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import evaluate_batch
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.metrics import calibration_error
from looptx_core.training.objective import loop_loss

SHAPE = ModelConfig(
    vocab_size=300, d_model=64, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128, core_layers=1,
    max_loops=3, max_seq_len=256,
)  # fmt: skip
QUICK = {"steps": 6, "seq_len": 64, "batch_size": 4, "lr": 1e-2, "precision": "float32",
         "save_every": 2, "val_every": 6, "val_batches": 1, "log_every": 1}  # fmt: skip
METHODS = {
    "full": {},
    "lora": {"lora": True, "lora_dropout": 0.1},
    "dora": {"dora": True},
    "rslora": {"lora": True, "rslora": True},
    "nf4": {"qlora": True},
    "int8": {"qlora": True, "quantization": "int8"},
    "dora nf4": {"dora": True, "qlora": True},
    "per loop": {"lora_per_loop": True},
    "per loop nf4": {"lora_per_loop": True, "qlora": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    text = "".join(f"{q['prompt']}{q['response']} " for q in hop_questions(7, 40))
    tokenizer = train_tokenizer([text], 300)
    place = tmp_path_factory.mktemp("base") / "tiny"
    save_model(place, LoopedTransformer(SHAPE), tokenizer, exit_settings=ExitSettings(), facts={})
    return place


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in hop_questions(1, 60)))
    return file


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, questions, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A finished run of each method; the second half of the adapters' tests read it."""
    folder = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "-")
    folder.mkdir()
    config = FinetuneConfig(**QUICK, **METHODS[request.param])
    finetune(prepare(config, base=tiny, data=[str(questions)]), folder=folder)
    yield request.param, folder


def tokens(loaded: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, loaded.config.vocab_size, (2, 12), generator=generator)


def logits(model: LoopedTransformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, SHAPE.max_loops).logits


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


# Data


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
    packed = Packed(found.kept, 100, 1)
    assert max(len(row) for row in packed.rows) > 1
    for index in range(3):
        row = packed[index]
        around = loaded.model.surroundings(100, documents=row["documents"][None])
        *_, state = loaded.model.states(row["tokens"][None, :-1], 3, around=around)
        together = loaded.model.head(loaded.model.decode(state, around))[0]
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
    packed = Packed(found.kept, 20, 1)
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
    train, val = hold_out(examples, 0.2, seed=3)
    assert (len(train), len(val)) == (80, 20)
    assert not {int(e.ids[0]) for e in train} & {int(e.ids[0]) for e in val}


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


def test_the_chat_template_is_the_one_that_was_trained(tiny: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a <|end|>?"}]
    data = write(tmp_path / "chat.jsonl",
                 *[{"messages": [*asked, {"role": "assistant", "content": "b"}]}] * 4)  # fmt: skip
    (tmp_path / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 1}), lora=True)
    result = finetune(prepare(config, base=tiny, data=[data]), folder=tmp_path / "run")
    assert read_chat_template(result.model_folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(result.model_folder)
    plain = [asked[0], {"role": "user", "content": "a?"}]
    ours = load_model(tiny).tokenizer
    assert chat_prompt(plain, ours) == theirs.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    # A user can't spell a marker: it stays so many characters.
    assert chat_prompt(asked, ours).count(ours.token_to_id(END)) == 0


# Chats


@pytest.fixture(scope="module")
def talker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finetuned on a chat of two turns."""
    place = tmp_path_factory.mktemp("chats")
    said = [("user", "Hello"), ("assistant", "Good day."), ("user", "More"), ("assistant", "No.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in said]}
    data = write(place / "chats.jsonl", *[chat] * 16)
    (place / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 60, "val_every": 60, "save_every": 60}), lora=True)
    finetune(prepare(config, base=tiny, data=[data]), folder=place / "run")
    return place / "run"


def test_a_chat_is_asked_by_its_template(talker: Path, capsys) -> None:
    ask = ["generate", "--adapter", str(talker), "--temperature", "0", "Hello", "--max-new-tokens"]
    assert main([*ask, "20", "--json", "--chat"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"], found["finish_reason"]) == ("Hello", "Good day.", "end")
    assert main([*ask, "20", "--chat"]) == 0
    assert capsys.readouterr().out == "Good day.\n"
    assert main([*ask, "20", "--chat", "Hello"]) == 0
    assert capsys.readouterr().out == "Good day.\nGood day.\n"
    # Without the template it is a text to go on with.
    assert main([*ask, "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] < found["prompt_tokens"]


def test_a_terminal_talks_by_turns(talker: Path, tiny: Path, capsys, monkeypatch) -> None:
    def session(*lines: str, model: tuple[str, ...] = ("--adapter", str(talker))) -> list[str]:
        typed = iter(lines)

        def read(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        assert main(["generate", *model, "--temperature", "0", "--max-new-tokens", "20"]) == 0
        return capsys.readouterr().out.splitlines()

    assert session("Hello", "More", "/new", "Hello") == ["Good day.", "No.", "Good day.", ""]
    # A line that is too long is refused and forgotten; the talk goes on.
    assert session("ab" * 300, "Hello")[-2:] == ["Good day.", ""]
    # The oldest turns give way to the newest.
    assert len(session(*["Hello"] * 40)) == 41
    assert session("Hello", model=("--model", str(tiny)))  # a text, gone on with


def test_no_chat_with_a_model_that_learned_none(tiny: Path, capsys) -> None:
    assert main(["generate", "--model", str(tiny), "--chat", "Hello"]) == 2
    assert "not finetuned on chats" in capsys.readouterr().err


# Pictures


@pytest.fixture(scope="module")
def seeing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads pictures, beside a red one and a blue one."""
    place = tmp_path_factory.mktemp("seeing")
    shape = ModelConfig(**(SHAPE.to_dict() | {"vision_layers": 1, "vision_width": 32,
                                              "max_patches": 4}))  # fmt: skip
    torch.manual_seed(0)
    save_model(place / "model", LoopedTransformer(shape), load_model(tiny).tokenizer,
               exit_settings=ExitSettings(), facts={})  # fmt: skip
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(place / f"{colour}.png")
    return place


def test_pictures_stand_where_generation_puts_them(seeing: Path) -> None:
    loaded = load_model(seeing / "model")
    red = read_picture(seeing / "red.png", loaded.config)
    engine = Engine(loaded.model, loaded.tokenizer)
    data = write(
        seeing / "forms.jsonl",
        {"image": "red.png", "prompt": "ab", "response": "c"},
        {"image": ["red.png"], "prompt": "a<|image|>b", "response": "c"},
        {"image": "red.png", "messages": [{"role": "user", "content": "ab"},
                                          {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a<|image|>b", "image": "red.png"},
                      {"role": "assistant", "content": "c"}]},
        {"parts": [{"text": "ab"}, {"image": "red.png"}, {"text": "c"}]},
    )  # fmt: skip
    found = read_examples([data], loaded.tokenizer, seq_len=64, config=loaded.config)
    assert found.pictures == 5 and found.chat
    asked = [PicturePrompt("ab", (red,)), PicturePrompt("a<|image|>b", (red,))]
    asked += [ChatPrompt(({"role": "user", "content": text},), (red,))
              for text in ("ab", "a<|image|>b")]  # fmt: skip
    for example, prompt in zip(found.kept, asked):
        ids = engine._encode(prompt)
        assert example.ids[: len(ids)].tolist() == ids
        assert not example.counted[: len(ids)].any() and example.counted[len(ids) :].all()
    joined = engine._encode(PicturePrompt("ab<|image|>c", (red,)))
    assert found.kept[4].ids.tolist() == [*joined, engine.end]
    assert (found.kept[4].ids[found.kept[4].counted] != loaded.config.image_token).all()


def test_a_model_learns_from_pictures(seeing: Path, workplace, capsys) -> None:
    """Question and length are the same; only the picture tells the answer."""
    record = {"red": " warm", "blue": " cold"}
    data = write(seeing / "colours.jsonl",
                 *[{"image": f"{colour}.png", "prompt": "It is", "response": answer}
                   for colour, answer in record.items()] * 12)  # fmt: skip
    command = ["finetune", "--model", str(seeing / "model"), "--data", data, "--steps", "40"]
    flags = ["--seq-len", "32", "--batch-size", "8", "--precision", "float32", "--lr", "1e-2"]
    assert main([*command, *flags]) == 0
    assert "24 pictures" in capsys.readouterr().err
    for colour, answer in record.items():
        ask = ["generate", "It is", "--image", str(seeing / f"{colour}.png"), "--temperature", "0"]
        assert main([*ask, "--max-new-tokens", "8", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == answer
    # An adapter leaves the encoder of pictures as it is.
    assert main([*command, *flags, "--lora", "--steps", "2"]) == 0
    weights = load_file("runs/finetune-2/final/adapter_model.safetensors")
    assert weights and not any("vision" in name for name in weights)


def test_bad_pictures(seeing: Path, tiny: Path, workplace, capsys) -> None:
    good = {"image": "red.png", "prompt": "a", "response": "b"}
    bad = {
        "no picture none.png": good | {"image": "none.png"},
        "2 <|image|> in a text for 1 pictures": good | {"prompt": "<|image|><|image|>"},
        "image must be a path": good | {"image": 3},
        "not a picture": good | {"image": "bad.png"},
    }
    (seeing / "bad.png").write_bytes((seeing / "red.png").read_bytes()[:40])
    command = ["finetune", "--steps", "1", "--precision", "float32", "--model"]
    for word, record in bad.items():
        data = write(seeing / "bad.jsonl", good, good, record)
        assert main([*command, str(seeing / "model"), "--data", data]) == 4
        assert word in capsys.readouterr().err
    data = write(seeing / "bad.jsonl", good, good, *bad.values())
    assert main([*command, str(seeing / "model"), "--data", data, "--skip-bad"]) == 0
    assert "left out 4" in capsys.readouterr().err
    assert main([*command, str(tiny), "--data", data]) == 4
    assert "this model has no vision" in capsys.readouterr().err
    late = write(seeing / "late.jsonl", {"text": "ab"}, good)
    assert main([*command, str(tiny), "--data", late]) == 4
    assert "this model reads none" in capsys.readouterr().err


def test_a_picture_is_not_cut(seeing: Path) -> None:
    loaded = load_model(seeing / "model")
    long = {"image": "red.png", "prompt": "ab" * 4, "response": "cd" * 20}
    data = write(seeing / "long.jsonl", long, long, long | {"prompt": "ab" * 20 + "<|image|>"})
    found = read_examples([data], loaded.tokenizer, seq_len=40, too_long="truncate",
                          config=loaded.config)  # fmt: skip
    assert (found.truncated, found.dropped, found.pictures) == (2, 1, 2)


def test_the_bundled_questions_are_what_the_code_makes() -> None:
    lines = [json.dumps(record) + "\n" for record in hop_questions(0, 4000)]
    assert bundled_questions().read_text("utf-8") == "".join(lines)


# Adapters


def test_a_run_learns_and_leaves_the_rest(run, tiny: Path) -> None:
    method, folder = run
    final, base = folder / "final", load_model(tiny)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in metrics if "train_loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    if method == "full":
        assert not torch.equal(
            load_model(final).model.core[0].mlp.up_proj.weight,
            base.model.core[0].mlp.up_proj.weight,
        )
        return
    stored = load_file(final / "adapter_model.safetensors")
    assert any(".confidence." in name for name in stored)
    assert not any("embedding" in name for name in stored)
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == str(tiny.resolve())
    found = load_adapter(load_model(tiny), final, merge=False).model
    for name, weight in base.model.named_parameters():
        if not name.startswith("confidence"):
            there = {**dict(found.named_parameters())}
            inside = name.replace("_proj.weight", "_proj.base_layer.weight")
            assert torch.equal(there.get(name, there.get(inside)), weight), name
    ids = tokens(base)
    assert not torch.allclose(logits(found, ids), logits(base.model, ids), atol=1e-3)


def test_peft_opens_the_folder(run, tiny: Path) -> None:
    """Onto our model, by PEFT alone; with a part for each loop, one loop at a time."""
    method, folder = run
    if method == "full":
        pytest.skip("no adapter")
    final, ids = folder / "final", tokens(load_model(tiny))
    ours = load_adapter(load_model(tiny), final, merge=False).model
    theirs = load_model(tiny).model
    peft = PeftModel.from_pretrained(theirs, str(final))
    if not method.startswith("per loop"):
        assert torch.allclose(logits(theirs, ids), logits(ours, ids), atol=1e-6)
        return
    for loop in (1, 2, 3):
        peft.load_adapter(str(final / f"loop_{loop}"), f"loop_{loop}")
    around = theirs.surroundings(ids.shape[1])
    with torch.no_grad():
        peft.set_adapter("default")
        state = embedding = theirs.encode(ids, around)
        for loop in (1, 2, 3):
            peft.base_model.set_adapter(f"loop_{loop}")
            state = theirs.step(state, embedding, loop, around)
        peft.base_model.set_adapter("default")
        explicit = theirs.head(theirs.decode(state, around))
    assert torch.allclose(explicit, logits(ours, ids), atol=1e-6)


def test_a_shared_adapter_merges(run, tiny: Path) -> None:
    method, folder = run
    final, ids = folder / "final", tokens(load_model(tiny))
    if method == "full":
        pytest.skip("no adapter")
    if method.startswith("per loop"):
        with pytest.raises(UsageError, match="an adapter for each of 3 loops"):
            merge_adapter(tiny, final)
        return
    apart = logits(load_adapter(load_model(tiny), final, merge=False).model, ids)
    merged = merge_adapter(tiny, final)
    assert torch.allclose(logits(merged, ids), apart, atol=1e-5)
    assert merged.head.weight is merged.embedding.weight
    names = dict(load_model(tiny).model.named_parameters()).keys()
    assert dict(merged.named_parameters()).keys() == names
    whole = merge(tiny, final)
    save_model(folder / "merged", whole.model, whole.tokenizer, exit_settings=whole.exit, facts={},
               overwrite=True)  # fmt: skip
    assert torch.equal(logits(load_model(folder / "merged").model, ids), logits(merged, ids))


@pytest.mark.parametrize("recompute", [False, True])
def test_every_loop_trains_its_own_adapter(recompute: bool, tiny: Path) -> None:
    model = load_model(tiny).model
    attach(model, FinetuneConfig(lora_per_loop=True))
    loops = {name: p for name, p in model.named_parameters() if ".lora_B.loop_" in name}
    assert len(loops) == 3 * 7
    ids = torch.arange(2)
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=3), 3)
    batch = tokens(load_model(tiny))
    found = loop_loss(model.train(), batch, schedule, 0, ids, loss_at="last", recompute=recompute)
    found.loss.backward()
    for name, weight in loops.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    by_loop = [loops[f"core.0.mlp.down_proj.lora_B.loop_{n}.weight"].grad for n in (1, 2, 3)]
    assert not torch.allclose(by_loop[0], by_loop[1]) and not torch.allclose(*by_loop[1:])
    # Against the gradient of one adapter that all share: the sum over the loops.
    shared = load_model(tiny).model
    attach(shared, FinetuneConfig(lora=True))
    for name, p in model.named_parameters():
        if ".lora_A.loop_" in name:
            p.data = torch.full_like(p, 0.1)
    for name, p in shared.named_parameters():
        if ".lora_A." in name:
            p.data = torch.full_like(p, 0.1)
    model.zero_grad()
    for net in (model, shared):
        loop_loss(net, batch, schedule, 0, ids, loss_at="last", recompute=recompute).loss.backward()
    one = dict(shared.named_parameters())["core.0.mlp.down_proj.lora_B.default.weight"].grad
    total = sum(loops[f"core.0.mlp.down_proj.lora_B.loop_{n}.weight"].grad for n in (1, 2, 3))
    assert torch.allclose(total, one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.4), ("int8", 0.55)])
def test_a_quantised_base_is_small_and_near(kind: str, share: float, tiny: Path) -> None:
    base, model = load_model(tiny).model, load_model(tiny).model
    blocks = [model.prelude, model.core, model.coda]
    quantise(model, kind)
    bf16 = 2 * sum(p.numel() for p in [*base.prelude.parameters(), *base.core.parameters(),
                                       *base.coda.parameters()])  # fmt: skip
    assert sum(stored_bytes(stack) for stack in blocks) < share * bf16
    ids = torch.arange(12)[None]
    exact = logits(base, ids)
    error = (logits(model, ids) - exact).norm() / exact.norm()
    assert 0 < error < (0.3 if kind == "nf4" else 0.03)
    # Evaluation must leave training as it was.
    model.train()
    first = model(ids, 2).logits.detach()
    logits(model, ids)
    assert torch.equal(model.train()(ids, 2).logits, first)


def test_a_small_base_in_nf4_takes_a_third_of_its_bf16_memory() -> None:
    model = LoopedTransformer(ModelConfig(**PRESETS["small"]["model"]))
    parameters = sum(p.numel() for p in model.trunk_parameters())
    quantise(model, "nf4")
    assert stored_bytes(model) < 0.35 * 2 * parameters
    assert model.head.weight is model.embedding.weight


class StopAt(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("method", ["full", "lora", "per loop nf4"])
def test_a_resumed_run_is_the_same_run(method, tiny, questions, tmp_path) -> None:
    config = FinetuneConfig(**QUICK, **METHODS[method])

    def go(name: str, **how) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        ready = prepare(config, base=tiny, data=[str(questions)])
        return finetune(ready, folder=tmp_path / name, **how).model_folder

    whole = go("whole")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        go("broken", callbacks=[StopAt()])
    again = go("broken", resume=True)
    files = sorted(whole.rglob("*.safetensors"))
    assert len(files) == (4 if "loop" in method else 1)
    for file in files:
        left, right = load_file(file), load_file(again / file.relative_to(whole))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    saved = next((tmp_path / "whole/checkpoints").glob("*.ckpt"))
    stored = torch.load(saved, weights_only=True)["state_dict"]
    assert any("embedding" in name for name in stored) == (method == "full")


def test_the_calibration_error_is_that_of_its_definition() -> None:
    hit = torch.tensor([0.0, 1.0] * 60)
    assert calibration_error(torch.full((120,), 0.5), hit) == pytest.approx(0.0, abs=0.02)
    assert calibration_error(torch.full((120,), 0.9), hit) == pytest.approx(0.4, abs=0.02)
    assert calibration_error(hit, hit) == 0.0


# As a user sees it


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    return tmp_path


FLAGS = ["--steps", "2", "--seq-len", "64", "--batch-size", "4", "--precision", "float32"]


def test_finetune_then_generate(tiny, questions, workplace, capsys) -> None:
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--lora", *FLAGS]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "calibration error" in out and "runs/finetune-1" in out
    assert "try next: looptx generate" in err.splitlines()[-1]
    # The newest run is an adapter's: its base and itself.
    found = resolve_model(None)
    assert found.folder == tiny.resolve() and found.adapter == Path("runs/finetune-1/final")
    assert resolve_adapter("runs/finetune-1").adapter == found.adapter
    ask = ["generate", "map ab", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    texts = []
    for extra in ([], ["--adapter", "runs/finetune-1"],
                  ["--model", str(tiny), "--adapter", "runs/finetune-1/final"]):  # fmt: skip
        assert main([*ask, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] == texts[2]
    # An adapter is no base to finetune or to train an adapter of.
    assert main([*command[:1], "--model", "runs/finetune-1", *command[3:]]) == 4
    assert "merge it first" in capsys.readouterr().err
    assert main(["finetune", "--data", str(questions), *FLAGS]) == 0  # so the bundled model's
    assert "bundled model" in capsys.readouterr().err


def test_json_lines_end_with_a_summary(tiny, questions, workplace, capsys) -> None:
    assert main(["finetune", "--model", str(tiny), "--data", str(questions), "--qlora", "--json",
                 *FLAGS]) == 0  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = lines[-1]["summary"]
    assert lines[0]["step"] == 2 and len(last["loss_by_loop"]) == 3
    assert 0 <= last["ece"] <= 1 and 0 <= last["ece_before"] <= 1
    assert last["quantised_loss"] == pytest.approx(last["loss_by_loop"][-1], rel=0.1)


BAD_INPUT = {
    "no target": (["--lora", "--target-modules", "q_prj"], 2, "there are down_proj, gate_proj"),
    "tied head": (["--lora", "--target-modules", "head"], 2, "shares its weights"),
    "too long": (["--seq-len", "8"], 2, "--too-long drop or truncate"),
    "beyond the context": (["--seq-len", "500"], 2, "exceeds the model's context"),
    "beyond the loops": (["--max-loops", "9"], 2, "exceeds the model's max_loops"),
    "rank": (["--lora-rank", "0"], 2, "lora_rank"),
    "both": (["--dora", "--lora-per-loop"], 2, "leave one out"),
    "int8 and DoRA": (["--dora", "--qlora", "--quantization", "int8"], 2, "use --quantization nf4"),
    "no data": (["--data", "none.jsonl"], 4, "none.jsonl: no such file"),
    "a data set": (["--data", "hf:a/b"], 3, "the package datasets is not installed"),
    "unknown type": (["--qlora", "--quantization", "fp3"], 2, "nf4 or int8"),
    "no run": (["--resume", "none"], 4, "not a run of looptx finetune"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, tiny, questions, workplace, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    flags, code, word = BAD_INPUT[case]
    command = ["finetune", *flags]
    if case != "no run":
        command += ["--model", str(tiny)]
        command += [] if "--data" in flags else ["--data", str(questions)]
    assert main(command) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("looptx: error: ")]
    assert out == "" and len(errors) == 1 and word in errors[0], err
    assert not list(workplace.iterdir())


def test_a_bitsandbytes_that_is_not_here(tiny, questions, workplace, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = ["finetune", "--model", str(tiny), "--data", str(questions), "--qlora"]
    assert main(command) == 3
    assert "--qlora needs bitsandbytes" in capsys.readouterr().err


def test_a_bitsandbytes_that_cannot_run(tiny, questions, workplace, capsys, monkeypatch) -> None:
    import bitsandbytes

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    assert main(["finetune", "--model", str(tiny), "--data", str(questions), "--qlora"]) == 3
    assert "can't run nf4 here (no kernel for this device)" in capsys.readouterr().err


def test_bad_adapters(tiny, questions, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 1}), lora=True)
    final = finetune(prepare(config, base=tiny, data=[str(questions)]), folder=tmp_path / "run")
    ask = ["generate", "map", "--adapter"]

    def refused(folder: Path, *flags: str) -> str:
        assert main([*ask, str(folder), *flags]) == 4
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "looptx: error" in x]
        return line

    other = load_model(tiny)
    torch.manual_seed(1)
    save_model(tmp_path / "other", LoopedTransformer(SHAPE), other.tokenizer,
               exit_settings=ExitSettings(), facts={})  # fmt: skip
    folder = final.model_folder
    assert "of another base" in refused(folder, "--model", str(tmp_path / "other"))
    assert "no adapter" in refused(tiny)

    weights = folder / "adapter_model.safetensors"
    torch.save({}, pickled := folder / "adapter_model.bin")
    kept = weights.rename(tmp_path / "kept")
    assert "a pickle can run code" in refused(folder)
    pickled.rename(weights)
    assert "a pickle can run code" in refused(folder)
    weights.unlink()
    assert "adapter_model.safetensors is missing" in refused(folder)
    save_file({"x": torch.ones(2)}, weights)
    shutil.copy(kept, weights)
    assert main([*ask, str(folder), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("linear", ["ternary", "packed"])
def test_a_ternary_base(linear: str, tiny, questions, workplace, capsys) -> None:
    shape = ModelConfig(**(SHAPE.to_dict() | {"linear": "ternary"}))
    model = LoopedTransformer(shape)
    save_model(Path("ternary"), pack_model(model) if linear == "packed" else model,
               load_model(tiny).tokenizer, exit_settings=ExitSettings(), facts={})  # fmt: skip
    command = ["finetune", "--model", "ternary", "--data", str(questions), *FLAGS]
    assert main([*command, "--lora"]) == 2
    assert "its weights are ternary" in capsys.readouterr().err
    # Latent float weights can be trained on; packed ones can't.
    assert main([*command, "--out", "all"]) == (2 if linear == "packed" else 0)


def test_nothing_is_lost_to_bad_data(tiny, questions, workplace, capsys) -> None:
    """--overwrite removes the old run only once the new one can start."""
    command = ["finetune", "--model", str(tiny), "--lora", *FLAGS, "--out", "kept", "--data"]
    assert main([*command, str(questions)]) == 0
    assert main([*command, "none.jsonl", "--overwrite"]) == 4
    assert Path("kept/final/adapter_config.json").exists()


def test_full_precision_adapters_are_not_read_from_pickles(monkeypatch, tiny, run) -> None:
    method, folder = run
    if method == "full":
        pytest.skip("no adapter")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    load_adapter(load_model(tiny), folder / "final")
    assert builtins.open  # the folder's files are read by safetensors alone
