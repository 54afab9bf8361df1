"""Conversations as tokens: each turn opens with its role's token, an answer closes with the end.

    <|system|>...<|user|>...<|assistant|>...<|end|><|user|>...

The markers are tokens of their own, so that a user's text that spells '<|assistant|>' is just
these characters. `TEMPLATE` says the same for Hugging Face's tokenizers. Items of media stand in
their message's text as in `content.insert_items`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.data.content import content_ids
from looptx_core.data.tokenizer import ASSISTANT, SYSTEM, USER, end_id
from looptx_core.documents import is_one_of
from looptx_core.errors import DataError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of others, in Jinja, as transformers runs it.

    names: the special tokens that it may write, as `bos_token` and so on. Raises `DataError` where
    it can't be read.
    """

    text: str
    names: Mapping[str, str | None]

    @classmethod
    def of_others(cls, text: str | None, names: Mapping[str, str | None]) -> ChatTemplate | None:
        """A stored template; None for ours, and where there is none."""
        return None if text in (None, TEMPLATE) else cls(str(text), names)

    def flaw(self) -> str | None:
        """Why it can't be read, in a few words; None where it can."""
        from jinja2 import TemplateError

        if not self.text.strip():
            return "it is empty"
        try:
            _ = self._compiled
        except (TemplateError, RecursionError) as error:
            return _first_line(error)
        return None

    def prompt(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """The ids that a model continues with the next answer.

        Raises:
            DataError: a message of another form, or a template that fails.
            UsageError: a message that spells a special token, which would end or open a turn.
        """
        check_messages([*messages, {"role": "assistant", "content": ""}], "chat")
        if token := self._spelled(messages, tokenizer):
            raise UsageError(f"a message spells {token}, a token of the chat; leave it out")
        return self._encode(self._render(messages, asks=True), tokenizer).ids

    def turns(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, where: str
    ) -> tuple[list[int], list[bool]]:
        """Token ids up to the last answer's end, and which of them are answers or their ends.

        An answer is what follows the prompt for it, up to its last special token. where: what to
        name in an error.

        Raises `DataError` for a message that spells a special token, and for a template that fails
        or that writes earlier turns differently once others follow.
        """
        if token := self._spelled(messages, tokenizer):
            raise DataError(f"{where}: a message spells {token}, a token of the chat; leave it out")
        places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._render(messages[: places[-1] + 1])
        encoded = self._encode(whole, tokenizer)
        starts = np.array([start for start, _ in encoded.offsets])
        names = _special(tokenizer, tokenizer.get_vocab_size())
        special = np.array([token in names for token in encoded.ids])
        counted = np.zeros(len(starts), bool)
        for place in places:
            before = self._render(messages[:place], asks=True)
            after = self._render(messages[: place + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                if not place:
                    raise DataError(
                        f"{where}: the model's chat template asks for no answer before a message; "
                        "begin this record with one of the user"
                    )
                raise DataError(
                    f"{where}: the model's chat template writes a turn differently once others "
                    "follow it; give records of one answer each"
                )
            answer = (starts >= len(before)) & (starts < len(after))
            ends = np.flatnonzero(answer & special)
            counted |= answer & (np.arange(len(answer)) <= (ends[-1] if len(ends) else len(answer)))
        if not counted.any():
            raise DataError(f"{where}: no answer has a word in it; drop this record")
        last = int(np.flatnonzero(counted)[-1]) + 1
        return encoded.ids[:last], counted[:last].tolist()

    def _spelled(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str | None:
        """A special token that a message has among its text."""
        special = _special(tokenizer, tokenizer.get_vocab_size()).values()
        texts = "\0".join(message["content"] for message in messages)
        return next((token for token in special if token in texts), None)

    @cached_property
    def _compiled(self) -> Template:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.text)

    def _render(self, messages: Sequence[Mapping[str, Any]], asks: bool = False) -> str:
        """asks: up to where the next answer begins."""
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=asks, **self.names
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(
                f"the model's chat template fails ({_first_line(error)}); copy the model again, or "
                "use generate"
            ) from error

    def _encode(self, text: str, tokenizer: Tokenizer) -> Encoding:
        tokenizer.encode_special_tokens = False  # within the template they are tokens
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        finally:
            tokenizer.encode_special_tokens = True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=1)
def _special(tokenizer: Tokenizer, size: int) -> dict[int, str]:
    """The special tokens by id, of which some tokenizers have thousands.

    size: of the vocabulary, so that tokens which are added later are found.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {n: token.content for n, token in added.items() if token.special}


def check_messages(messages: Any, where: str) -> None:
    """Raise `DataError` for what is no list of messages with an answer to learn.

    where: what to name in an error.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where}: messages must be a list of {{role, content}}; mend this record")
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if not is_one_of(role, ROLES) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: a message needs a role of {', '.join(ROLES)} and a content of text; "
                "mend this record"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message of the assistant, so nothing to learn; drop it")


def encode_turns(
    turns: Iterable[tuple[str, Sequence[int]]], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are an assistant's words or its end.

    turns: each message's role and the ids of its content.
    Raises `DataError` for a tokenizer without the roles' tokens.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for role, content in turns:
        answer = role == "assistant"
        turn = [role_id(tokenizer, role), *content, *([end_id(tokenizer)] if answer else [])]
        ids += turn
        counted += [False, *[answer] * (len(turn) - 1)]
    return ids, counted


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    items: Sequence[Any] = (),
    config: ModelConfig | None = None,
) -> list[int]:
    """The ids that a model continues with the next answer.

    messages: each with `role` and `content`. items: decoded ones, of the first message. config: of
    the model that reads them.
    Raises:
        DataError: a message of another form, or a tokenizer without the roles' tokens.
        UsageError: markers in the first message that are not as many as the items.
    """
    asked = [*messages, {"role": "assistant", "content": ""}]
    check_messages(asked, "chat")
    turns = [
        (
            message["role"],
            content_ids(message["content"], tokenizer, () if number else items, config),
        )
        for number, message in enumerate(asked)
    ]
    return encode_turns(turns, tokenizer)[0][:-1]


def role_id(tokenizer: Tokenizer, role: str) -> int:
    found = tokenizer.token_to_id(ROLES[role])
    if found is None:
        raise DataError(
            f"the tokenizer has no token {ROLES[role]} for chat messages; "
            "give records of prompt and response"
        )
    return int(found)
