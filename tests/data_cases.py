"""Texts and settings that the tests of data share."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer

from looptx_core.data.corpus import bundled_text
from looptx_core.data.tokenizer import load_tokenizer

VOCAB = 400
MOBY = bundled_text().read_text("utf-8")
RELAXED = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def text_of(i: int) -> str:
    return f"document {i} début 🐋 " + MOBY[i * 3000 : i * 3000 + 2500]


def load_tokenizer_of(tokenizer: Tokenizer) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "tokenizer.json").write_text(tokenizer.to_str())
        return load_tokenizer(root)
