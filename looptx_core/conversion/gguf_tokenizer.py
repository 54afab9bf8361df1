"""The tokenizer of a GGUF file: built by the library `tokenizers`, and described.

Of byte-level BPE a GGUF names its way of splitting a text into words; each name here has the
regular expression and the normalizer of the Hugging Face tokenizer that it stands for (llama.cpp's
src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.conversion.gguf_sentencepiece import (
    BYTES,
    SPACE,
    Need,
    scores_of,
    sentencepiece_bpe,
)
from looptx_core.data.tokenizer import as_plain_text, opening_ids
from looptx_core.documents import is_one_of, short
from looptx_core.errors import DataError, UsageError

_GIVE_FOLDER = "convert the Hugging Face folder of this model by `from_hf`"
_MODELS = {"gpt2": "byte-level BPE (gpt2)", "llama": "SentencePiece's BPE (llama)"}
"""Of tokenizer.ggml.model, those that are read."""
_OTHERS = {"t5": "SentencePiece's Unigram", "bert": "WordPiece", "rwkv": "RWKV's",
           "plamo2": "PLaMo 2's", "gemma4": "Gemma 4's"}  # fmt: skip
# Of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ENDS = ("eos", "eot", "eom")
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
"""The first of these ends a turn where a file names no `eot`, as for llama.cpp."""
_NO_SCORE = -1e9
_DEFAULTS: dict[str, dict[str, int]] = {"gpt2": {}, "llama": {"bos": 1, "eos": 2}}
"""Ids of tokens that a file need not name."""
_PREFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SUFFIX = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Kind(NamedTuple):
    """digits: how many stand together at most, where the words are not GPT-2's; 0: GPT-2's words.
    single: GPT-2's words, with each digit apart. whole: a word that is a token is not merged anew.
    begins: whether texts begin with BOS where the file does not say."""

    digits: int = 0
    single: bool = False
    whole: bool = False
    nfc: bool = False
    begins: bool = False


_KINDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _Kind()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Kind(single=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Kind(3, whole=True, begins=True)),
    "qwen2": _Kind(1, nfc=True),
}
_WRITTEN_AS = ("smollm", "gpt-2", "llama-bpe", "qwen2")
"""A name for each kind."""
_PROBES = (
    "Call me Ishmael. It's 7, 42, 1851 or 1234567 miles; WE'LL see, they'd said I'VE NOT'S.",
    "  two spaces,\ttabs\t\t and\n\n\nlines \r\n   end  \n  ",
    "naïve Ünïcode, cafe\u0301, Москва 2024, 東京は2時, مرحبا ١٢٣, हिन्दी, ½ ² Ⅷ, 🐋🏳️‍🌈!",
    "def f(x_1=0x1F): return {'a': [x**2, -3.14e-10]} # ...???!!! --> <|end|> </s>",
)
"""What kinds of tokenizers split differently."""


def read_gguf_tokenizer(
    values: Mapping[str, Any], where: str
) -> tuple[Tokenizer, SpecialTokens, str | None]:
    """The tokenizer, what begins and ends its texts, and its chat template.

    values: the file's metadata. Raises `DataError` for a tokenizer that can't be built exactly.
    """

    def get(name: str, default: Any = None) -> Any:
        return values.get(f"tokenizer.ggml.{name}", default)

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise DataError(f"{where}: {what}; {_GIVE_FOLDER}")

    model, tokens = get("model"), get("tokens")
    other = f", {_OTHERS[model]}" if is_one_of(model, _OTHERS) else ""
    what = f"its tokenizer is {model!r}{other}"
    need(is_one_of(model, _MODELS), f"{what}; {' and '.join(_MODELS.values())} are read")
    need(_are_texts(tokens), "its tokens are no list of texts")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    twice = next((token for at, token in enumerate(tokens) if vocabulary[token] != at), None)
    need(twice is None, f"its token {short(repr(twice))} stands twice in the vocabulary")

    def numbers(name: str, what: str) -> Sequence[Any]:
        found = get(name)
        need(isinstance(found, list) and len(found) == len(tokens)
             and all(type(number) in (int, float) and math.isfinite(number) for number in found),
             f"it has no {what} for each of its {len(tokens):,} tokens")  # fmt: skip
        return found

    given = model == "llama" or get("token_type") is not None
    types = numbers("token_type", "type") if given else [_NORMAL] * len(tokens)
    if model == "gpt2":
        pre = get("pre")
        need(is_one_of(pre, _KINDS),
             f"its pre-tokenizer is {pre!r}, and {', '.join(_KINDS)} are known")  # fmt: skip
        begins = _KINDS[pre].begins
        built = _byte_level(vocabulary, _KINDS[pre], get("merges"), need, where)
    else:
        begins = True
        scores = numbers("scores", "score")
        prefix = bool(get("add_space_prefix", True))
        built = sentencepiece_bpe(tokens, _merged(tokens, types), scores, prefix, need)
    special = {token for token, of in zip(tokens, types) if of in (_UNKNOWN, _CONTROL)}
    added = [AddedToken(token, special=token in special, normalized=False)
             for token, of in zip(tokens, types)
             if token in special or of == _USER_DEFINED]  # fmt: skip
    built.add_special_tokens([token for token in added if token.special])
    built.add_tokens([token for token in added if not token.special])

    def named(part: str) -> str | None:
        number = get(f"{part}_token_id", _DEFAULTS[model].get(part))
        if number is None:
            return None
        need(type(number) is int and 0 <= number < len(tokens), f"{part} {number} is no token")
        return tokens[number]

    bos = named("bos")
    if get("add_bos_token", begins):
        need(bos is not None, "texts begin with a BOS token, and it names none")
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    usual = {"eot": next((token for token in _TURN_ENDS if token in special), None)}
    ends = [name for part in _ENDS if (name := named(part) or usual.get(part)) is not None]
    found = SpecialTokens(
        bos, named("eos"), named("padding"), tuple(dict.fromkeys(vocabulary[end] for end in ends))
    )
    template = values.get("tokenizer.chat_template")
    return as_plain_text(built), found, template if isinstance(template, str) else None


def _merged(tokens: Sequence[str], types: Sequence[int]) -> set[str]:
    """The tokens that SentencePiece joins characters to. A user-defined token is taken out of a
    text before all else, unless a space is in it."""
    never = (_UNKNOWN, _CONTROL, _BYTE)
    return {
        token for token, of in zip(tokens, types)
        if of not in never and (of != _USER_DEFINED or SPACE in token)
    }  # fmt: skip


def _byte_level(
    vocabulary: dict[str, int], kind: _Kind, merges: Any, need: Need, where: str
) -> Tokenizer:
    need(_are_texts(merges), "its tokenizer has no merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    need(all(len(pair) == 2 for pair in pairs), "a merge is no pair of tokens")
    try:
        built = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=kind.whole))
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise DataError(f"{where}: its merges do not fit ({reason}); {_GIVE_FOLDER}") from error
    if kind.nfc:
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = _pre_tokenizer(kind)
    built.decoder = decoders.ByteLevel()
    return built


def tokenizer_values(
    tokenizer: Tokenizer, special: SpecialTokens, vocab_size: int, where: Path
) -> dict[str, Any]:
    """The metadata of a GGUF file for a tokenizer, as `read_gguf_tokenizer` reads it.

    vocab_size: of the model, which may have more tokens. Raises `UsageError` for a tokenizer that
    is neither byte-level BPE nor SentencePiece's, has no end, or splits words as no kind here does.
    """

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise UsageError(f"{where}: {what}, which `to_gguf` can't write; give another model")

    described = json.loads(tokenizer.to_str())["model"]
    bytewise = isinstance(tokenizer.decoder, decoders.ByteLevel)
    need(described["type"] == "BPE" and (bytewise or described["byte_fallback"]),
         "its tokenizer is no byte-level BPE, and none of SentencePiece's")  # fmt: skip
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, _NORMAL
    for number, added in tokenizer.get_added_tokens_decoder().items():
        types[number] = _CONTROL if added.special else _USER_DEFINED
    if not bytewise:
        for token in BYTES:
            place = tokenizer.token_to_id(token)
            need(place is not None, f"its tokenizer lacks the byte {token}")
            types[place or 0] = _BYTE
    opening = opening_ids(tokenizer)
    bos = opening[0] if opening else special.bos and tokenizer.token_to_id(special.bos)
    need(len(opening) < 2, "its texts begin with several tokens")
    eos = special.eos and tokenizer.token_to_id(special.eos)
    ends = sorted(special.ends, key=lambda end: end != eos)
    need(len(ends) > 0, "it has no token that ends a text")  # llama.cpp would take another one
    need(len(ends) <= len(_ENDS), f"{len(ends)} tokens end its texts")
    pad = special.pad and tokenizer.token_to_id(special.pad)
    named = {"bos": bos, **dict(zip(_ENDS, ends)), "padding": pad}
    values = {
        "tokens": tokens,
        "token_type": types,
        **{f"{part}_token_id": number for part, number in named.items() if number is not None},
        "add_bos_token": bool(opening),
    }
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in described["merges"]]
    ways: list[dict[str, Any]]
    if bytewise:
        joined = [" ".join(pair) for pair in merges]
        ways = [{"model": "gpt2", "merges": joined, "pre": pre} for pre in _WRITTEN_AS]
    else:
        scores = scores_of(merges, _merged(tokens, types))
        need(scores is not None, "its tokenizer has merges in an order that no scores give")
        assert scores is not None
        each = [scores.get(token, _NO_SCORE) for token in tokens]
        ways = [{"model": "llama", "scores": each, "add_space_prefix": prefix}
                for prefix in (True, False)]  # fmt: skip
    for way in ways:
        found = {f"tokenizer.ggml.{name}": value for name, value in (values | way).items()}
        built, _, _ = read_gguf_tokenizer(found, str(where))
        same = not bytewise or _split(built) == _split(tokenizer)
        if same and all(built.encode(t).ids == tokenizer.encode(t).ids for t in _PROBES):
            return found
    raise UsageError(
        f"{where}: its tokenizer splits words in a way of its own, and {', '.join(_WRITTEN_AS)} "
        "are written by `to_gguf`; give another model"
    )


def _split(tokenizer: Tokenizer) -> list[Any]:
    """How the tokenizer splits the probes, before any merge."""
    normal, split = tokenizer.normalizer, tokenizer.pre_tokenizer
    texts = [normal.normalize_str(text) if normal else text for text in _PROBES]
    return [split.pre_tokenize_str(text) if split else text for text in texts]


def _pre_tokenizer(kind: _Kind) -> pre_tokenizers.PreTokenizer:
    if kind.digits:
        digits = r"\p{N}" if kind.digits == 1 else rf"\p{{N}}{{1,{kind.digits}}}"
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PREFIX + digits + _SUFFIX), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not kind.single:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _are_texts(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and bool(values)
        and all(isinstance(value, str) for value in values)
    )
