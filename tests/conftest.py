"""What tests share: their own cache, two threads, and small data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Before anything of ours is imported: no test reads or writes the user's cache or settings.
for _name in [name for name in os.environ if name.startswith("LOOPTX_")]:
    del os.environ[_name]
os.environ["LOOPTX_CACHE"] = str(Path(tempfile.gettempdir()) / f"looptx-tests-{os.getuid()}")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little tokenised text."""
    from looptx_core.data.corpus import bundled_text
    from looptx_core.data.shard_writer import tokenize_corpus

    folder = tmp_path_factory.mktemp("data")
    text = bundled_text().read_text("utf-8")
    for number in range(8):
        part = text[number * 12_000 : (number + 1) * 12_000]
        (folder / f"{number}.txt").write_text(part, "utf-8")
    tokenize_corpus([str(folder)], folder / "shards", vocab_size=400, val_fraction=0.2)
    return folder / "shards"
