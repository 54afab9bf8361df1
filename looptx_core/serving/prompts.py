"""Chat messages as the engine's prompts, with what their parts hold decoded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from looptx_core.documents import has_half
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import ChatPrompt, MediaPrompt, Prompt
from looptx_core.media.batch import MediaItem
from looptx_core.media.registry import MEDIA
from looptx_core.serving.errors import bad_field
from looptx_core.serving.fields import Message

_PARTS = {medium.part: medium for medium in MEDIA.values()}
_ROLES = {"developer": "system"}


def chat_prompt(messages: list[Message], engine: Engine, chats: bool) -> Prompt:
    """The prompt of a conversation.

    A model that was not finetuned on chats still answers one message with items of media, as it
    does on the command line. Raises `ApiError`, and `DataError` for an item that can't be read.
    """
    read = [_content(number, message, engine) for number, message in enumerate(messages)]
    items = read[0][1]
    if any(own for _, own in read[1:]):
        raise bad_field(
            "messages", "items of media are read in the first message only; move them there"
        )
    if chats:
        return ChatPrompt(
            tuple(
                {"role": _ROLES.get(message.role, message.role), "content": text}
                for message, (text, _) in zip(messages, read)
            ),
            items,
        )
    if len(messages) == 1 and items:
        return MediaPrompt(read[0][0], items)
    raise bad_field(
        "messages",
        "this model was not finetuned on chats; finetune it (looptx finetune, with messages as "
        "data), or use /v1/completions",
    )


def _content(number: int, message: Message, engine: Engine) -> tuple[str, tuple[MediaItem, ...]]:
    """The text of a message, and the items at its markers."""
    if isinstance(message.content, str):
        return message.content, ()
    if not message.content:
        raise bad_field("messages", f"message {number + 1} has no content; give a text")
    texts: list[str] = []
    items: list[MediaItem] = []
    for place, part in enumerate(message.content):
        where = f"message {number + 1}, part {place + 1}"
        kind = part.get("type")
        if kind == "text":
            _check_keys(part, ("type", "text"), where)
            text = part.get("text")
            if not isinstance(text, str) or has_half(text):
                raise bad_field("messages", f"{where}: text must be a string of Unicode")
            texts.append(text)
            continue
        medium = _PARTS.get(str(kind))
        if medium is None or medium.name not in engine.model.encoders():
            told = f"this model reads no {medium.plural}" if medium else f"unknown type {kind!r}"
            raise bad_field("messages", f"{where}: {told[:80]}")
        _check_keys(part, ("type", medium.part), where)
        raw = _bytes(part.get(medium.part), where)
        items.append(medium.read(raw, engine.model.config, where))
        texts.append(medium.marker)
    return "".join(texts), tuple(items)


def _bytes(value: Any, where: str) -> bytes:
    """What a part holds: `url` with a data URL, or `data` in base 64."""
    if not isinstance(value, Mapping):
        raise bad_field("messages", f"{where}: expected an object with url or data")
    url = value.get("url")
    # Clients always send the format of a recording; its first bytes tell it as well.
    _check_keys(value, ("data", "format") if url is None else ("url", "detail"), where)
    if value.get("detail") not in (None, "auto"):
        raise bad_field("messages", f"{where}: detail is not supported here; leave it out")
    text = value.get("data")
    if url is not None:
        head, comma, text = str(url).partition(",")
        if not (head.startswith("data:") and head.endswith(";base64") and comma):
            raise bad_field(
                "messages", f"{where}: nothing is fetched here; give a data URL in base 64"
            )
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_field("messages", f"{where}: not in base 64") from error


def _check_keys(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in found:
        if key not in known:
            told = ", ".join(known)
            raise bad_field("messages", f"{where}: unknown key {key[:40]!r}; known are {told}")
