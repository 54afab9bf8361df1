"""SentencePiece's BPE out of a GGUF file, as a tokenizer of the library `tokenizers`.

Such a file has a score for each token and no merges: of all neighbours whose text together is a
token, those with the highest score are joined first, and of equal scores those furthest left
(llama.cpp's src/llama-vocab.cpp). A character that is no token becomes its bytes in UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import groupby

from tokenizers import Tokenizer, decoders, models, normalizers

from looptx_core.documents import short

SPACE = "\u2581"
"""What stands for a space in tokens."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
Need = Callable[[bool, str], None]
"""Raises an error that names what is wrong, unless the first argument is true."""


def sentencepiece_bpe(
    tokens: Sequence[str], merged: set[str], scores: Sequence[float], prefix: bool, need: Need
) -> Tokenizer:
    """The tokenizer, still without added tokens.

    merged: those of the tokens that text may be joined to. prefix: whether a space is put before a
    text, and before what follows a special token.
    """
    vocabulary = {token: number for number, token in enumerate(tokens)}
    lacks = next((token for token in BYTES if token not in vocabulary), None)
    need(lacks is None, f"its tokens lack the byte {lacks}")
    merges = _merges({token: scores[vocabulary[token]] for token in merged}, need)
    built = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", SPACE)
    built.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    first = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    return built


def scores_of(merges: Sequence[tuple[str, str]], merged: set[str]) -> dict[str, float] | None:
    """A score for each token that is joined by merges in this order; None where no scores give it.

    merged: as for `sentencepiece_bpe`.
    """
    found = [pair for pair in merges if {*pair, "".join(pair)} <= merged]
    order = [token for token, _ in groupby(map("".join, found))]
    every = {pair for token in merged for pair in _pairs(token, merged)}
    if len(set(order)) < len(order) or set(found) != every:
        return None
    return {token: -float(number) for number, token in enumerate(order)}


def _merges(scores: dict[str, float], need: Need) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, the most urgent first.

    The library prefers the pair that stands first here, wherever it is in a text. Among tokens of
    the same score, llama.cpp prefers the leftmost, which has an order here only where all of them
    repeat one character (Llama 2's runs of spaces): the longest first, made from the longest left
    part, makes a run grow from the left before another one begins.
    """
    order = sorted(scores, key=lambda token: (-scores[token], -len(token)))
    pairs = {token: found for token in order if (found := _pairs(token, scores))}
    for score, group in groupby(pairs, lambda token: scores[token]):
        tied = list(group)
        mixed = [token for token in tied if len(set(token)) > 1]
        need(len(tied) < 2 or not mixed, f"{len(tied):,} tokens, {short(repr(mixed[:1]))} among "
             f"them, have the score {score:g}, so that their order is not known")  # fmt: skip
    return [pair for found in pairs.values() for pair in found]


def _pairs(token: str, known: Container[str]) -> list[tuple[str, str]]:
    """The two tokens that join to it, in all ways."""
    cuts = ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in known and right in known]
