"""A codec's folder: codec.json, its shape, fingerprint and report, and codec.safetensors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.header import read_header, total_elements
from looptx_core.checkpoint.weights import read_tensors, refuse_pickle
from looptx_core.config.codec import MEDIUM_OF, SECTION_OF, CodecConfig
from looptx_core.config.media import WrittenConfig
from looptx_core.config.model import ModelConfig
from looptx_core.documents import check_links, read_json, some, to_json
from looptx_core.errors import DataError
from looptx_core.media.audio.align import use_recogniser
from looptx_core.media.audio.encoder import AudioEncoder
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.opened import keep_codec
from looptx_core.media.registry import MEDIA
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.schema import typed

SHAPE, WEIGHTS = "codec.json", "codec.safetensors"
FORMAT_VERSION = 1
_MEND = "copy the codec again"


@dataclass(frozen=True)
class _Document:
    """codec.json."""

    format_version: int
    command: str
    shape: dict[str, Any]
    fingerprint: str
    """Of shape and weights: models that learned these codes name it."""
    facts: dict[str, Any] = field(default_factory=dict)


def save_codec(folder: str | Path, codec: Codec, facts: Mapping[str, Any]) -> str:
    """Write a codec's folder, whole or not at all; returns its fingerprint.

    Raises `LooptxError` where it can't be written.
    """
    write_folder(Path(folder), lambda place: write_codec(place, codec, facts))
    found = fingerprint_of(codec)
    keep_codec(found, codec, facts)
    return found


def write_codec(place: Path, codec: Codec, facts: Mapping[str, Any]) -> None:
    """Write a codec's files into a folder that is being made."""
    place.mkdir(exist_ok=True)
    save_file({k: _stored(v) for k, v in codec.state_dict().items()}, place / WEIGHTS)
    document = _Document(
        FORMAT_VERSION, "codec", asdict(codec.config), fingerprint_of(codec), dict(facts)
    )
    (place / SHAPE).write_text(to_json(asdict(document)), "utf-8")


def _stored(weight: torch.Tensor) -> torch.Tensor:
    """As bfloat16 where that loses nothing."""
    rounded = weight.bfloat16()
    return (rounded if torch.equal(rounded.to(weight.dtype), weight) else weight).contiguous()


def load_codec(folder: str | Path) -> tuple[Codec, str]:
    """A codec in evaluation mode, and its fingerprint, by which writers find it from then on.

    Raises `DataError` for a folder that is none, is damaged or is of a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such codec; make one by looptx tokenize --codec")
    check_links(folder)
    for name in (SHAPE, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is missing, so this is no codec; {_MEND}")
    file = folder / SHAPE
    content = read_json(file)
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise DataError(f"{file}: format_version {version} is newer than {FORMAT_VERSION}; "
                        "upgrade looptx")  # fmt: skip
    document = typed(_Document, content, str(file), mend=_MEND)
    config = typed(CodecConfig, document.shape, f"{file}, shape", mend=_MEND)
    refuse_pickle(folder / WEIGHTS)
    stored = read_header(folder / WEIGHTS)
    largest = max(config.width, config.encoder_width) ** 2
    blocks = config.encoder_layers + config.prelude_layers + config.core_layers + config.coda_layers
    if blocks > len(stored) or largest > total_elements(stored):
        raise DataError(f"{file}: asks for more than {WEIGHTS} holds; {_MEND}")
    with init_empty_weights():
        codec = Codec(config)
    expected = codec.state_dict()
    found = read_tensors(
        folder / WEIGHTS, expected, torch.device("cpu"), torch.float32, lambda name: name
    )
    if missing := sorted(expected.keys() - found.keys()):
        raise DataError(f"{folder / WEIGHTS}: lacks {some(missing)}; {_MEND}")
    codec.load_state_dict(found, assign=True)
    codec.eval().requires_grad_(False)
    if document.fingerprint != fingerprint_of(codec):
        raise DataError(f"{folder}: its fingerprint is not of its shape and weights; {_MEND}")
    keep_codec(document.fingerprint, codec, document.facts)
    if config.kind == "speech":
        use_recogniser(_bundled_recogniser)
    return codec, document.fingerprint


@functools.cache
def _bundled_recogniser() -> AudioEncoder:
    """The encoder of the bundled model that hears, which aligns speech with its text."""
    from looptx_core.checkpoint.folder import load_model
    from looptx_core.checkpoint.registry import bundled_model

    model = load_model(bundled_model("sound-model"), dtype=torch.float32).model
    return cast(AudioEncoder, model.encoders()["audio"])


def with_codec(model: ModelConfig, folder: str | Path) -> ModelConfig:
    """The configuration of a model that draws, or speaks, by the codec of a folder.

    Raises `DataError` for a folder that can't be read, and for a model of another codec.
    """
    codec, fingerprint = load_codec(folder)
    shape = codec.config
    written: WrittenConfig = getattr(model, SECTION_OF[shape.kind])
    if written.codec not in ("", fingerprint):
        raise DataError(
            f"{folder}: another codec than the one that this model was trained with, "
            f"{written.codec[:12]}; give that one"
        )
    medium = MEDIA[MEDIUM_OF[shape.kind]]
    if not medium.enabled(vars(model)):
        model = medium.enable(model)
    own: dict[str, Any] = {name: getattr(shape, name) for name in written.own}
    changed: dict[str, Any] = {written.SECTION: replace(written, codec=fingerprint, **own)}
    return replace(model, **changed)


def codec_name(section: WrittenConfig) -> str:
    """The folder of a section's codec, in a model's."""
    return f"codec-{next(kind for kind, name in SECTION_OF.items() if name == section.SECTION)}"


def read_facts(folder: str | Path) -> Mapping[str, Any]:
    """What a codec's folder says of its training. Raises `DataError` for an unreadable one."""
    return typed(_Document, read_json(Path(folder) / SHAPE), str(folder), mend=_MEND).facts


def fingerprint_of(codec: Codec) -> str:
    """Of a codec's shape and of its weights, however they are stored."""
    shape = asdict(codec.config)
    if not codec.config.window:
        del shape["window"]  # as codecs without one always were
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
