"""Peak memory and time of tokenisation on hard input, and bytes per token beside GPT-2's.

    python -m benchmarks.tokenizing.run [--words-mb 1000] [--line-mb 200]

Memory is that of the process that tokenises.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common.corpora import fetch_sotu, gpt2_tokenizer
from benchmarks.common.record import write
from looptx_core.data.corpus import bundled_text, documents
from looptx_core.data.tokenizer import train_tokenizer

VOCAB = 4096
CHILD = """
import sys
from looptx_core.data.shard_writer import tokenize_corpus
manifest = tokenize_corpus([sys.argv[1]], sys.argv[2])
print(manifest.bytes, manifest.tokens)
"""


def write_words(file: Path, size: int) -> None:
    """Random words of 10 letters, nearly all different, 12 a line; `size` in bytes."""
    rng = random.Random(0)
    letters = bytes(97 + i % 26 for i in range(256))
    with file.open("wb") as out:
        written = 0
        while written < size:
            noise = rng.randbytes(1 << 20).translate(letters)
            words = [noise[i : i + 10] for i in range(0, len(noise), 10)]
            lines = (b" ".join(words[i : i + 12]) for i in range(0, len(words), 12))
            written += out.write(b"\n".join(lines) + b"\n")


def write_line(file: Path, size: int, space: bool) -> None:
    """One line: the bundled text over and over, or letters without a single space."""
    text = bundled_text().read_bytes().replace(b"\n", b" ")
    if not space:
        text = text.replace(b" ", b"")
    with file.open("wb") as out:
        for _ in range(size // len(text) + 1):
            out.write(text)


def measure(name: str, file: Path) -> dict[str, float | str]:
    """Tokenise in a process of its own; MB are 10^6 bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=file.parent) as out:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(file), f"{out}/shards"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)  # this child's peak, not all children's
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{name}: the tokenisation failed")
    size, tokens = map(int, output.split())
    row: dict[str, float | str] = {
        "input": name,
        "megabytes": round(size / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_megabytes": round(usage.ru_maxrss * 1024 / 1e6),
        "bytes_per_token": round(size / tokens, 3),
    }
    print(row, flush=True)
    return row


def compare(name: str, path: Path) -> dict[str, float | str]:
    """Bytes per token of text, end tokens left out, of our vocabulary learnt on it and GPT-2's."""
    texts = ["".join(document.pieces) for document in documents([path])]
    size = sum(len(text.encode()) for text in texts)
    row: dict[str, float | str] = {"text": name, "megabytes": round(size / 1e6, 2)}
    tokenizers = (("looptx", train_tokenizer(texts, VOCAB)), ("gpt2", gpt2_tokenizer()))
    for label, tokenizer in tokenizers:
        tokens = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts))
        row[f"{label}_bytes_per_token"] = round(size / tokens, 3)
        row[f"{label}_vocab_size"] = tokenizer.get_vocab_size()
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words-mb", type=int, default=1000)
    parser.add_argument("--line-mb", type=int, default=200)
    args = parser.parse_args()
    measured = []  # first, while this process is small: a child's peak includes the fork
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "corpus.txt"
        write_line(file, args.line_mb * 10**6, space=True)
        measured.append(measure("one line of words", file))
        write_line(file, args.line_mb * 10**6, space=False)
        measured.append(measure("one line without a space", file))
        write_words(file, args.words_mb * 10**6)
        measured.append(measure("mostly unique words", file))
    compared = [compare("Moby Dick", bundled_text()), compare("State of the Union", fetch_sotu())]
    parts = {"memory": measured, "bytes a token": compared}
    rows = [{"part": part, **row} for part, found in parts.items() for row in found]
    settings = {"threads": os.environ.get("RAYON_NUM_THREADS", "all"), "vocab_size": VOCAB}
    write("tokenizing.run", __doc__.splitlines()[0], rows, settings=settings)


if __name__ == "__main__":
    main()
