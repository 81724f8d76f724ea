"""rooflama: Llama-family models on Triton kernels, each held to a NumPy definition.

import rooflama

with rooflama.load("model.gguf") as model:
    print(model.chat([{"role": "user", "content": "Why is the sky blue?"}]).text)

Names are imported when they are first used, because torch takes seconds to import and ``rooflama --help`` needs none.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("rooflama")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "ArgumentError",
    "Comparison",
    "ConfigError",
    "Engine",
    "Generation",
    "KernelInputError",
    "MemoryPlan",
    "Model",
    "ModelClosed",
    "Report",
    "RooflamaError",
    "Summary",
    "Trace",
    "Warmed",
    "attention",
    "check",
    "compare",
    "demo_checkpoint",
    "inspect",
    "load",
    "load_tokenizer",
    "plan_memory",
    "swap",
    "trace",
    "warm",
]

if TYPE_CHECKING:
    from rooflama import integrations as integrations
    from rooflama import kernels as kernels
    from rooflama import loaders as loaders
    from rooflama import models as models
    from rooflama import testing as testing
    from rooflama.kernels import KernelInputError, RooflamaError, swap
    from rooflama.models import ArgumentError, ConfigError, MemoryPlan, ModelClosed

    from .attending import attention
    from .checks.checklist import Report, check
    from .comparing import compare
    from .comparison import Comparison
    from .engine import Engine
    from .loading import demo_checkpoint, load, load_tokenizer
    from .model import Model
    from .planning import plan_memory
    from .results import Generation
    from .summary import Summary, inspect
    from .tracing import Trace, trace
    from .warming import Warmed, warm
else:
    _ROOMS = ("kernels", "loaders", "models")  # folders beside this one in a clone
    _PACKAGES = (*_ROOMS, "integrations", "testing")
    _NAMES = {
        "kernels": ("KernelInputError", "RooflamaError", "swap"),
        "models": ("ArgumentError", "ConfigError", "MemoryPlan", "ModelClosed"),
        "attending": ("attention",),
        "checks.checklist": ("Report", "check"),
        "engine": ("Engine",),
        "comparing": ("compare",),
        "comparison": ("Comparison",),
        "loading": ("demo_checkpoint", "load", "load_tokenizer"),
        "model": ("Model",),
        "planning": ("plan_memory",),
        "results": ("Generation",),
        "summary": ("Summary", "inspect"),
        "tracing": ("Trace", "trace"),
        "warming": ("Warmed", "warm"),
    }
    _HOMES = {name: home for home, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return import_module(f"rooflama.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'rooflama' has no attribute {name!r}")
        value = getattr(import_module(f"rooflama.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_PACKAGES, *__all__})
