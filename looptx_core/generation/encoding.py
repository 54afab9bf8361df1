"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.data.chat import ChatTemplate, chat_prompt
from looptx_core.data.content import content_ids
from looptx_core.data.tokenizer import opening_ids
from looptx_core.errors import UsageError
from looptx_core.generation.request import ChatPrompt, MediaPrompt, Prompt, TokenPrompt
from looptx_core.media.registry import MEDIA, writers
from looptx_core.media.writer import Writer


class PromptEncoder:
    """Encodes the prompts of one model. Use an encoder, and its tokenizer, in one thread at a time.

    end: the token that ends a document. reads: the media that the model reads. chat_template: of a
    model with its own way to write chats; by default ours.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        end: int,
        reads: Collection[str] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.config, self.tokenizer, self.end = config, tokenizer, end
        self.reads, self.chat_template = frozenset(reads), chat_template
        self.opening = opening_ids(tokenizer)

    def read(self, prompt: Prompt) -> TokenPrompt:
        """A prompt as ids and the items at their placeholders; errors as for `encode`."""
        items = getattr(prompt, "media", ())
        is_chat = isinstance(prompt, ChatPrompt) or getattr(prompt, "is_chat", False)
        return TokenPrompt(tuple(self.encode(prompt)), items, is_chat)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, with the placeholders of its items.

        Raises `UsageError` for items that the model does not read or write.
        """
        if isinstance(prompt, MediaPrompt | ChatPrompt):
            ids = self._encode_media(prompt)
        elif isinstance(prompt, TokenPrompt):
            ids = list(prompt.ids)
        elif isinstance(prompt, str):
            ids = [*self.opening, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        else:
            ids = list(prompt)
        # In training, a document follows the end token of the one before.
        return ids or [self.end]

    def _encode_media(self, prompt: MediaPrompt | ChatPrompt) -> list[int]:
        for medium in (MEDIA[item.medium] for item in prompt.media):
            if medium.name not in self.reads:
                raise UsageError(
                    f"this model reads no {medium.plural}; use one that was trained on some"
                )
        if isinstance(prompt, ChatPrompt):
            if self.chat_template is None:
                return chat_prompt(prompt.messages, self.tokenizer, prompt.media, self.config)
            if prompt.media:
                plural = MEDIA[prompt.media[0].medium].plural
                raise UsageError(
                    f"this model's own chat template has no place for {plural}; leave them out"
                )
            return self.chat_template.prompt(prompt.messages, self.tokenizer)
        # Records begin with this token in training too.
        ids = [self.end, *content_ids(prompt.text, self.tokenizer, prompt.media, self.config)]
        return ids if prompt.write is None else [*ids, self._writer(prompt.write).opens]

    def _writer(self, name: str) -> Writer:
        found = writers(self.config)
        if name not in found:
            raise UsageError(
                f"this model writes no {MEDIA[name].plural}; use one that was trained to"
            )
        return found[name]
