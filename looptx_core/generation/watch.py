"""A clip that goes on: frames as they come, and answers whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import Generation, MediaPrompt
from looptx_core.generation.session import Session
from looptx_core.generation.transcribe import Segment
from looptx_core.media.batch import MediaItem
from looptx_core.media.registry import MEDIA
from looptx_core.media.video.frames import Frame
from looptx_core.media.video.read import Eye, Still, tubelets

_ROOM = 512
"""The most tokens that a question and its answer may have together."""


class VideoSession:
    """Frames go into a model's cache as they come; an answer is made from there and forgotten.

    The model looks at `rate` frames a second, each being the last one shown by then, and two of
    them make a step. What it has seen has the states of the clip as a whole. Once it has seen
    `video.frames` of its configuration, the older half is forgotten.

    engine: of a model that watches. before: text in front of the clip. options: those of
    `Session`.

    Raises `UsageError` for a model that does not watch, for a rate that is not above 0, and as
    `Session` does.
    """

    def __init__(
        self,
        engine: Engine,
        rate: float = 12.5,
        *,
        before: str = "",
        options: GenerationOptions | None = None,
    ) -> None:
        if "video" not in engine.model.encoders():
            raise UsageError("this model reads no clips; use one that was trained on some")
        if not rate > 0:
            raise UsageError(f"`rate` {rate:g}: above 0 frames a second")
        self.engine, self.rate, self.config = engine, rate, engine.model.config
        self.options = options or GenerationOptions()
        self.seconds = 0.0
        """When the newest frame was shown."""
        self._eye = Eye(self.config, "the frame")
        self._first = engine.encode(MediaPrompt(before))
        self._session: Session | None = None
        self._most = 0  # steps that are remembered
        self._steps: list[torch.Tensor] = []  # what the cache holds, (rows * columns, values) each
        self._waiting: list[np.ndarray] = []  # one or two frames that are not in the cache
        self._shown: np.ndarray | None = None
        self._looks = 0

    def feed(self, frame: Still, seconds: float) -> None:
        """A frame that is shown from this time on, counted from the clip's beginning.

        All frames are scaled to the first one's size. Raises `UsageError` for a time before the
        last frame's, and as `Eye.see` does.
        """
        if not self.seconds <= seconds < float("inf"):
            raise UsageError(
                f"a frame at {seconds:g} s after one at {self.seconds:g} s; feed them in order"
            )
        pixels = self._eye.see(frame)
        if self._shown is None:
            self._begin()
        else:
            self._show(seconds - 1e-6)
        self._shown, self.seconds = pixels, seconds
        self._show(seconds + 1e-6)

    def ask(self, prompt: str = "", **options: Any) -> Generation:
        """What follows the clip so far and a prompt. options: changes of those of `VideoSession`.

        Raises `UsageError` before the first frame, and as `Session.answer` does.
        """
        if self._session is None:
            raise UsageError("no frame came yet; feed one before asking")
        item = self._item(self._waiting)
        ids = self.engine.tokenizer.encode(prompt, add_special_tokens=False).ids
        return self._session.answer([*self._places(item), *ids], [item], **options)

    def _begin(self) -> None:
        """Make the cache, once the first frame tells how many tokens a step has."""
        each = self._eye.tokens
        context = self.config.max_seq_len - len(self._first)
        room = min(_ROOM, context // 2)
        # One step more is waiting beside those that are remembered.
        self._most = min(self.config.video.frames // 2, (context - room) // each) - 1
        if self._most < 0:
            raise UsageError(
                f"a step of {each} tokens leaves no room in a context of "
                f"{self.config.max_seq_len} tokens; use a model with a longer one"
            )
        columns = len(self._first) + (self._most + 1) * each + room
        self._session = Session(self.engine, columns, self.options)
        self._session.read(self._first)

    def _show(self, until: float) -> None:
        """Look at the frame that is shown, at each moment up to this one."""
        assert self._shown is not None
        due = int(np.floor(until * self.rate)) + 1 - self._looks
        # A frame that stays for longer than is remembered is not looked at so often.
        skipped = max(0, due - 4 * (self._most + 1)) // 2 * 2
        self._looks += max(0, due)
        for _ in range(due - skipped):
            if len(self._waiting) == 2:
                self._remember(self._item(self._waiting))
                self._waiting = []
            self._waiting.append(self._shown)

    def _remember(self, step: MediaItem) -> None:
        assert self._session is not None
        if len(self._steps) == self._most:
            kept = self._steps[(self._most + 1) // 2 :]
            self._session.clear()
            self._session.read(self._first)
            self._steps = []
            if kept:
                self._add(step._replace(features=torch.cat(kept), grid=(len(kept), *step.grid[1:])))
        if self._most:
            self._add(step)

    def _add(self, steps: MediaItem) -> None:
        assert self._session is not None
        self._session.read(self._places(steps), [steps])
        self._steps += steps.features.chunk(steps.grid[0])

    def _item(self, frames: list[np.ndarray]) -> MediaItem:
        return tubelets(frames, 2 / self.rate, self.config)

    def _places(self, item: MediaItem) -> list[int]:
        return [self.config.video.token] * item.length


def narrate(
    engine: Engine,
    frames: Iterable[Frame],
    every: float,
    prompt: str = "",
    rate: float = 12.5,
    options: GenerationOptions | None = None,
) -> Iterator[Segment]:
    """What happens in a clip that goes on, each time so many seconds have passed, and at its end.

    every: seconds between answers, above 0. prompt: what is asked; the clip stands at its marker,
    or before it. rate: see `VideoSession`, whose errors this raises.
    """
    marker = MEDIA["video"].marker
    before, _, asked = prompt.rpartition(marker)
    if marker in before:
        raise UsageError(f"{prompt.count(marker)} {marker} in a text for 1 clip; write it once")
    watch, start, until = VideoSession(engine, rate, before=before, options=options), 0.0, 0.0

    def answered(end: float) -> Segment:
        answer = watch.ask(asked)
        return Segment(start, end, answer.text.strip(), answer)

    for begin, end, frame in frames:
        if begin >= start + every - 1e-6:
            yield answered(begin)
            start = begin
        watch.feed(frame, begin)
        until = end
    yield answered(until)
