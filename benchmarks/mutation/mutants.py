"""One-line mutants of a source file: small changes that a good test notices.

Python is mutated by its syntax tree, so that strings, annotations and messages stay as they are;
C++ by its words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
_OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|"), ast.Pow: ("**", "*"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmax": "argmin",
          "argmin": "argmax", "sum": "mean", "mean": "sum", "any": "all", "all": "any",
          "zeros_": "ones_", "ones_": "zeros_"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of the text from `start` to `end` (offsets) of one file."""

    file: str
    start: int
    end: int
    new: str
    line: int
    shown: str
    """The line before and after, for people."""

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the text."""
    text = (root / file).read_text("utf-8")
    changes = _of_python(text) if file.endswith(".py") else _of_cpp(text)
    return [_made(file, text, *change) for change in sorted(set(changes))]


def one_mutant(root: Path, file: str, old: str, new: str) -> Mutant:
    """The change of one passage, which must be there once. Raises `ValueError`."""
    text = (root / file).read_text("utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file}: '{old}' is there {text.count(old)} times, not once")
    start = text.index(old)
    return _made(file, text, start, start + len(old), new)


def _made(file: str, text: str, start: int, end: int, new: str) -> Mutant:
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    last = len(text) if last < 0 else last
    after = text[first:start] + new + text[end:last]
    shown = f"- {text[first:last].strip()}\n+ {after.strip()}"
    return Mutant(file, start, end, new, text.count("\n", 0, start) + 1, shown)


Change = tuple[int, int, str]


def _of_python(text: str) -> Iterator[Change]:
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    lines = text.splitlines()

    def at(line: int, column: int) -> int:  # ast counts columns in bytes
        return offsets[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Change]:
        low, high = span(left)[1], span(right)[0]
        gap = text[low:high]
        if "\n" not in gap.strip() and gap.count(old) == 1:
            start = low + gap.index(old)
            yield start, start + len(old), new

    for node in _worth(ast.parse(text)):
        match node:
            case ast.Constant(value=bool(value)):
                yield (*span(node), str(not value))
            case ast.Constant(value=int(value)):
                yield (*span(node), str(value + 1))
            case ast.Constant(value=float(value)):
                yield (*span(node), repr(value * 0.5) if value else "1.0")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                yield from between(left, right, *_OPERATORS[type(op)])
            case ast.BoolOp(op=op, values=[left, right, *_]):
                yield from between(left, right, *_OPERATORS[type(op)])
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from between(left, right, *_COMPARISONS[type(op)])
            case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
                start = span(node)[0]
                yield start, start + (3 if text.startswith("not", start) else 1), ""
            case ast.IfExp(test=test) | ast.If(test=test) if test.lineno == test.end_lineno:
                start, end = span(test)
                yield start, end, f"(not ({text[start:end]}))"
            case ast.Attribute(attr=name) if name in _NAMES:
                end = span(node)[1]
                yield end - len(name), end, _NAMES[name]
            case ast.Call(func=ast.Name(id=name) as called) if name in _NAMES:
                yield (*span(called), _NAMES[name])


def _worth(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that compute: no annotations, messages, imports or assertions."""
    if isinstance(tree, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    yield tree
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _worth(child)


_CPP = (
    (r"(?<![\w.])(\d+\.\d*(?:e-?\d+)?)f?\b(?!f)", lambda m: f"({m[0]} * 0.5f)"),
    (r" < ", lambda m: " <= "),
    (r" <= ", lambda m: " < "),
    (r" > ", lambda m: " >= "),
    (r" >= ", lambda m: " > "),
    (r" \+ ", lambda m: " - "),
    (r" - ", lambda m: " + "),
    (r" \* ", lambda m: " / "),
    (r" \+= ", lambda m: " -= "),
    (r"std::min\b", lambda m: "std::max"),
    (r"std::max\b", lambda m: "std::min"),
    (r" && ", lambda m: " || "),
    (r" \|\| ", lambda m: " && "),
)


def _of_cpp(text: str) -> Iterator[Change]:
    offset = 0
    for line in text.splitlines(keepends=True):
        code = line.split("//")[0]
        if not code.lstrip().startswith(("#", "template")):
            for pattern, new in _CPP:
                for found in re.finditer(pattern, code):
                    yield offset + found.start(), offset + found.end(), new(found)
        offset += len(line)
