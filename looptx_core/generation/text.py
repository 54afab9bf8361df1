"""Token ids to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from looptx_core.data.tokenizer import StreamDecoder


class TextStream:
    """The text of a growing list of tokens; what may be the start of a stop string is held back.

    A held piece is released with the token that shows that no stop string follows, so the joined
    pieces are always the text. context: the ids of the prompt that it continues.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decoder = StreamDecoder(tokenizer, context=context)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token has made certain."""
        return self._release(self._decoder.step(token_id))

    def finish(self) -> str:
        """The remaining text, when no token follows."""
        text = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may begin a stop string.

    This runs for each token, and a stop string may be far longer than the text: only the places of
    its first character in the text are tried.
    """
    place = max(0, len(text) - len(stop) + 1)
    while (place := text.find(stop[0], place)) >= 0:
        if stop.startswith(text[place:]):
            return len(text) - place
        place += 1
    return 0
