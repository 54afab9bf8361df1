"""How a model writes items of a medium, as codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from looptx_core.media.base import Source

if TYPE_CHECKING:
    from looptx_core.config.generation import GenerationOptions


class Writer:
    """How a model writes items of one medium: as codes, which are ids of its vocabulary.

    The codes' rows follow the text's. An item begins with the token `opens`; then `allowed` says
    which ids may come, until `finished`. They are codes, but for a last one that may end the item,
    and for others that the medium needs, such as those of the text that is spoken.
    """

    opens: int
    """The token that begins an item; itself an ordinary token of the text's vocabulary."""
    first_code: int
    """The id of code 0."""
    codes: int
    """How many codes there are."""

    @property
    def code_ids(self) -> range:
        """The ids of the codes."""
        return range(self.first_code, self.first_code + self.codes)

    def transcript(self, before: Sequence[int]) -> Sequence[int]:
        """The ids of the text that an item says which begins after these ids; most say none."""
        return ()

    def allowed(self, written: Sequence[int], transcript: Sequence[int] = ()) -> Sequence[int]:
        """The ids that may follow these ids of an item, which is not finished."""
        return self.code_ids

    def finished(self, written: Sequence[int], transcript: Sequence[int] = ()) -> bool:
        """Whether these ids, without `opens`, are a whole item."""
        raise NotImplementedError

    def is_open(self, written: Sequence[int], transcript: Sequence[int] = ()) -> bool:
        """Whether these ids are the beginning of an item."""
        codes = self.code_ids
        return all(token in codes for token in written) and not (
            written and self.finished(written, transcript)
        )

    def encode(
        self, source: Source, where: str | None = None, transcript: Sequence[tuple[int, bytes]] = ()
    ) -> list[int]:
        """The ids of a whole item in a file, without `opens`, to learn from.

        transcript: the ids of the text before it, each with its bytes. Raises `DataError` for what
        can't be read.
        """
        raise NotImplementedError

    def learned(self, token: int) -> bool:
        """Whether a model learns to predict this token of an item, which `encode` made."""
        return True

    def render(self, written: Sequence[int], options: GenerationOptions) -> bytes:
        """The content of the file that a whole item makes, by a request's settings."""
        raise NotImplementedError

    def grid(self, written: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the codes of a whole item; in a medium with time, a row is a
        moment. By default one column."""
        return sum(token in self.code_ids for token in written), 1

    def shown(self, content: bytes) -> list[list[Any]]:
        """What a report shows of a file that `render` made: rows of pixels, each a number from 0
        to 1 or three of them; empty: nothing."""
        return []

    def seconds(self, written: Sequence[int]) -> float | None:
        """How long a whole item is; None for a medium without time."""
        return None

    def codes_of(self, seconds: float) -> int:
        """The codes of so many seconds, for a medium with time."""
        raise NotImplementedError
