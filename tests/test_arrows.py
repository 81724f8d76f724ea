"""Imports point down only: rooflama -> models -> loaders -> kernels -> kernels/reference -> NumPy; never in circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "loaders", "models", "rooflama")  # from the lowest to the highest


def module_of(path: Path) -> str:
    """``rooflama.models.config`` of ``models/config.py``; a package's name of its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "rooflama" else ("rooflama", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {module_of(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def imported_modules(module: str) -> set[str]:
    """Absolute names of what a file imports anywhere in it, relative imports resolved."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_files(module: str) -> set[str]:
    """The modules of ours that a file names: ``from rooflama.kernels import rms_norm`` names ``rooflama.kernels``."""
    found = set()
    for name in imported_modules(module):
        known = name if name in FILES else name.rpartition(".")[0]
        if known in FILES:
            found.add(known)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below(room):
    above = [f"rooflama.{other}" for other in ROOMS[ROOMS.index(room) + 1 :] if other != "rooflama"]
    files = [module for module, path in FILES.items() if path.is_relative_to(ROOT / room)]
    assert files
    for module in files:
        for name in imported_modules(module):
            if name.split(".")[0] != "rooflama":
                continue
            assert not name.startswith(tuple(above)), f"{module} imports {name}, which lies above it"
            in_a_room = name.startswith(("rooflama.kernels", "rooflama.loaders", "rooflama.models"))
            assert room == "rooflama" or in_a_room, f"{module} imports {name}, the public face"


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count, and so do those for the type checker alone."""
    try:
        TopologicalSorter({module: imported_files(module) for module in FILES}).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))  # each imports the next
        pytest.fail(f"imports go in a circle: {' -> '.join(circle)}", pytrace=False)


def test_definitions_import_numpy_only():
    for module in (module for module in FILES if module.startswith("rooflama.kernels.reference")):
        foreign = {name for name in imported_modules(module) if not name.startswith("rooflama.kernels.reference")}
        allowed = ("numpy", "__future__", "math", "types", "typing", "collections", "dataclasses", "functools")
        assert not {name for name in foreign if not name.startswith(allowed)}, f"{module} imports {foreign}"
