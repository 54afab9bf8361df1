"""Reading prompts beside the event loop and the engine: items are decoded, texts become ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer, decoders

from looptx_core.data.tokenizer import as_plain_text, token_bytes
from looptx_core.errors import UsageError
from looptx_core.generation.encoding import PromptEncoder
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import ChatPrompt, MediaPrompt, Prompt, TokenPrompt
from looptx_core.media.registry import MEDIA
from looptx_core.serving.errors import too_long

_THREADS = 2
"""Prompts that are read at once; a large item of media takes hundreds of MB while it is decoded."""


class PromptReader:
    """Makes token ids of prompts, in a few threads. context: the most tokens that a text has."""

    def __init__(self, engine: Engine, context: int) -> None:
        own = engine.encoder
        # A copy, because the engine's belongs to another thread; one thread at a time uses it.
        tokenizer = as_plain_text(Tokenizer.from_str(own.tokenizer.to_str()))
        self._encoder = PromptEncoder(own.config, tokenizer, own.end, own.reads, own.chat_template)
        self._writers = engine.writers
        self._lock = threading.Lock()
        self.context, self.most_bytes = context, context * _longest(tokenizer)
        self.pool = ThreadPoolExecutor(_THREADS, "looptx-reader")

    def read(
        self, prompt: Prompt, most: tuple[str, int | None], where: str = "the prompt"
    ) -> TokenPrompt:
        """A prompt's ids.

        most: how many tokens have to fit after it, and the name of the field that says so; None:
        what there is room for.

        Raises the errors of `PromptEncoder.encode`, and `ApiError` for a prompt that leaves no room
        for an answer: a text that is far too long is not encoded.
        """
        if isinstance(prompt, str):
            self._check_bytes([prompt], where)
        elif isinstance(prompt, MediaPrompt):
            self._check_bytes([prompt.text], where)
        elif isinstance(prompt, ChatPrompt):
            self._check_bytes([message["content"] for message in prompt.messages], where)
        with self._lock:
            found = self._encoder.read(prompt)
        self._check_room(len(found.ids), *most, where)
        self._check_drawing(found.ids, where)
        return found

    def tokenize(self, text: str, opened: bool) -> list[int]:
        """The ids of a text. opened: with the tokens that begin a prompt."""
        self._check_bytes([text], "the prompt")
        with self._lock:
            ids = self._encoder.tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._encoder.opening, *ids] if opened else ids

    def detokenize(self, ids: Sequence[int]) -> str:
        if len(ids) > self.context:
            raise UsageError(
                f"`tokens`: there are {len(ids)}, and this server's context holds {self.context}; "
                "give fewer at a time"
            )
        with self._lock:
            return self._encoder.tokenizer.decode(list(ids), skip_special_tokens=False)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, length: int, name: str, most: int | None, where: str) -> None:
        left = self.context - length
        if left < 1:
            raise too_long(
                self.context,
                f"{where} has {length}, which leaves no room for an answer; shorten it",
            )
        if most is not None and most > left:
            raise too_long(
                self.context,
                f"{where} has {length} and {name} is {most}; ask for {left} at most, or shorten "
                "the prompt",
                name,
            )

    def _check_drawing(self, ids: Sequence[int], where: str) -> None:
        for medium, writer in self._writers.items():
            codes = range(writer.first_code, writer.first_code + writer.codes)
            for token in ids:
                if token == writer.opens or token in codes:
                    raise UsageError(
                        f"{where} has the token {token}, a part of {MEDIA[medium].plural} that "
                        "the model writes; this server answers with text alone, so leave it out"
                    )

    def _check_bytes(self, texts: Sequence[str], where: str) -> None:
        given = sum(len(text.encode()) for text in texts)
        if given > self.most_bytes:
            raise too_long(
                self.context,
                f"{where} has {given} bytes, where {self.most_bytes} could fit; shorten it",
            )


def _longest(tokenizer: Tokenizer) -> int:
    """The bytes of the longest token."""
    own = token_bytes if isinstance(tokenizer.decoder, decoders.ByteLevel) else str.encode
    return max(len(own(name)) for name in tokenizer.get_vocab())
