"""Tokens as text, piece by piece: split characters, and stop strings."""

from __future__ import annotations

from looptx_core.generation.text import TextStream, overlap


def pieces(tokenizer, text, stop=()):
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text).ids:
        parts.append(stream.push(token))
        if stream.stopped:
            return parts, True
    return [*parts, stream.finish()], stream.stopped


def test_a_stop_string_costs_no_more_than_the_text_it_may_match(tokenizer):
    class Sliced(str):
        """Counts the characters that slices of it copy."""

        copied = 0

        def __getitem__(self, which):
            found = super().__getitem__(which)
            Sliced.copied += len(found)
            return found

    text, stop = "ab" * 20, Sliced("ab" * 19 + "c" + "d" * 1000)
    parts, stopped = pieces(tokenizer, text, (stop,))
    assert "".join(parts) == text and not stopped
    assert Sliced.copied < 1000
    for stop in ("abc", "aab", "bab", "aaab"):
        for number in range(64):
            text = "".join("ab"[number >> place & 1] for place in range(6))
            expected = max(
                (n for n in range(min(len(stop), 7)) if text.endswith(stop[:n])), default=0
            )
            assert overlap(text, stop) == expected


def test_split_characters_and_stop_strings(tokenizer):
    parts, _ = pieces(tokenizer, "a€b😀")
    assert parts == ["a", "", "", "€", "b", "", "", "", "😀", ""]
    for text, stop, kept in (
        ("xyz END of", ("END",), "xyz "),
        ("aaab", ("aab",), "a"),
        ("xyEN", ("END",), "xyEN"),
        ("abcd", ("cd", "bcd"), "a"),
        ("q€r", ("€",), "q"),
        ("abab!", ("abac",), "abab!"),
    ):
        parts, stopped = pieces(tokenizer, text, stop)
        assert "".join(parts) == kept, (text, stop)
        assert stopped == (kept != text)
