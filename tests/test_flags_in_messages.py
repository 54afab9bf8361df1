"""A message names flags of the command that prints it, or says whose flag it is.

The library names parameters, which the command line spells as flags of the running command alone,
so what is looked at are the texts of the command line, and whole commands in the library's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from looptx_cli.main import COMMANDS, load_command

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OF_ALL = {"--help", "--debug", "--version"}

# The commands that print what these modules say; a command's own module is that command's.
PRINTED_BY = {
    "looptx_cli/conversation.py": ("generate", "chat"),
    "looptx_cli/drawing.py": ("generate",),
    "looptx_cli/model_options.py": ("generate", "chat"),
    "looptx_cli/options.py": ("train",),  # --set
    "looptx_cli/speaking.py": ("generate",),
    "looptx_cli/targets.py": ("generate",),
    "looptx_cli/runs.py": ("train", "finetune"),
    "looptx_cli/streaming.py": ("generate",),
}
# Tables of spellings, with tests of their own.
NO_MESSAGES = {"looptx_cli/synonyms.py", "looptx_cli/panels.py"}
# Parts that are put together to a command's line elsewhere.
PARTS = {("looptx_cli/finetune.py", "--adapter"): "generate"}


class Named(NamedTuple):
    """A flag in a text of the code, and the command that the text says it is of, if any."""

    module: str
    line: int
    flag: str
    command: str | None

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.flag}"


def named(text: str) -> Iterator[tuple[str, str | None]]:
    """The flags in a text, each with the command whose line it stands in."""
    for clause in re.split(r"[;\n]|, or | \(", text):
        command = None
        for found in re.finditer(rf"looptx ([a-z-]+)|pip install|{FLAG.pattern}", clause):
            if found[0].startswith("--"):
                if command != "pip":
                    yield found[0], command
            else:
                command = found[1] or "pip"


def flags_in(folder: str) -> list[Named]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in _texts(tree, docs):
            found += [Named(module, node.lineno, *each) for each in named(_text(node))]
    return found


def _texts(tree: ast.AST, docs: set[int]) -> Iterator[ast.expr]:
    """The texts that are no docstrings; of an f-string the whole, and those in its values."""
    for child in ast.iter_child_nodes(tree):
        if id(child) in docs:
            continue
        if isinstance(child, ast.Constant | ast.JoinedStr):
            yield child
        if not isinstance(child, ast.JoinedStr):
            yield from _texts(child, docs)
        for part in child.values if isinstance(child, ast.JoinedStr) else ():
            if not isinstance(part, ast.Constant):
                yield from _texts(part, docs)


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
    return ""


@cache
def flags_of(command: str) -> set[str]:
    return {flag for p in load_command(command).params for flag in (*p.opts, *p.secondary_opts)}


@cache
def own_modules() -> dict[str, str]:
    """The command of each module that is one."""
    names = {f"{name.replace('-', '_')}.py": name for name in COMMANDS}
    return {f"looptx_cli/{file}": name for file, name in names.items()} | {
        "looptx_cli/list_runs.py": "runs"
    }


def printers(module: str) -> tuple[str, ...]:
    if module in PRINTED_BY:
        return PRINTED_BY[module]
    return (own_modules()[module],) if module in own_modules() else ()


OF_THE_COMMAND_LINE = [each for each in flags_in("looptx_cli") if each.module not in NO_MESSAGES]
OF_THE_LIBRARY = [each for each in flags_in("looptx_core") if each.command in COMMANDS]


@pytest.mark.parametrize("each", OF_THE_COMMAND_LINE, ids=str)
def test_a_flag_is_one_of_the_command_that_prints_it(each: Named) -> None:
    owner = each.command or PARTS.get((each.module, each.flag))
    for command in [owner] if owner else printers(each.module):
        assert each.flag in flags_of(command) | OF_ALL
    assert owner or printers(each.module) or each.flag in OF_ALL, "name the module in PRINTED_BY"


@pytest.mark.parametrize("each", OF_THE_LIBRARY, ids=str)
def test_a_whole_command_can_be_typed(each: Named) -> None:
    assert each.command and each.flag in flags_of(each.command) | OF_ALL


def test_whose_flag_a_text_means() -> None:
    text = "run it by looptx generate --adapter A --chat, or give --model; pip install x --pre"
    assert list(named(text)) == [
        ("--adapter", "generate"), ("--chat", "generate"), ("--model", None),
    ]  # fmt: skip
    assert "--vocab-size" in flags_of("tokenize") - flags_of("train")
    assert len(OF_THE_COMMAND_LINE) > 40 and len(OF_THE_LIBRARY) > 5
