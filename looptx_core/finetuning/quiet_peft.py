"""PEFT without bitsandbytes, which takes seconds to import and which only quantised bases need."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "bitsandbytes"


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within this, PEFT finds no bitsandbytes, unless a quantised base has loaded it already."""
    if sys.modules.get(_NAME) is not None:
        yield
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]
    _look_again()
    try:
        yield
    finally:
        del sys.modules[_NAME]
        _look_again()


def load_bitsandbytes() -> Any:
    """The package, which PEFT finds from then on.

    Its warnings are left out: on a CPU one of them tells at each start of an optional package, and
    another tells in each forward pass that int8 products take float16.
    """
    logging.getLogger(_NAME).setLevel(logging.ERROR)
    import bitsandbytes

    _look_again()
    return bitsandbytes


def _look_again() -> None:
    """PEFT remembers whether it found the package."""
    found: ModuleType | None = sys.modules.get("peft.import_utils")
    if found is not None:
        found.is_bnb_available.cache_clear()
        found.is_bnb_4bit_available.cache_clear()
