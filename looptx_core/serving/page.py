"""The page at the address: a model to try, with the loops and the confidence of each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from looptx_core.inspection.browser import STYLE


def page(facts: dict[str, Any]) -> str:
    """The page's text. facts: the model's entry in `/v1/models`."""
    text = Path(__file__).with_name("page.html").read_text("utf-8")
    shown = json.dumps(facts).replace("<", "\\u003c")
    return text.replace("/*STYLE*/", STYLE).replace("/*FACTS*/", shown)
