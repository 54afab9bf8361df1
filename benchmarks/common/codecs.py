"""What records of drawing and of speaking say of a codec, and of a model that writes its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from looptx_core.checkpoint.codec_folder import read_facts
from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.media.codec.codec import Codec


def codec_settings(codec: Codec, fingerprint: str, folder: Path) -> dict[str, Any]:
    """Of a record of a codec alone."""
    facts = read_facts(folder)
    return {
        "codes": codec.config.codes,
        "parameters": sum(p.numel() for p in codec.parameters()),
        "trained_steps": facts.get("steps"),
        "trained_seconds": facts.get("seconds"),
        "fingerprint": fingerprint,
    }


def writer_settings(loaded: LoadedModel) -> dict[str, Any]:
    """Of a record of a model that writes one medium."""
    (section,) = loaded.config.written
    legs = [loaded.facts, *loaded.facts.get("lineage", ())]
    return {
        "codec": section.codec,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "steps": sum(leg.get("steps") or 0 for leg in legs),
    }
