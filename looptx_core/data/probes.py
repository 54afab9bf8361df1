"""Probes: held-out lines with marked answers, to see what each loop brings on a task.

A data folder may hold `probes.jsonl`, a line each: `{"group": "4 hops", "text": "...",
"answers": [[start, end], ...]}`, the answers as character spans of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from looptx_core.atomic import write_file
from looptx_core.documents import read_json_lines
from looptx_core.errors import DataError
from looptx_core.schema import typed

if TYPE_CHECKING:
    from torch import Tensor

FILE = "probes.jsonl"


@dataclass(frozen=True)
class Probe:
    """A text and the spans of characters in it that count."""

    group: str
    text: str
    answers: list[tuple[int, int]]


def write_probes(folder: Path, probes: Iterable[Probe]) -> None:
    """Write the probes of a data folder, in place of those that are there.

    Raises `LooptxError` where they can't be written.
    """
    write_file(folder / FILE, "".join(json.dumps(asdict(probe)) + "\n" for probe in probes))


def read_probes(folder: Path) -> list[Probe]:
    """The probes of a data folder; none where it has no file of them."""
    file = folder / FILE
    if not file.exists():
        return []
    probes = []
    for where, value in read_json_lines(file, mend="remove the file"):
        probes.append(check_probe(value, where, "remove the file"))
    return probes


def check_probe(value: Any, where: str, mend: str) -> Probe:
    """A probe from a JSON value. Raises `DataError`, which ends in the remedy `mend`."""
    probe = typed(Probe, value, where, mend=mend)
    for start, end in probe.answers:
        if not 0 <= start < end <= len(probe.text):
            raise DataError(f"{where}: an answer is outside of the text; {mend}")
    return probe


def answer_tokens(probe: Probe, encoded: Encoding) -> list[int]:
    """The places of the tokens that lie in an answer."""
    return [
        place
        for place, (left, right) in enumerate(encoded.offsets)
        if any(left < end and right > start for start, end in probe.answers)
    ]


def probe_batches(
    probes: list[Probe], tokenizer: Tokenizer
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each group: name, tokens (lines, length + 1), counted (lines, length).

    `counted` marks the targets that lie in an answer. Shorter lines are padded at the end.
    """
    import torch  # seconds, and who only writes probes needs none of it

    for name, members in groupby(sorted(probes, key=lambda p: p.group), key=lambda p: p.group):
        lines = list(members)
        encoded = tokenizer.encode_batch([line.text for line in lines])
        length = max(len(item.ids) for item in encoded)
        tokens = torch.zeros(len(lines), length, dtype=torch.long)
        counted = torch.zeros(len(lines), length, dtype=torch.bool)
        for row, (line, item) in enumerate(zip(lines, encoded)):
            tokens[row, : len(item.ids)] = torch.tensor(item.ids)
            counted[row, answer_tokens(line, item)] = True
        yield name, tokens, counted[:, 1:]
