"""The tokens that begin, end and pad a model's texts, as its folder says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from looptx_core.documents import COPY_AGAIN, read_json, short
from looptx_core.errors import DataError

_END_TOKENS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_PAD_TOKENS = ("<|pad|>", "<pad>")


@dataclass(frozen=True)
class SpecialTokens:
    """bos, eos, pad: tokens by their text. ends: the ids at any of which generation stops."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    ends: tuple[int, ...] = ()

    @classmethod
    def known(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Those that a tokenizer has, by the usual names."""
        eos, pad = (
            next((name for name in names if tokenizer.token_to_id(name) is not None), None)
            for names in (_END_TOKENS, _PAD_TOKENS)
        )
        return cls(None, eos, pad, _ids(tokenizer, eos))

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
        """As a folder's files say, ours or transformers'; what they leave open, by its name.

        Raises `DataError` for an end that is no token of the tokenizer.
        """
        usual = cls.known(tokenizer)
        tokens, generation, config = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )

        def named(part: str) -> str | None:
            name = tokens.get(f"{part}_token")
            name = name.get("content") if isinstance(name, dict) else name
            known = isinstance(name, str) and tokenizer.token_to_id(name) is not None
            return name if known else None

        eos = named("eos") or usual.eos
        ends = _ids(tokenizer, eos)
        for file, settings in (("generation_config.json", generation), ("config.json", config)):
            if (found := settings.get("eos_token_id")) is not None:
                ends = tuple(found) if isinstance(found, list) else (found,)
                _check(ends, tokenizer, f"{folder / file}: eos_token_id")
                break
        return cls(named("bos"), eos, named("pad") or usual.pad, ends)

    def names(self) -> dict[str, Any]:
        """For tokenizer_config.json."""
        begins = {} if self.bos is None else {"bos_token": self.bos}
        return {**begins, "eos_token": self.eos, "pad_token": self.pad}

    def ids(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """For generation_config.json."""
        begins = {} if self.bos is None else {"bos_token_id": tokenizer.token_to_id(self.bos)}
        ends: Any = list(self.ends) if len(self.ends) > 1 else next(iter(self.ends), None)
        pad = None if self.pad is None else tokenizer.token_to_id(self.pad)
        return {**begins, "eos_token_id": ends, "pad_token_id": pad}


def _ids(tokenizer: Tokenizer, name: str | None) -> tuple[int, ...]:
    found = None if name is None else tokenizer.token_to_id(name)
    return () if found is None else (found,)


def _check(ends: tuple[Any, ...], tokenizer: Tokenizer, where: str) -> None:
    for end in ends:
        if type(end) is not int or end < 0 or tokenizer.id_to_token(min(end, 1 << 31)) is None:
            raise DataError(f"{where} {short(end)} is no token of the tokenizer; {COPY_AGAIN}")
