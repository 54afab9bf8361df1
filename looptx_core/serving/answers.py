"""Answers in OpenAI's form, whole or in pieces, with the loops and the confidence of each token."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders

from looptx_core.data.tokenizer import as_plain_text, token_bytes
from looptx_core.generation.request import Score, Step

_REASONS = {"end": "stop"}
"""Our reasons that have another name there."""
CUT = "abort"
"""The reason of an answer that was cut because the server ended; vLLM's."""

Likeliest = Sequence[tuple[int, float]]


class TokenTexts:
    """The text and the bytes of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Its own copy: the engine's belongs to another thread.
        self.tokenizer = as_plain_text(Tokenizer.from_str(tokenizer.to_str()))
        self._byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)

    def raw(self, token: int) -> bytes:
        """Its bytes, which may be a part of a character."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level:
            return token_bytes(name)
        return self.tokenizer.decode([token], skip_special_tokens=False).encode()

    def text(self, token: int) -> str:
        """As OpenAI writes it: a part of a character as 'bytes:\\xe2'."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def depth(steps: Sequence[Step]) -> dict[str, Any]:
    """Our own part of a choice."""
    loops = [step.loops for step in steps]
    return {
        "loops": loops,
        "confidence": [step.confidence for step in steps],
        "mean_loops": sum(loops) / len(loops) if loops else None,
    }


def usage(prompt_tokens: int, steps: Sequence[Step]) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(steps),
        "total_tokens": prompt_tokens + len(steps),
        "completion_tokens_details": {"loops": sum(step.loops for step in steps)},
    }


def reason(steps: Sequence[Step]) -> str | None:
    found = steps[-1].finish_reason if steps else None
    return _REASONS.get(found, found) if found else None


class Answer:
    """What an answer is made of, for one request; the two subclasses differ in form.

    texts: needed where log-probabilities were asked for, else None.
    """

    kind: str
    """`object` of a whole answer."""
    piece_kind: str
    """`object` of a piece of a stream."""
    prefix: str

    def __init__(self, model: str, texts: TokenTexts | None) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.model, self.texts = model, texts
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, steps: Sequence[Step], text: str) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        raise NotImplementedError

    def empty_piece(self, index: int, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": used}

    def event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """A piece of a stream, as a server-sent event."""
        head = {"id": self.id, "object": self.piece_kind, "created": self.created}
        return event({**head, "model": self.model, "choices": choices, **more})


class Completion(Answer):
    """Of `/v1/completions`. most: how many likely tokens to tell; None: no log-probabilities."""

    kind = piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, texts: TokenTexts | None, most: int | None) -> None:
        super().__init__(model, texts)
        self.most = most

    def choice(self, index: int, steps: Sequence[Step], text: str) -> dict[str, Any]:
        return self._choice(index, text, steps, reason(steps) or "length", [], ())

    def echoed(
        self, index: int, steps: Sequence[Step], text: str, ids: Sequence[int], scores: list[Score]
    ) -> dict[str, Any]:
        """A choice whose text begins with the prompt. scores: of the prompt's tokens but one."""
        finish = reason(steps) or "length"
        return self._choice(index, text, steps, finish, ids, scores)

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        return self._choice(index, step.text, [step], reason([step]), [], ())

    def prompt_piece(
        self, index: int, text: str, ids: Sequence[int], scores: list[Score]
    ) -> dict[str, Any]:
        """The first piece of a stream that repeats its prompt."""
        return self._choice(index, text, [], None, ids, scores)

    def empty_piece(self, index: int, finish: str | None) -> dict[str, Any]:
        return self._choice(index, "", [], finish, [], ())

    def _choice(
        self,
        index: int,
        text: str,
        steps: Sequence[Step],
        finish: str | None,
        ids: Sequence[int],
        scores: Sequence[Score],
    ) -> dict[str, Any]:
        logprobs = None
        if self.texts is not None and self.most is not None:
            logprobs = self._logprobs(index, steps, ids, scores)
        return {
            "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish,
            "looptx": depth(steps),
        }  # fmt: skip

    def _logprobs(
        self, index: int, steps: Sequence[Step], ids: Sequence[int], scores: Sequence[Score]
    ) -> dict[str, Any]:
        assert self.texts is not None
        rows: list[tuple[int, float | None, Likeliest]] = []
        if ids:
            rows.append((ids[0], None, ()))
            rows += [(token, s.logprob, s.likeliest) for token, s in zip(ids[1:], scores)]
        rows += [(step.id, step.logprob, step.likeliest) for step in steps]
        tokens = [self.texts.text(token) for token, _, _ in rows]
        offsets, here = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(here)
            here += len(token)
        self._offsets[index] = here
        return {
            "tokens": tokens,
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [self._tops(*row) for row in rows],
            "text_offset": offsets,
        }

    def _tops(
        self, token: int, logprob: float | None, likeliest: Likeliest
    ) -> dict[str, float] | None:
        """By text, the chosen token too; of tokens of one text the likeliest stays."""
        assert self.texts is not None
        if logprob is None:
            return None
        found: dict[str, float] = {}
        for other, value in [*likeliest[: self.most], (token, logprob)]:
            found.setdefault(self.texts.text(other), value)
        return found


class Chat(Answer):
    """Of `/v1/chat/completions`. most: how many likely tokens to tell of each, if any."""

    kind, piece_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, texts: TokenTexts | None, most: int) -> None:
        super().__init__(model, texts)
        self.most = most

    def choice(self, index: int, steps: Sequence[Step], text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index, "message": message, "logprobs": self._logprobs(steps),
            "finish_reason": reason(steps), "looptx": depth(steps),
        }  # fmt: skip

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        return self._piece(index, {"content": step.text}, [step], reason([step]))

    def first_piece(self, index: int) -> dict[str, Any]:
        return self._piece(index, {"role": "assistant", "content": ""}, [], None)

    def empty_piece(self, index: int, finish: str | None) -> dict[str, Any]:
        return self._piece(index, {}, [], finish)

    def _piece(
        self, index: int, delta: dict[str, str], steps: Sequence[Step], finish: str | None
    ) -> dict[str, Any]:
        return {
            "index": index, "delta": delta, "logprobs": self._logprobs(steps),
            "finish_reason": finish, "looptx": depth(steps),
        }  # fmt: skip

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        if self.texts is None:
            return None
        content = [
            self._token(step.id, step.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in step.likeliest]}
            for step in steps
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        assert self.texts is not None
        raw = self.texts.raw(token)
        return {"token": self.texts.text(token), "logprob": logprob, "bytes": list(raw)}


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
