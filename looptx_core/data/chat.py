"""Conversations as tokens: each turn opens with its role's token, an answer closes with the end.

    <|system|>...<|user|>...<|assistant|>...<|end|><|user|>...

The markers are tokens of their own, so that a user's text that spells '<|assistant|>' is just
these characters. `TEMPLATE` says the same for Hugging Face's tokenizers. Items of media stand in
their message's text as in `content.insert_items`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.data.content import content_ids
from looptx_core.data.tokenizer import ASSISTANT, SYSTEM, USER, end_id
from looptx_core.documents import is_one_of
from looptx_core.errors import DataError, UsageError

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

    def prompt(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """The ids that a model continues with the next answer.

        Raises:
            DataError: a message of another form, or a template that fails.
            UsageError: a message that spells a special token, which would end or open a turn.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        check_messages([*messages, {"role": "assistant", "content": ""}], "chat")
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        for message in messages:
            for token in special:
                if token in message["content"]:
                    raise UsageError(f"a message spells {token}, a token of the chat; leave it out")

        def raise_exception(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        try:
            text = environment.from_string(self.text).render(
                messages=list(messages), add_generation_prompt=True, **self.names
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"the model's chat template fails ({reason}); copy the model again, or use generate"
            ) from error
        tokenizer.encode_special_tokens = False  # within the template they are tokens
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.encode_special_tokens = True


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
