"""All small changes to the kernels, from which ``mutants.py --generate`` draws.

One change at one place inside a ``@triton.jit`` function: an operator, a comparison, a constant, a minimum or maximum,
a cast to int64, a mask. Not in branches that only Nvidia's GPUs take: the tests that judge run on the CPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
_EXTREMES = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "argmin": "argmax",
    "argmax": "argmin",
}
_STRINGS = {"-inf": "inf", "inf": "-inf", "nan": "0"}


@dataclass(frozen=True)
class Mutation:
    """A file with one change. ``old`` and ``new`` are the changed lines, without indentation and line breaks."""

    file: str  # from the repository's root
    line: int
    function: str
    old: str
    new: str
    text: str  # of the whole file, changed

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.old, self.new

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.old}  ->  {self.new}"


class _Source:
    """A file's text, addressed as in ast: lines from 1, columns in bytes."""

    def __init__(self, root: Path, file: str):
        self.file = file
        self.data = (root / file).read_bytes()
        self.tree = ast.parse(self.data)
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def change(self, function: str, start: int, end: int, new: str) -> Mutation:
        changed = self.data[:start] + new.encode() + self.data[end:]
        first = self.data.rfind(b"\n", 0, start) + 1
        last = self.data.find(b"\n", end)
        return Mutation(
            self.file,
            self.data.count(b"\n", 0, first) + 1,
            function,
            _one_line(self.data[first:last]),
            _one_line(changed[first : last + len(changed) - len(self.data)]),
            changed.decode(),
        )


def _one_line(code: bytes) -> str:
    return " ".join(line.split("  #")[0].strip() for line in code.decode().splitlines())


def mutations(root: Path, files: list[str]) -> list[Mutation]:
    """All of these files, in their order."""
    found = []
    for file in files:
        source = _Source(root, file)
        for function in source.tree.body:
            if isinstance(function, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in function.decorator_list
            ):
                for statement in function.body[1:] if ast.get_docstring(function) else function.body:
                    for node in _walk(statement):
                        for start, end, new in _edits(source, node):
                            found.append(source.change(function.name, start, end, new))
    return found


def _walk(statement: ast.AST) -> Iterator[ast.AST]:
    """A statement's nodes, without conditions that name NVIDIA and what they guard."""
    if isinstance(statement, ast.If) and any(
        isinstance(n, ast.Name) and n.id == "NVIDIA" for n in ast.walk(statement.test)
    ):
        children: list[Any] = list(statement.orelse)
    else:
        yield statement
        children = list(ast.iter_child_nodes(statement))
    for child in children:
        yield from _walk(child)


def _edits(source: _Source, node: ast.AST) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of each change to the node itself, not to those inside it."""
    match node:
        case ast.BinOp(left, operator, right):
            yield _swapped(source, operator, source.end(left), source.start(right))
        case ast.AugAssign(target, operator, value):
            yield _swapped(source, operator, source.end(target), source.start(value))
        case ast.Compare(left, operators, comparators):
            for before, comparison, after in zip([left, *comparators], operators, comparators, strict=False):
                yield _swapped(source, comparison, source.end(before), source.start(after))
        case ast.BoolOp(operator, values):
            yield _swapped(source, operator, source.end(values[0]), source.start(values[1]))
        case ast.UnaryOp(operator):
            yield source.start(node), source.start(node) + (3 if isinstance(operator, ast.Not) else 1), ""
        case ast.Constant():
            yield from _other_constant(source, node)
        case ast.Call():
            yield from _other_call(source, node)


def _swapped(source: _Source, operator: ast.AST, start: int, end: int) -> tuple[int, int, str]:
    old, new = _OPERATORS[type(operator)]
    between = source.data[start:end].decode()
    assert between.count(old) >= 1, f"{source.file}: no {old} in {between!r}"
    return start, end, between.replace(old, new, 1)


def _other_constant(source: _Source, node: ast.Constant) -> Iterator[tuple[int, int, str]]:
    start, end = source.start(node), source.end(node)
    match node.value:
        case bool():
            yield start, end, str(not node.value)
        case int():
            yield start, end, hex(node.value + 1) if source.text(node).startswith("0x") else str(node.value + 1)
        case float():
            yield start, end, repr(2.0 * node.value or 1.0)
        case str() if node.value in _STRINGS:
            yield start, end, f'"{_STRINGS[node.value]}"'


def _other_call(source: _Source, node: ast.Call) -> Iterator[tuple[int, int, str]]:
    start, end = source.start(node), source.end(node)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _EXTREMES:
        name = source.end(node.func)
        yield name - len(node.func.attr), name, _EXTREMES[node.func.attr]
    for argument in node.args:
        if ast.unparse(argument) == "tl.int64":
            if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
                yield start, end, source.text(node.func.value)
            else:
                yield source.start(argument), source.end(argument), "tl.int32"
    kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
    if any(keyword.arg == "mask" for keyword in node.keywords):
        yield start, end, ast.unparse(ast.Call(node.func, node.args, kept))
