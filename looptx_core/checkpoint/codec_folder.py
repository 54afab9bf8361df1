"""A codec's folder: codec.json, its shape, fingerprint and report, and codec.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.header import read_header, total_elements
from looptx_core.checkpoint.weights import read_tensors, refuse_pickle
from looptx_core.config.codec import CodecConfig
from looptx_core.documents import check_links, read_json, some, to_json
from looptx_core.errors import DataError
from looptx_core.machine.integrity import check_digest, sha256_of
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.opened import keep_codec
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
    sha256: str
    """Of codec.safetensors."""
    fingerprint: str
    """Of shape and weights: models that learned these codes name it."""
    facts: dict[str, Any] = field(default_factory=dict)


def save_codec(folder: str | Path, codec: Codec, facts: Mapping[str, Any]) -> str:
    """Write a codec's folder, whole or not at all; returns its fingerprint.

    Raises `LooptxError` where it can't be written.
    """
    prints: list[str] = []

    def write(place: Path) -> None:
        save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, place / WEIGHTS)
        prints.append(_write_shape(place, codec.config, facts))

    write_folder(Path(folder), write)
    keep_codec(prints[0], codec, facts)
    return prints[0]


def _write_shape(place: Path, config: CodecConfig, facts: Mapping[str, Any]) -> str:
    """Write codec.json beside the weights."""
    digest, shape = sha256_of(place / WEIGHTS), json.loads(json.dumps(asdict(config)))
    found = fingerprint_of(shape, digest)
    document = _Document(FORMAT_VERSION, "codec", shape, digest, found, dict(facts))
    (place / SHAPE).write_text(to_json(asdict(document)), "utf-8")
    return found


def copy_codec(place: Path, codec: Codec, facts: Mapping[str, Any]) -> None:
    """Write a codec into a folder that is being made."""
    place.mkdir()
    save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, place / WEIGHTS)
    _write_shape(place, codec.config, facts)


def load_codec(folder: str | Path) -> tuple[Codec, str]:
    """A codec in evaluation mode, and its fingerprint, by which writers find it from then on.

    Raises `DataError` for a folder that is none, is damaged or is of a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such codec; make one by looptx tokenize --codec picture")
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
    if document.fingerprint != fingerprint_of(document.shape, document.sha256):
        raise DataError(f"{file}: its fingerprint is not of its shape and weights; {_MEND}")
    with init_empty_weights():
        codec = Codec(config)
    expected = codec.state_dict()
    found = read_tensors(
        folder / WEIGHTS, expected, torch.device("cpu"), torch.float32, lambda name: name
    )
    if missing := sorted(expected.keys() - found.keys()):
        raise DataError(f"{folder / WEIGHTS}: lacks {some(missing)}; {_MEND}")
    check_digest(folder / WEIGHTS, document.sha256, _MEND)
    codec.load_state_dict(found, assign=True)
    codec.eval().requires_grad_(False)
    keep_codec(document.fingerprint, codec, document.facts)
    return codec, document.fingerprint


def fingerprint_of(shape: Mapping[str, Any], digest: str) -> str:
    """Of a codec's shape and of its weights' digest."""
    text = json.dumps([shape, digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
