"""A kernel on one page: formula, signature, definition, tested laws, compiled resources and measured speed.

The sources are docstrings, the definition's code, the tests, and the two committed tables. A wheel has neither tests
nor tables; it contains ``docs/kernels/tables.json``, which holds their part.
"""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown

from rooflama import kernels
from rooflama.kernels import KernelInputError
from rooflama.kernels.kernel import Kernel

from .json_text import json_text

ROOT = Path(__file__).resolve().parent.parent
COMPILE_MATRIX = ROOT / "docs" / "compile_matrix.csv"
MEASUREMENTS = ROOT / "benchmarks" / "results" / "kernels.csv"
SHIPPED = Path(__file__).resolve().parent / "kernel_pages" / "tables.json"  # docs/kernels of the repository


def _cards() -> dict[str, dict[str, Kernel]]:
    """One card per kernel: name -> its functions, of kernels/NAME.py and, where that is long, of kernels/NAME_*.py."""
    cards: dict[str, dict[str, Kernel]] = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"rooflama.kernels.{info.name}")
        found = (value for value in vars(module).values() if isinstance(value, Kernel))
        if own := {kernel.name: kernel for kernel in found if kernel.__module__ == module.__name__}:
            card = next((name for name in cards if info.name.startswith(f"{name}_")), info.name)
            cards.setdefault(card, {}).update(own)
    return cards


CARDS = _cards()

ROOFLINE = """Of roofline: the least time divided by the time taken. The least time is bytes over the memory rate, or
operations over the matrix rate if that is longer; both rates were measured in the same run. Why a kernel may exceed
100% is in `benchmarks/results/README.md`."""


@dataclass(frozen=True)
class KernelCard:
    """One kernel of ``rooflama.kernels``. Shows itself in a terminal and in Jupyter."""

    name: str

    def markdown(self) -> str:
        """The card as Markdown, which is also what ``docs/kernels/`` holds."""
        parts = [f"# {self.name}", *map(_docstring, self._modules())]
        for name, kernel in CARDS[self.name].items():
            parts += [f"## {name}", f"    {name}{_signature(kernel)}", _docstring(kernel), _replacement(kernel)]
            parts += ["### Definition", f"```python\n{_definition(kernel.definition)}\n```"]
        tables = self.tables()
        laws = [f"- {law['law']}" + (f": {law['says']}" if law["says"] else "") for law in tables["laws"]]
        parts += ["## Laws tested", "\n".join(laws)]
        parts += ["## What it compiles to", _table(tables["compiled"]) or "Not in the compile matrix."]
        measured = _table(tables["measured"])
        parts += ["## Measured", *((ROOFLINE, measured) if measured else ("No committed measurement.",))]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The card's parts, for JSON."""
        return {
            "kernel": self.name,
            "about": [_docstring(module) for module in self._modules()],
            "functions": [
                {
                    "name": name,
                    "signature": _signature(kernel),
                    "about": _docstring(kernel),
                    "definition": _definition(kernel.definition),
                }
                for name, kernel in CARDS[self.name].items()
            ],
            **self.tables(),
        }

    def _modules(self) -> list[ModuleType]:
        names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
        own = [name for name in names if name == self.name or name.startswith(f"{self.name}_")]
        return [importlib.import_module(f"rooflama.kernels.{name}") for name in own]

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """Laws tested, what it compiles to, measured: gathered in the repository, else as the wheel carries them."""
        if not COMPILE_MATRIX.exists():
            return json.loads(SHIPPED.read_text(encoding="utf-8"))[self.name]
        return {
            "laws": list(self._laws()),
            "compiled": list(self._compiled()),
            "measured": list(self._measured()),
        }

    def _laws(self) -> Iterator[dict[str, str]]:
        """Each test's name in words, with the first line of its docstring."""
        folder = ROOT / "tests" / "kernels"
        for path in sorted([*folder.glob(f"test_{self.name}.py"), *folder.glob(f"test_{self.name}_*.py")]):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    words = node.name.removeprefix("test_").replace("_", " ")
                    text = (ast.get_docstring(node) or "").split("\n")[0]
                    yield {"law": words, "says": text}

    def _compiled(self) -> Iterator[dict[str, str]]:
        """For each kernel of these files and target: the most registers, spills and shared memory over all shapes."""
        sources = "\n".join(map(inspect.getsource, self._modules()))
        launched = set(re.findall(r"^def (_\w+_kernel)\(", sources, flags=re.MULTILINE))
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in _rows(COMPILE_MATRIX):
            if row["kernel"].split(".")[-1] in launched:
                groups.setdefault((row["kernel"].split(".")[-1], row["target"]), []).append(row)
        for (kernel, target), rows in groups.items():
            most = {key: max(int(row[key] or 0) for row in rows) for key in ("registers", "spills", "shared_bytes")}
            instructions = sorted({row["matrix_instruction"] or "none" for row in rows})
            yield {
                "kernel": f"`{kernel}`",
                "target": target,
                "shapes": str(len(rows)),
                "registers <=": str(most["registers"]),
                "spills <=": str(most["spills"]),
                "shared bytes <=": str(most["shared_bytes"]),
                "matrix instruction": ", ".join(instructions),
            }

    def _measured(self) -> Iterator[dict[str, str]]:
        for row in _rows(MEASUREMENTS):
            if row["kernel"] == self.name:
                yield {
                    "case": row["case"],
                    "implementation": row["implementation"],
                    "us": row["us_p50"],
                    "GB/s": row["gb_per_s"],
                    "TFLOP/s": row["tflop_per_s"],
                    "of roofline": f"{float(row['of_roofline']):.0%}",
                    "on": f"{row['gpu']}, torch {row['torch']}, Triton {row['triton']}, {row['commit']}, {row['date']}",
                }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Markdown(self.markdown())

    def _repr_markdown_(self) -> str:
        return self.markdown()


def kernel_card(name: str) -> KernelCard:
    """The card of a kernel, or of the kernel that a public function is of. Raises KernelInputError if there is none."""
    for card, functions in CARDS.items():
        if name == card or name in functions:
            return KernelCard(card)
    raise KernelInputError(f"kernel {name!r}", rule=f"the kernels are {', '.join(CARDS)}", remedy="Name one of these")


def _signature(kernel: Kernel) -> str:
    return re.sub(r"'|torch\.(?=Tensor)|rooflama\.[\w.]*\.", "", str(inspect.signature(kernel)))


def _replacement(kernel: Kernel) -> str:
    """What a function that ``rooflama.swap`` puts in place of a kernel must do."""
    written = ", ".join(f"`{argument}`" for argument in kernel.mutates)
    has_result = inspect.signature(kernel).return_annotation is not None
    returned = "tensors of the same shapes, dtypes and device" if has_result else "nothing"
    return (
        f"`rooflama.swap({kernel.name}=f)` calls `f` instead, with the arguments of the call. `f` must have this "
        f"signature{f', write {written},' if written else ''} and return {returned}."
    )


def _docstring(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def _definition(function: Callable) -> str:
    """The source of a definition, and of the functions in its module that it calls."""
    found = [function]
    for one in found:
        called = (vars(inspect.getmodule(one)).get(name) for name in one.__code__.co_names)
        found += [f for f in called if inspect.isfunction(f) and f.__module__ == one.__module__ and f not in found]
    return "\n\n\n".join(inspect.getsource(one).strip() for one in found)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _table(rows: list[dict[str, str]]) -> str:
    lines: list[str] = []
    for row in rows:
        if not lines:
            lines = ["| " + " | ".join(row) + " |", "|" + "--|" * len(row)]
        lines.append("| " + " | ".join(row.values()) + " |")
    return "\n".join(lines)


def shipped_tables() -> str:
    """The tables of every card as JSON, which a wheel carries in place of tests and benchmarks."""
    return json_text({name: KernelCard(name).tables() for name in CARDS}, indent=1) + "\n"


def write_pages() -> None:
    """Write every card to ``docs/kernels/`` of the repository."""
    folder = ROOT / "docs" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    for name in CARDS:
        (folder / f"{name}.md").write_text(KernelCard(name).markdown(), encoding="utf-8")
    (folder / SHIPPED.name).write_text(shipped_tables(), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
