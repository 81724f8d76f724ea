"""The bugs that ``tests/mutants.py`` plants: one file per file of ``kernels/``, of its name.

Each entry of its ``MUTANTS`` is (name, old text, new text, tests). The name is "group: what is wrong". The old text is
in the kernel's file exactly once. The tests, a file or one test, must fail when the new text replaces it. An entry of
``DEFINITION_MUTANTS`` changes the kernel's definition in ``kernels/reference`` instead.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug: in ``file``, ``old`` becomes ``new``; ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


_MODULES = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}

MUTANTS = [
    Mutant(name, f"{folder}/{kernel}.py", old, new, tests)
    for kernel, module in _MODULES.items()
    for folder, entries in (("kernels", "MUTANTS"), ("kernels/reference", "DEFINITION_MUTANTS"))
    for name, old, new, tests in getattr(module, entries, ())
]
