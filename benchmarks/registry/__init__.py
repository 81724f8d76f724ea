"""One file per kernel, of the kernel's name: what is measured of it, and its calls at the shapes of real models.

``measured()`` yields the cases that ``benchmarks/run.py`` times. ``calls(model, everything)`` yields the calls that
running ``model`` makes, which ``benchmarks/compile_matrix.py`` compiles; with ``everything``, calls with rarer options
too. Adding a file here adds it to both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from cases import Case
from model_calls import EVERYTHING, MODELS, Call

_MODULES = {info.name: importlib.import_module(f"registry.{info.name}") for info in pkgutil.iter_modules(__path__)}

MEASURED: dict[str, Callable[[], Iterator[Case]]] = {name: module.measured for name, module in _MODULES.items()}


def calls(names: list[str]) -> Iterator[tuple[str, Call]]:
    """(model, call) for each call that the named models, or all of them, make."""
    for name, model in MODELS.items():
        if not names or name in names:
            for module in _MODULES.values():
                for call in module.calls(model, name == EVERYTHING):
                    yield name, call
