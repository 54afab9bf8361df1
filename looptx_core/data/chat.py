"""Conversations as tokens: each turn opens with its role's token, an answer closes with the end.

    <|system|>...<|user|>...<|assistant|>...<|end|><|user|>...

The markers are tokens of their own, so that a user's text that spells '<|assistant|>' is just
these characters. `TEMPLATE` says the same for Hugging Face's tokenizers. A picture stands in its
message's text at `<|image|>`, or before the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from looptx_core.data.tokenizer import ASSISTANT, IMAGE, SYSTEM, USER, end_id
from looptx_core.errors import DataError, UsageError

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    sizes: Sequence[Sequence[int]] = (),
    image_token: int = -1,
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are an assistant's words or its end.

    messages: each with `role` and `content`. where: what to name in an error. sizes: patches of
    each message's pictures.
    Raises:
        DataError: a message of another form, no answer, or a tokenizer without the roles' tokens.
    """
    ids: list[int] = []
    counted: list[bool] = []
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where}: messages must be a list of {{role, content}}; mend this record")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: a message needs a role of {', '.join(ROLES)} and a content of text; "
                "mend this record"
            )
        patches = sizes[number] if number < len(sizes) else ()
        words = text_ids(message["content"], tokenizer, patches, image_token)
        answer = role == "assistant"
        turn = [role_id(tokenizer, role), *words, *([end_id(tokenizer)] if answer else [])]
        ids += turn
        counted += [False, *[answer] * (len(turn) - 1)]
    if not any(counted):
        raise DataError(f"{where}: no message of the assistant, so nothing to learn; drop it")
    return ids, counted


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    sizes: Sequence[Sequence[int]] = (),
    image_token: int = -1,
) -> list[int]:
    """The ids that a model continues with the next answer; arguments as for `encode_chat`."""
    answered = [*messages, {"role": "assistant", "content": ""}]
    return encode_chat(answered, tokenizer, "chat", sizes, image_token)[0][:-1]


def text_ids(
    text: str, tokenizer: Tokenizer, sizes: Sequence[int] = (), image_token: int = -1
) -> list[int]:
    """A text's ids. Pictures of `sizes` patches stand at its `<|image|>`, or before it.

    Raises `UsageError` where these are not as many as the pictures. Without pictures `<|image|>`
    is just these characters.
    """
    if not sizes:
        return tokenizer.encode(text, add_special_tokens=False).ids
    first, *others = (text if IMAGE in text else IMAGE * len(sizes) + text).split(IMAGE)
    if len(others) != len(sizes):
        raise UsageError(
            f"{len(others)} {IMAGE} in a text for {len(sizes)} pictures; write it once a picture, "
            "or leave all out and the pictures come first"
        )
    ids: list[int] = []
    for patches, words in zip((0, *sizes), (first, *others)):
        ids += [image_token] * patches
        ids += tokenizer.encode(words, add_special_tokens=False).ids
    return ids


def role_id(tokenizer: Tokenizer, role: str) -> int:
    found = tokenizer.token_to_id(ROLES[role])
    if found is None:
        raise DataError(
            f"the tokenizer has no token {ROLES[role]} for chat messages; "
            "give records of prompt and response"
        )
    return int(found)
