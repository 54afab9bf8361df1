"""Tokenizers that others made: their spaces, beginnings and ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_cases import MOBY
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from looptx_cli.main import main
from looptx_core.api import load
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

SHAPE = ModelConfig(
    vocab_size=32, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_seq_len=64,
    core_layers=1, loops=1, max_loops=2,
)  # fmt: skip
WORDS = ["<s>", "</s>", "▁It", "▁was", "▁the", "▁best", "▁of", "▁times", "▁worst", "▁age"]


def spaced(prepend: bool) -> Tokenizer:
    """One that writes a space before a text: by Metaspace, or as Llama 2's, by a normalizer."""
    vocab = {word: i for i, word in enumerate([*WORDS, "s", "ing"])}
    found = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    found.add_special_tokens(["<s>", "</s>"])
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if prepend else "first")
    found.decoder = decoders.Metaspace(prepend_scheme="first")
    if prepend:
        found.normalizer = normalizers.Prepend("▁")
        found.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return found


def drawn() -> LoopedTransformer:
    torch.manual_seed(1)
    model = LoopedTransformer(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("prepend", [False, True])
def test_prompt_and_continuation_are_what_the_ids_decode_to(prepend: bool) -> None:
    tokenizer = spaced(prepend)
    engine = Engine(drawn(), tokenizer)
    options = GenerationOptions(temperature=1.0, max_new_tokens=12, ignore_eos=True)
    for prompt in ("It was", "the age of", ""):
        [found] = engine.complete([prompt], options)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        assert prompt + found.text == tokenizer.decode([*ids, *(t.id for t in found.tokens)])
        assert found.text.startswith(" ") == bool(prompt)


BEGIN, TEXT_END, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def foreign_folder(folder: Path, kind: str) -> Path:
    """A model as Llama 3's: a BOS, two ends and a chat template."""
    transformers = pytest.importorskip("transformers")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BEGIN, TEXT_END, TURN_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([MOBY[:20_000]], trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BEGIN, eos_token=TURN_END
    )
    tokenizer.chat_template = "{{bos_token}}{% for m in messages %}{{m.content}}{% endfor %}"
    torch.manual_seed(0)
    shape = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(shape)
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text("utf-8"))


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_what_begins_and_ends_a_text_goes_there_and_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    source = foreign_folder(tmp_path / "source", kind)
    data = tmp_path / "few.txt"
    data.write_text(MOBY[:30_000], "utf-8")
    common = ["--quiet", "--data", str(data)]
    assert main(["convert", "--from-hf", "source", "--out", "ours", *common]) == 0
    assert main(["convert", "--to-hf", "--model", "ours", "--out", "back", *common]) == 0

    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for folder in (tmp_path / "ours", tmp_path / "back"):
        ids = read(folder, "generation_config.json")
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (0, [1, 2])
        again = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        for part in ("bos_token", "eos_token", "chat_template"):
            assert getattr(again, part) == getattr(theirs, part)
        assert again("Call me").input_ids == theirs("Call me").input_ids

    # The same tokens, after the same beginning.
    prompt = theirs("Call me", return_tensors="pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = model.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    ours = load("ours")
    found = ours.generate("Call me", temperature=0, max_new_tokens=8, ignore_eos=True)
    assert theirs("Call me").input_ids + [token.id for token in found.tokens] == expected
    assert found.prompt_tokens == len(theirs("Call me").input_ids)


@pytest.mark.parametrize("end", [1, 2])
def test_generation_stops_at_any_of_the_ends(
    end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign_folder(tmp_path / "source", "Llama")
    data = tmp_path / "few.txt"
    data.write_text(MOBY[:30_000], "utf-8")
    assert main(["convert", "--from-hf", "source", "--out", "m", "--data", str(data)]) == 0
    ours = load("m")
    plain = ours.generate("Call me", temperature=0, max_new_tokens=4, ignore_eos=True)
    with torch.no_grad():  # the third token becomes an end
        head = ours.loaded.model.head.weight
        head[[end, plain.tokens[2].id]] = head[[plain.tokens[2].id, end]]
    found = ours.generate("Call me", temperature=0, max_new_tokens=8)
    place = [token.id for token in plain.tokens].index(plain.tokens[2].id)
    assert found.finish_reason == "end" and len(found.tokens) == place + 1
    assert found.tokens[-1].id == end
    for wrong in (3000, -1, "x"):
        (tmp_path / "m" / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [1, wrong], "exit": {}})
        )
        with pytest.raises(DataError, match=r"eos_token_id .* is no token"):
            load_model(tmp_path / "m")
