"""YAML settings, read with the limits of `looptx_core.documents` and the line of each key.

What differs from PyYAML's safe loader: a key may stand once, an anchor may name a single value only
(so that no text of a few bytes unfolds to gigabytes), and a plain word is a number only where it
looks like one today. YAML 1.1 reads 2:1 as 121, 017 as 15 and 2024-01-02 as a date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from looptx_core.documents import MOST_DEPTH, read_text, short
from looptx_core.errors import LooptxError, UsageError

MOST_BYTES = 512 << 10
"""Of a YAML file: PyYAML reads some 100 KB a second."""
_LEVELS = 3  # that settings have, as in model: {audio: {layers: 4}}
Lines = dict[tuple[str, ...], int]
"""The line of each key, by its path from the root."""


def read_yaml(file: Path, error: type[LooptxError] = UsageError) -> tuple[dict[Any, Any], Lines]:
    """The keys and values of a YAML file, and the line of each key of the first levels.

    Raises `error` for a file that cannot be read, breaks a limit or holds no keys.
    """
    if not file.exists():
        raise error(f"{file}: cannot read the configuration (no such file); check the path")
    text = read_text(file, most=MOST_BYTES, mend="correct it", error=error, pipes=True)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(cause, "problem", None) or str(cause).splitlines()[0]
        raise error(f"{file}{line}: not valid YAML ({problem}); correct it") from cause
    except (ValueError, RecursionError) as cause:  # a whole number of thousands of digits
        raise error(f"{file}: not valid YAML ({short(str(cause))}); correct it") from cause
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(tree, dict | None):
        raise error(f"{file}: expected keys and values, as in 'lr: 0.001'")
    return tree or {}, _lines(node)


class _Loader(yaml.SafeLoader):
    """The safe loader with the limits above."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        self.depth += 1
        if self.depth > MOST_DEPTH:
            problem = f"nested more than {MOST_DEPTH} levels deep"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            problem = f"*{event.anchor} repeats a list or a mapping; write it out"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key '{short(key.value)}' stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's, by first character, with numbers as JSON and YAML 1.2 have them, and no dates."""
    replaced = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
    return {
        first: [pair for pair in pairs if pair[0] not in replaced]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"""[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?
               |[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$""", re.VERBOSE),
    list("-+0123456789."),
)  # fmt: skip


def _lines(node: Any) -> Lines:
    found: Lines = {}

    def note(node: Any, *above: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                here = (*above, str(key.value))
                found[here] = key.start_mark.line + 1
                if len(here) < _LEVELS:
                    note(value, *here)

    note(node)
    return found
