"""The text that ships with the package, and beside it generated lines that need depth."""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from looptx_core.atomic import write_file
from looptx_core.data.corpus import bundled_text
from looptx_core.data.hops import hop_lines, hop_probes
from looptx_core.data.probes import FILE, write_probes
from looptx_core.data.resolve import cached_shards
from looptx_core.data.split import Progress
from looptx_core.machine.scratch import cache_folder

CORPUS = "moby-dick-and-hops.jsonl"
"""The name of the file that `bundled_corpus` makes."""
_LINES = 20_000
_PROBES = 200
_SEED = 0


def bundled_corpus() -> Path:
    """Moby Dick by chapters and the hop lines, as JSON lines in the cache; made when absent."""
    chapters = re.split(r"(?m)^(?=CHAPTER \d+\.)", bundled_text().read_text("utf-8"))
    documents = [chapter.strip() for chapter in chapters if chapter.strip()]
    documents += hop_lines(_SEED, _LINES)  # a document each: other lines' tables mislead
    text = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    file = cache_folder() / "bundled" / CORPUS
    if not file.exists() or file.read_text("utf-8") != text:
        write_file(file, text, parents=True)
    return file


def bundled_questions() -> Path:
    """Questions on tables of arrows, made by `hop_questions(0, 4000)`, as JSON lines."""
    return Path(str(importlib.resources.files("looptx_core").joinpath("assets", "questions.jsonl")))


def bundled_shards(
    vocab_size: int, tokenizer: Tokenizer | None = None, on_progress: Progress | None = None
) -> Path:
    """The bundled corpus, tokenised through the cache, with its probes.

    tokenizer: an existing one, in place of a new vocabulary of `vocab_size`.
    """
    folder = cached_shards([bundled_corpus()], vocab_size, tokenizer, on_progress=on_progress)
    if not (folder / FILE).exists():
        add_bundled_probes(folder)
    return folder


def add_bundled_probes(folder: Path) -> None:
    """Put the hop lines' probes beside shards of the bundled corpus."""
    write_probes(folder, hop_probes(_SEED, _PROBES))
