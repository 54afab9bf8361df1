"""SentencePiece's vocabularies of GGUF files: the ids of its own rule, merges by score."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from data_cases import MOBY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from looptx_cli.main import main
from looptx_core.conversion.gguf_sentencepiece import scores_of
from looptx_core.conversion.gguf_tokenizer import read_gguf_tokenizer, tokenizer_values
from looptx_core.data.tokenizer import StreamDecoder, as_plain_text
from looptx_core.errors import DataError, UsageError

SPACE = "\u2581"
SPECIAL = {"<unk>": 2, "<s>": 3, "</s>": 3}
LATER = {SPACE * 2: 1, SPACE * 3: 1, SPACE * 4: 1, "<tool>": 4, "<end_of_turn>": 3}
HARD = (
    "Call me Ishmael. Some years ago - never mind how long precisely",
    "  two  spaces,   three,     five\n\n\t and a run of nine:         end ",
    "naïve Ünïcode, cafe\u0301, Москва 2024, 東京は2時, हिन्दी, 🐋🏳️\u200d🌈!",
    "def f(x_1=0x1F): return {'a': [x**2]} # <tool> <s> </s> <0x0A> <end_of_turn>",
    f"{SPACE}a{SPACE}{SPACE}b", " ", "   ", "\n", "a", "",
)  # fmt: skip


def vocabulary(size: int) -> dict[str, Any]:
    """Metadata of so many tokens: marks, the bytes, some letters and their joints, runs of spaces
    of one score, and tokens that were added later."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    count = size - len(SPECIAL) - 256 - len(LATER)
    trained.train_from_iterator([MOBY[:20_000]], trainers.BpeTrainer(
        vocab_size=count, limit_alphabet=min(40, count // 2), show_progress=False))  # fmt: skip
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    types = {**SPECIAL, **{f"<0x{byte:02X}>": 6 for byte in range(256)},
             **dict.fromkeys(learned, 1), **LATER}  # fmt: skip
    scores = {token: float(-number) for number, token in enumerate(learned)}
    scores |= {token: -1e9 if token[0] == SPACE else -1000.0 for token in LATER}
    return {
        "model": "llama", "tokens": list(types), "token_type": list(types.values()),
        "scores": [scores.get(token, 0.0) for token in types], "eos_token_id": 2,
    }  # fmt: skip


def by_score(values: dict[str, Any], text: str, prefix: bool = True) -> list[int]:
    """SentencePiece's rule, word for word: join the best neighbours until none join."""
    tokens, types, scores = values["tokens"], values["token_type"], values["scores"]
    known = {token: number for number, token in enumerate(tokens) if types[number] == 1}
    ids: list[int] = []
    for place, part in enumerate(text.split("<tool>")):
        if place:
            ids.append(tokens.index("<tool>"))
        parts = list((" " if prefix and part else "") + part)
        parts = [SPACE if char == " " else char for char in parts]
        while True:
            pairs = [(-scores[known[a + b]], at) for at, (a, b) in enumerate(pairwise(parts))
                     if a + b in known]  # fmt: skip
            if not pairs:
                break
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            names = [part] if part in known else [f"<0x{byte:02X}>" for byte in part.encode()]
            ids += [tokens.index(name) for name in names]
    return ids


def read(values: dict[str, Any], **changes: Any) -> tuple[Tokenizer, Any]:
    """changes: other values, or None to leave one out."""
    found = {k: v for k, v in {**values, **changes}.items() if v is not None}
    return read_gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()}, "x.gguf")[:2]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return vocabulary(600)


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_rule(values: dict[str, Any], prefix: bool) -> None:
    tokenizer, special = read(values, add_space_prefix=prefix)
    draw = random.Random(7)
    parts = [*HARD[2], *"  \n<>s/", "  ", "    ", "the", "whale", "<tool>", *values["tokens"][260:]]
    texts = [*HARD, *("".join(draw.choices(parts, k=draw.randrange(1, 30))) for _ in range(100))]
    texts += [" " * count + "x" for count in range(1, 14)]
    for text in texts:
        expected = by_score(values, text, prefix)
        encoded = tokenizer.encode(text)
        assert encoded.ids == [1, *expected], text
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected
        plain = text.replace(SPACE, " ")
        if not (prefix and "<tool>" in text):  # which puts a space behind itself
            assert tokenizer.decode(encoded.ids) == plain
            stream = StreamDecoder(tokenizer)
            assert "".join(map(stream.step, encoded.ids)) + stream.flush() == plain
    assert (special.bos, special.eos) == ("<s>", "</s>")
    assert special.ends == (2, values["tokens"].index("<end_of_turn>"))


def test_texts_begin_as_the_file_says(values: dict[str, Any]) -> None:
    tokenizer, special = read(values, add_bos_token=False, bos_token_id=0, eot_token_id=1)
    assert tokenizer.encode("a").ids == by_score(values, "a")
    assert special.bos == "<unk>" and special.ends == (2, 1)


@pytest.mark.parametrize("prefix", [True, False])
def test_written_again_it_gives_the_same_ids(values: dict[str, Any], prefix: bool) -> None:
    tokenizer, special = read(values, add_space_prefix=prefix)
    found = tokenizer_values(tokenizer, special, 604, Path("m"))
    again, names, _ = read_gguf_tokenizer(found, "m")
    for text in (*HARD, *(" " * count + "x" for count in range(14))):
        assert again.encode(text).ids == tokenizer.encode(text).ids, text
    assert found["tokenizer.ggml.add_space_prefix"] == prefix and names == special
    assert found["tokenizer.ggml.tokens"][600:] == [f"[PAD{number}]" for number in range(600, 604)]
    assert scores_of([("a", "aa"), ("a", "a"), ("aa", "a")], {"a", "aa", "aaa"}) is None
    described = json.loads(tokenizer.to_str())
    del described["model"]["merges"][-1]
    changed = as_plain_text(Tokenizer.from_str(json.dumps(described)))
    with pytest.raises(UsageError, match="in an order that no scores give"):
        tokenizer_values(changed, special, 600, Path("m"))


def test_what_is_missing_or_not_known_is_named(values: dict[str, Any]) -> None:
    count, tokens = len(values["tokens"]), values["tokens"]
    no_score = f"no score for each of its {count} tokens"
    refused: dict[str, dict[str, Any]] = {
        no_score: {"scores": None},
        no_score + ";": {"scores": values["scores"][1:]},
        no_score + "; ": {"scores": [float("nan"), *values["scores"][1:]]},
        f"no type for each of its {count} tokens": {"token_type": None},
        f"no type for each of its {count} tokens;": {"token_type": ["a"] * count},
        "its token 'x' stands twice": {"tokens": [*tokens[:-2], "x", "x"]},
        "no list of texts": {"tokens": 7},
        "lack the byte <0x41>": {"tokens": ["?" * 9 if t == "<0x41>" else t for t in tokens]},
        "have the score 0, so that their order is not known": {"scores": [0.0] * count},
        "tokenizer is 't5', SentencePiece's Unigram; byte-level BPE": {"model": "t5"},
        "tokenizer is 'bert', WordPiece; ": {"model": "bert"},
        "its tokenizer is 7": {"model": 7},
        r"its tokenizer is \['a'\]": {"model": ["a"]},
        "bos 600 is no token": {"bos_token_id": 600},
    }
    for said, changes in refused.items():
        with pytest.raises(DataError, match=said) as error:
            read(values, **changes)
        assert len(str(error.value).splitlines()) == 1 and "x.gguf" in str(error.value)


def test_a_file_with_such_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_conversion_gguf import write

    from looptx_core.conversion.gguf_file import GGUF, from_gguf
    from looptx_core.conversion.pretrained import ONE_LOOP

    small = vocabulary(320)
    cleared = dict.fromkeys(("pre", "merges", "bos_token_id", "eot_token_id", "padding_token_id"))

    def written(values: dict[str, Any]) -> Path:
        given = {f"tokenizer__ggml__{name}": value for name, value in {**cleared, **values}.items()}
        return write(tmp_path / "a.gguf", **given)

    loaded = from_gguf(GGUF(written(small)), ONE_LOOP)
    for text in HARD:
        assert loaded.tokenizer.encode(text).ids == [1, *by_score(small, text)]
    for broken, said in ((vocabulary(321), "has 321 tokens, but the model has 320"),
                         ({**small, "scores": None}, "no score for each")):  # fmt: skip
        capsys.readouterr()
        file = str(written(broken))
        assert main(["convert", "--from-gguf", file, "--out", str(tmp_path / "m")]) == 4
        [line] = capsys.readouterr().err.splitlines()
        assert said in line and file in line and not (tmp_path / "m").exists()
