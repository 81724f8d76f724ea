"""rooflama: Llama-family models on Triton kernels, each held to a NumPy definition.

import rooflama

with rooflama.load("model.gguf") as model:
    print(model.chat([{"role": "user", "content": "Why is the sky blue?"}]).text)
"""

from importlib.metadata import PackageNotFoundError, version

from rooflama.kernels import KernelInputError, RooflamaError
from rooflama.models import ConfigError, MemoryPlan

from .check import Report, check
from .loading import demo_checkpoint, load, load_tokenizer
from .model import Model
from .planning import plan_memory
from .results import Generation
from .summary import Summary, inspect

try:
    __version__ = version("rooflama")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "ConfigError",
    "Generation",
    "KernelInputError",
    "MemoryPlan",
    "Model",
    "Report",
    "RooflamaError",
    "Summary",
    "check",
    "demo_checkpoint",
    "inspect",
    "load",
    "load_tokenizer",
    "plan_memory",
]
