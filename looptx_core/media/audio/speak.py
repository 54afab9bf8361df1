"""Speech that a model writes: each token of a text, and after it the codes of its sound.

    <text> opens  token 1, codes, closes,  token 2, codes, closes, ...  closes

So the text leads its sound by one token at a time (arXiv 2402.05755, 2602.23068): nothing can be
left out, repeated or exchanged, and the last `closes` ends the speech. The tokens are those of the
text before `opens`; the model chooses codes and when to close.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.config.media import SpeakConfig
from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError
from looptx_core.media.audio.align import frames_of_tokens, recogniser
from looptx_core.media.audio.coded import frames_of, grid_of, seconds_of, to_frames, to_patches
from looptx_core.media.audio.read import item_of, samples_of
from looptx_core.media.audio.vocoder import to_file, to_sound
from looptx_core.media.base import Source
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.opened import opened_codec
from looptx_core.media.writer import Writer

MOST_SECONDS = 60.0
"""The longest recording that becomes codes."""
TOKEN_SECONDS = 2.5
"""The longest sound of one token of a text."""
_FIRST_TEXT = 16  # the tokens before are special


class Speaking(Writer):
    """Codes moment by moment, from low bands to high ones, between the tokens of a text."""

    def __init__(self, config: ModelConfig) -> None:
        self.config: SpeakConfig = config.speak
        self.opens, self.closes = self.config.token, self.config.closes
        self.first_code, self.codes = self.config.first_code, self.config.codes
        self._text = range(_FIRST_TEXT, min(section.first_code for section in config.written))

    @property
    def codec(self) -> Codec:
        return opened_codec(self.config.codec).codec

    def transcript(self, before: Sequence[int]) -> Sequence[int]:
        """The last run of text, without what is special and without codes."""
        start = len(before)
        while start and before[start - 1] in self._text:
            start -= 1
        return before[start:]

    def allowed(self, written: Sequence[int], transcript: Sequence[int] = ()) -> Sequence[int]:
        closed = written.count(self.closes)
        own = written[_last(written, self.closes) + 1 :]
        if transcript and not own:
            return [transcript[closed]]
        count = len(own) - bool(transcript)
        most = self.codes_of(TOKEN_SECONDS)
        if count >= most:
            return [self.closes]
        is_last = closed + 1 >= len(transcript)
        silent = is_last and not any(token in self.code_ids for token in written)
        if count % self.config.columns or silent:
            return self.code_ids
        return [*self.code_ids, self.closes]

    def finished(self, written: Sequence[int], transcript: Sequence[int] = ()) -> bool:
        return written.count(self.closes) >= max(1, len(transcript))

    def is_open(self, written: Sequence[int], transcript: Sequence[int] = ()) -> bool:
        if written and self.finished(written, transcript):
            return False
        tokens, begins = iter(transcript), bool(transcript)
        for token in written:
            if begins:
                if token != next(tokens):
                    return False
                begins = False
            elif token == self.closes:
                begins = bool(transcript)
            elif token not in self.code_ids:
                return False
        return True

    def codes_of(self, seconds: float) -> int:
        """The codes of so much sound, whole moments."""
        moments = round(seconds / seconds_of(1, self.codec.config))
        return max(1, moments) * self.config.columns

    def encode(
        self, source: Source, where: str | None = None, transcript: Sequence[tuple[int, bytes]] = ()
    ) -> list[int]:
        name = where or ("the recording" if isinstance(source, bytes) else str(source))
        samples, codec = samples_of(source, name, MOST_SECONDS), self.codec
        patches = to_patches(frames_of(torch.from_numpy(samples)), codec.config)
        codes = codec.encode(patches[None], grid_of(patches, codec.config))[0] + self.first_code
        moments = codes.view(-1, self.config.columns)
        if not transcript:
            return [*codes.tolist(), self.closes]
        ends = frames_of_tokens(
            item_of(samples), [content for _, content in transcript], recogniser(), name
        )
        ids, start = [], 0
        for (token, _), frame in zip(transcript, ends):
            end = min(len(moments), round(frame / codec.config.frames))
            longest = self.codes_of(TOKEN_SECONDS) // self.config.columns
            if end - start > longest:
                raise DataError(
                    f"{name}: has {TOKEN_SECONDS:g} s or more between two tokens of its text; cut "
                    "the silence, mend the text, or pass `skip_bad`"
                )
            ids += [token, *moments[start:end].flatten().tolist(), self.closes]
            start = max(start, end)
        return ids

    def learned(self, token: int) -> bool:
        return token == self.closes or token in self.code_ids

    def render(self, written: Sequence[int], options: GenerationOptions) -> bytes:
        codec = self.codec
        codes = torch.tensor([self._codes(written)]) - self.first_code
        patches = codec.decode(
            codes,
            grid_of(codes[0], codec.config),
            steps=options.draw_steps,
            guidance=options.draw_guidance,
            seed=options.seed,
        )
        return to_file(to_sound(to_frames(patches[0], codec.config), options.seed))

    def grid(self, written: Sequence[int]) -> tuple[int, int]:
        return len(self._codes(written)) // self.config.columns, self.config.columns

    def shown(self, content: bytes) -> list[list[Any]]:
        """Its mels over time, high ones first."""
        frames = frames_of(torch.from_numpy(samples_of(content, "the speech", math.inf)))
        return [[round(v, 3) for v in band] for band in ((frames.T.flip(0) + 1) / 2).tolist()]

    def seconds(self, written: Sequence[int]) -> float | None:
        return seconds_of(len(self._codes(written)) // self.config.columns, self.codec.config)

    def _codes(self, written: Sequence[int]) -> list[int]:
        return [token for token in written if token in self.code_ids]


def _last(ids: Sequence[int], wanted: int) -> int:
    """The last place of an id, -1 without one."""
    return max((place for place, token in enumerate(ids) if token == wanted), default=-1)
