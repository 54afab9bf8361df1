"""The codecs of this process by fingerprint.

A configuration names its codec by fingerprint alone, as the same codec may lie beside a tokenizer
and in any number of model folders. Who opens a folder leaves the codec here, and writers find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from looptx_core.errors import DataError

if TYPE_CHECKING:
    from looptx_core.media.codec.codec import Codec


class Opened(NamedTuple):
    """A codec and what its folder says of its training."""

    codec: Codec
    facts: Mapping[str, Any]


_opened: dict[str, Opened] = {}


def keep_codec(fingerprint: str, codec: Codec, facts: Mapping[str, Any]) -> None:
    """Make a codec known by its fingerprint."""
    _opened[fingerprint] = Opened(codec, facts)


def opened_codec(fingerprint: str) -> Opened:
    """The codec of a fingerprint. Raises `DataError` where none was opened."""
    if fingerprint not in _opened:
        raise DataError(
            f"the codec {fingerprint[:12]} of this model is not there; give it by `codec`"
        )
    return _opened[fingerprint]
