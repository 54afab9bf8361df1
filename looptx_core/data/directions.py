"""Pairs of an item and its texts that a model reads, writes, or both."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from looptx_core.data.records import MediaFile, Record, Records, Turn
from looptx_core.media.registry import MEDIA

_UNASKED = 9
"""Of so many times that an item is written to a text, it is written to none once: what guidance
compares with."""


def in_directions(records: Records, direction: str, written: Collection[str]) -> Records:
    """The records as read, as written or, one after the other, both.

    Only a record that is one item and its texts has a choice, and only where its medium is
    `written`; others stay as they are. Both versions are held out together.
    """
    if not written or direction == "read":
        return records
    found = [way for record in records.records for way in _ways(record, direction, written)]
    return replace(records, records=found)


def _ways(record: Record, direction: str, written: Collection[str]) -> Iterator[Record]:
    match record:
        case Record(form="text", turns=(Turn((MediaFile() as file, tuple() as texts)),)) if (
            file.medium in written and not file.written
        ):
            unasked = ("",) if MEDIA[file.medium].unasked else ()
            times = -(-_UNASKED // len(texts)) if unasked else 1
            said = (*(texts * times), *unasked)
            turns = (Turn((said,)), Turn((file._replace(written=True),)))
            group = record.group if record.group is not None else "\n".join(texts)
            if direction == "both":
                yield replace(record, group=group)
            yield replace(record, form="prompt", turns=turns, group=group)
        case _:
            yield record
