"""Imports point down only: rooflama -> models -> loaders -> kernels -> kernels/reference -> NumPy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "loaders", "models", "rooflama")  # from the lowest to the highest


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, relative imports resolved."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    package = package if path.is_relative_to(ROOT / "rooflama") else f"rooflama.{package}"
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


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below(room):
    above = [f"rooflama.{other}" for other in ROOMS[ROOMS.index(room) + 1 :] if other != "rooflama"]
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.split(".")[0] != "rooflama":
                continue
            assert not name.startswith(tuple(above)), f"{path.relative_to(ROOT)} imports {name}, which lies above it"
            in_a_room = name.startswith(("rooflama.kernels", "rooflama.loaders", "rooflama.models"))
            assert room == "rooflama" or in_a_room, f"{path.relative_to(ROOT)} imports {name}, the public face"


def test_definitions_import_numpy_only():
    for path in sorted((ROOT / "kernels/reference").glob("*.py")):
        foreign = {name for name in imported_modules(path) if not name.startswith("rooflama.kernels.reference")}
        allowed = ("numpy", "__future__", "math", "types", "typing", "collections", "dataclasses", "functools")
        assert not {name for name in foreign if not name.startswith(allowed)}, f"{path.name} imports {foreign}"
