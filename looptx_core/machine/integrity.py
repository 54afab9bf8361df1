"""Digests of large files: a flipped bit is found before anything is made of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from looptx_core.atomic import replacing, write_file
from looptx_core.documents import COPY_AGAIN, open_input, read_json, short
from looptx_core.errors import DataError, LooptxError
from looptx_core.machine.scratch import cache_folder

FILE = "digests.json"
SUFFIX = ".sha256"
"""Of the file beside a checkpoint's that holds its digest, in the form of sha256sum."""
_PATTERN = "*.safetensors"
_SETTLED = 2.0  # seconds; a file that changed just now may change again within its time stamp


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open_input(file, pipes=False) as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def check_digest(file: Path, expected: str, mend: str = COPY_AGAIN) -> None:
    """Raise `DataError` for a file whose bytes are not those of a SHA-256.

    A file is read once: that it was right is remembered in the user's cache, for as long as its
    size, its times and its place on the disk stay the same.
    """
    facts = file.stat()
    known = {"sha256": expected, "size": facts.st_size, "modified": facts.st_mtime_ns,
             "changed": facts.st_ctime_ns, "inode": facts.st_ino}  # fmt: skip
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    memory = cache_folder() / "verified" / f"{name}.json"
    with contextlib.suppress(DataError):
        if read_json(memory) == known:
            return
    if sha256_of(file) != expected:
        raise DataError(f"{file}: its hash is wrong, so it changed since it was written; {mend}")
    if time.time() - max(facts.st_mtime, facts.st_ctime) < _SETTLED:
        return
    with contextlib.suppress(LooptxError):  # a cache that can't be written costs time alone
        write_file(memory, json.dumps(known), parents=True)


def digest_file(file: Path) -> Path:
    """Where the digest of a single file is kept."""
    return file.with_name(file.name + SUFFIX)


def note_digest(file: Path, digest: str | None = None) -> None:
    """Write a file's digest beside it, whole or not at all. Raises `OSError`.

    digest: where it is known already.
    """
    with replacing(digest_file(file)) as temporary:
        temporary.write_text(f"{digest or sha256_of(file)}  {file.name}\n", "utf-8")


def check_noted(file: Path, mend: str = COPY_AGAIN) -> bool:
    """Whether a file has a digest beside it. Raises `DataError` where the two don't agree."""
    place = digest_file(file)
    try:
        noted = place.read_bytes()[:64].decode("ascii", "replace")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror}); {mend}") from error
    check_digest(file, noted, mend)
    return True


def write_digests(folder: Path) -> None:
    """Note the digests of the weights in a folder, those of its folders included."""
    found = {str(file.relative_to(folder)): sha256_of(file) for file in folder.rglob(_PATTERN)}
    text = json.dumps({"sha256": dict(sorted(found.items()))}, indent=2) + "\n"
    (folder / FILE).write_text(text, "utf-8")


def has_digests(folder: Path) -> bool:
    """Whether a folder notes the digests of its weights."""
    return (folder / FILE).is_file()


def check_folder(folder: Path) -> None:
    """Raise `DataError` for weights that are not those that a folder was written with.

    A folder without a note of its digests, such as other tools', is not checked.
    """
    if not has_digests(folder):
        return
    noted = read_json(folder / FILE).get("sha256")
    if not isinstance(noted, dict):
        raise DataError(f"{folder / FILE}: sha256 must name files; {COPY_AGAIN}")
    for file in sorted(folder.rglob(_PATTERN)):
        name = str(file.relative_to(folder))
        if name in noted:
            check_digest(file, noted[name])
        else:
            raise DataError(f"{folder / FILE}: lacks {short(name)}; {COPY_AGAIN}")
