"""What a command does around its large imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Within, Python doesn't look for garbage, and afterwards not among what is there.

    What torch's import makes stays: to look through it, again and again while it grows and once
    more at the process's end, takes a quarter of a short command's time.
    """
    wanted, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else only a caller's own garbage would be kept
            gc.freeze()
        if wanted:
            gc.enable()
