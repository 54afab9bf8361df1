"""What `data` means: shards, or raw text that becomes shards in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from looptx_core.data.corpus import Corpus, bundled_text
from looptx_core.data.shard_writer import VOCAB_SIZE, tokenize_corpus
from looptx_core.data.shards import SCHEMA_VERSION, Manifest, open_shards
from looptx_core.data.split import Progress
from looptx_core.data.tokenizer import SmallTextError, fingerprint
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.machine.scratch import cache_folder


def cached_shards(
    inputs: Sequence[str | os.PathLike[str]],
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    on_progress: Progress | None = None,
) -> Path:
    """The folder of shards for raw text, tokenised at the first call and found again after.

    Its name is a hash of the inputs' content and the settings. Arguments and errors as for
    `tokenize_corpus`.
    """
    with Corpus(inputs, text_key) as corpus:
        vocabulary = fingerprint(tokenizer) if tokenizer else vocab_size
        settings = [SCHEMA_VERSION, corpus.digest(), vocabulary, val_fraction, seed, text_key]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        folder = cache_folder() / "shards" / key
        if _opens(folder):
            return folder
        try:
            tokenize_corpus(
                corpus,
                folder,
                vocab_size,
                tokenizer,
                val_fraction,
                seed,
                check=False,
                on_progress=on_progress,
            )
        except SmallTextError as error:  # whoever trains has no flag for it
            mend = (
                f"give more text, or train on shards of a smaller vocabulary: looptx tokenize "
                f"--vocab-size {error.largest}"
            )
            raise SmallTextError(error.largest, error.asked, mend) from error
        except LooptxError:
            if not _opens(folder):  # else another process was faster
                raise
    return folder


def resolve_data(
    data: Sequence[str | os.PathLike[str]] | None,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    on_progress: Progress | None = None,
) -> Path:
    """The folder of shards that `data` means: itself, or raw text through the cache.

    Args:
        data: one folder of shards, or inputs as for `Corpus`; None is the bundled text.
        tokenizer: the one that the shards must have been made with, or will be.
    Raises:
        UsageError: shards mixed with other inputs.
        DataError: shards of another tokenizer; and as for `tokenize_corpus`.
    """
    inputs = list(data) if data is not None else [bundled_text()]
    folders = [Path(item) for item in inputs if (Path(item) / "manifest.json").is_file()]
    if not folders:
        return cached_shards(
            inputs, vocab_size, tokenizer, val_fraction, seed, text_key, on_progress
        )
    if len(inputs) > 1:
        raise UsageError(f"{folders[0]} is tokenised data; give it alone, or give raw text only")
    if tokenizer and Manifest.read(folders[0]).tokenizer != fingerprint(tokenizer):
        raise DataError(
            f"{folders[0]}: made with another tokenizer than the model's or the first text's; "
            "tokenise the text again with that one"
        )
    return folders[0]


def resolve_sources(
    texts: Sequence[str | os.PathLike[str]],
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
) -> list[Path]:
    """A folder of shards for each text, all of one tokenizer.

    That is the one given, else that of the first which is tokenised, else one that is trained on
    all of them. Arguments and errors as for `resolve_data`.
    """
    if len(texts) == 1:
        return [resolve_data(texts, vocab_size, tokenizer)]
    if tokenizer is None:
        ready = [text for text in texts if (Path(text) / "manifest.json").is_file()]
        joined = resolve_data(ready[:1] or texts, vocab_size)
        tokenizer = open_shards(joined).tokenizer
    return [resolve_data([text], vocab_size, tokenizer) for text in texts]


def _opens(folder: Path) -> bool:
    try:
        open_shards(folder)
    except DataError:
        return False
    return True
