"""Which stretch of a recording says which token of its text, by a recogniser's CTC.

The most likely way through CTC's symbols that spells the text (Viterbi) has the rows of 40 ms at
which each byte is heard. Tokens part in the middle between the last letter of one and the first of
the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from looptx_core.errors import DataError, UsageError
from looptx_core.media.audio.encoder import BLANK, AudioEncoder, frames_needed
from looptx_core.media.audio.features import FRAMES
from looptx_core.media.batch import MediaItem, batch_items

ROW = 4
"""Frames of a row of the recogniser."""

_recogniser: Callable[[], AudioEncoder] | None = None


def use_recogniser(load: Callable[[], AudioEncoder]) -> None:
    """Let this encoder, with CTC, align what is read from now on; it is loaded when it is needed,
    each time anew."""
    global _recogniser
    _recogniser = load


def recogniser() -> AudioEncoder:
    """The encoder that aligns. Raises `UsageError` where none was named."""
    if _recogniser is None:
        raise UsageError("nothing aligns recordings with their texts; name a recogniser first")
    return _recogniser()


@torch.no_grad()
def frames_of_tokens(
    item: MediaItem, tokens: Sequence[bytes], encoder: AudioEncoder, where: str
) -> list[int]:
    """The frame of 10 ms at which each token ends, the last one at the recording's end.

    tokens: the bytes of each. Raises `DataError` for a text that is too long for the recording.
    """
    label = b"".join(tokens).lower()
    if frames_needed(torch.tensor(list(label))) > len(item.features) * FRAMES // ROW:
        raise DataError(
            f"{where}: its text, {len(label)} bytes, is too long for what is heard in "
            f"{len(item.features) * 0.08:.1f} s; mend the record, or pass `skip_bad`"
        )
    scores = encoder.scores(batch_items([item])["audio"])[0].numpy()
    first, last = spell(scores, [byte + 1 for byte in label])
    ends, place, before = [], 0, 0
    for token, following in zip(tokens, [*tokens[1:], b""]):
        place += len(token)
        heard = [place - len(token) + n for n, byte in enumerate(token) if byte not in b" \n\t"]
        coming = [place + n for n, byte in enumerate(following) if byte not in b" \n\t"]
        if not following:
            before = len(item.features) * FRAMES
        elif heard and coming:
            between = (last[heard[-1]] + 1 + first[coming[0]]) / 2
            before = max(before, round(ROW * between))
        ends.append(before)
    return ends


def spell(scores: np.ndarray, symbols: Sequence[int]) -> tuple[list[int], list[int]]:
    """The first and the last row of each symbol on the most likely way.

    scores: (rows, symbols of CTC), log-probabilities, of enough rows for the symbols.
    """
    states = np.full(2 * len(symbols) + 1, BLANK)
    states[1::2] = symbols
    skips = np.zeros(len(states), bool)  # over a blank, to another symbol than the one before
    skips[3::2] = states[3::2] != states[1:-2:2]
    own = scores[:, states]
    best = np.full(len(states), -np.inf)
    best[:2] = own[0, :2]
    came = np.zeros((len(scores), len(states)), np.int8)
    for row in range(1, len(scores)):
        ways = np.full((3, len(states)), -np.inf)
        ways[0], ways[1, 1:] = best, best[:-1]
        ways[2, 2:] = np.where(skips[2:], best[:-2], -np.inf)
        came[row] = ways.argmax(0)
        best = ways.max(0) + own[row]
    state = len(states) - 1 if best[-1] >= best[-2] or len(states) < 2 else len(states) - 2
    first, last = [0] * len(symbols), [-1] * len(symbols)
    for row in range(len(scores) - 1, -1, -1):
        number, is_symbol = divmod(state, 2)
        if is_symbol:
            first[number] = row
            last[number] = max(last[number], row)
        state -= int(came[row, state])
    return first, last
