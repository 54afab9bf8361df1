"""Speech of a model: its file, and what a terminal shows of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_cli.console import note
from looptx_cli.drawing import check_picture_target, print_document
from looptx_cli.streaming import print_now
from looptx_cli.targets import check_target, grey, map_file, save_beside
from looptx_core.errors import LooptxError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from looptx_core.config.generation import GenerationOptions
    from looptx_core.generation.engine import Engine, Generation
    from looptx_core.generation.outputs import Output
    from looptx_core.media.batch import MediaItem

KINDS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
"""What is spoken to, by the file's ending, as libsndfile names it."""
MOST_TOKENS = 1 << 16
"""Tokens of a speech where nothing else limits it."""
_SECONDS = 0.25  # that a token of the text takes at least, to say beforehand what is too long
_MOMENT, _BAND = 12, 2  # pixels of 40 ms and of a mel in the map
_GAP = 8


def check_sound_target(file: Path) -> None:
    """Raise `UsageError` where no sound can be written to this file."""
    check_target("--speak", file, KINDS, "recording", _is_sound)


def _is_sound(file: Path, kind: str) -> bool:
    import soundfile

    try:
        return bool(soundfile.info(str(file)).format == kind)
    except (soundfile.SoundFileError, RuntimeError, OSError):
        return False


def check_written(
    draw: Path | None, speak: Path | None, prompts: int, beside: bool, iterations: bool
) -> None:
    """Raise `UsageError` where --draw or --speak can't be done. beside: other flags exclude them.

    iterations: whether a map of the loops is written, too.
    """
    if draw is not None and speak is not None:
        raise UsageError("--draw and --speak exclude each other; call the command twice")
    for flag, file in (("--draw", draw), ("--speak", speak)):
        if file is None:
            continue
        if prompts > 1 or beside:
            raise UsageError(f"{flag} goes with one prompt, and neither a chat nor several depths")
        (check_picture_target if draw else check_sound_target)(file)
        if iterations:
            check_picture_target(map_file(file), flag)


def speak_text(
    engine: Engine,
    text: str,
    items: tuple[MediaItem, ...],
    options: GenerationOptions,
    file: Path,
    iterations: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Speak a text into a file."""
    from looptx_core.generation.engine import MediaPrompt

    prompt = MediaPrompt(text, items, write="audio")
    options = replace(options, max_new_tokens=check_room(engine, prompt, options))
    (result,) = engine.complete([prompt], options)
    if not result.outputs:
        raise LooptxError(
            f"the speech was not finished within {len(result.tokens):,} tokens; raise "
            "`max_new_tokens`, or shorten the prompt"
        )
    (output,), (media,) = result.outputs, result.media
    samples = write_sound(output, file)
    media = {**media, "file": str(file)}
    config = engine.model.config
    if iterations:
        place = write_map(media, samples, config.speak.columns, config.max_loops)
        note(f"loops and confidence: {place}", quiet)
    if as_json:
        print_document(result, media)
        return
    print_now(f"{file}\n")
    if iterations:
        print_now("".join(f"{line}\n" for line in token_lines(engine, result)))
    note(
        f"{media['seconds']:.2f} s of speech, {len(media['codes'])} codes, {result.mean_loops:.2f} "
        f"loops a token of {config.max_loops}, in {result.tokens[-1].seconds:.2f} s, then "
        f"{media['elapsed']:.2f} s from codes to sound",
        quiet,
    )
    if not iterations:
        note("try next: --show-iterations, --temperature 0.5, or another --seed", quiet)


def check_room(engine: Engine, prompt: Any, options: GenerationOptions) -> int:
    """The most tokens that the speech may take. Raises `UsageError` where it finds no room."""
    ids, writer = engine.encode(prompt), engine.writers["audio"]
    said = writer.transcript(ids[:-1])
    if not said or not engine.tokenizer.decode(list(said)).strip():
        raise UsageError("--speak needs a text to say; give a prompt")
    holds = engine.model.config.context_limit
    least = len(said) * (2 + writer.codes_of(_SECONDS))
    if holds is not None and len(ids) + least > holds:
        raise UsageError(
            f"the prompt has {len(said):,} tokens, whose speech takes {least:,} or more, and the "
            f"model's context holds {holds:,}; shorten the prompt"
        )
    return options.max_new_tokens if holds is None else min(options.max_new_tokens,
                                                            holds - len(ids))  # fmt: skip


def write_sound(output: Output, file: Path) -> np.ndarray:
    """Write speech to a file of the kind that its ending says; returns its samples, (n,) float32.

    Raises `LooptxError` where it can't be written.
    """
    import soundfile

    from looptx_core.atomic import write_file
    from looptx_core.media.audio.vocoder import to_file

    samples, _ = soundfile.read(io.BytesIO(output.content), dtype="float32")
    write_file(file, to_file(samples, KINDS[file.suffix.lower()]))
    return samples


def write_map(media: dict[str, Any], samples: np.ndarray, columns: int, deepest: int) -> Path:
    """Draw the mels of speech over time, and below them the loops and the confidence of its codes.

    Returns its place: beside the sound, with `-iterations` in its name.
    """
    import torch

    from looptx_core.media.audio.coded import frames_of

    moments = len(media["codes"]) // columns
    width = moments * _MOMENT
    mels = (frames_of(torch.from_numpy(samples)).T.flip(0) + 1) / 2
    parts = [grey(mels.flatten().tolist(), mels.shape[1], (width, _BAND * len(mels)))]
    for values in ([loops / deepest for loops in media["loops"]], media["confidence"]):
        bands = torch.tensor(values).view(moments, columns).T.flip(0)
        parts.append(grey(bands.flatten().tolist(), moments, (width, columns * _MOMENT)))
    target = map_file(Path(media["file"]))
    save_beside(parts, target, _GAP, below=True)
    return target


def token_lines(engine: Engine, result: Generation) -> Iterator[str]:
    """Each token of the text with the length of its sound, its codes' loops and confidence."""
    writer = engine.writers["audio"]
    yield f"{'said':<16}{'seconds':>8}{'loops':>8}{'sure %':>8}"
    said, own = None, []
    for step in result.tokens:
        if step.id in writer.code_ids:
            own.append(step)
        elif said is None:
            said = engine.tokenizer.decode([step.id])
        else:  # what closes it
            seconds = writer.seconds([code.id for code in own])
            loops = sum(code.loops for code in own) / max(1, len(own))
            sure = 100 * sum(code.confidence for code in own) / max(1, len(own))
            yield f"{said:<16}{seconds:>8.2f}{loops:>8.2f}{sure:>8.0f}"
            said, own = None, []
