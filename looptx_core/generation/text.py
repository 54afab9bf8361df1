"""From token ids to text, piece by piece, ending before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from looptx_core.data.tokenizer import StreamDecoder


class TextStream:
    """Text of a growing list of tokens; what may begin a stop string is held back.

    A piece that was held comes with the token that shows it to be harmless, so the joined pieces
    are the text, whatever straddles the tokens. context: the ids of the prompt that it continues.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decoder = StreamDecoder(tokenizer, context=context)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token makes certain."""
        return self._release(self._decoder.step(token_id))

    def finish(self) -> str:
        """What remains when no token follows."""
        text = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
