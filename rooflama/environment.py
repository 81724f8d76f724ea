"""What a bug report needs to know of the machine: versions, devices, the backend and why."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import NamedTuple

import torch
from rich.table import Table

from rooflama.kernels import INTERPRETED
from rooflama.kernels.facts import fact_table

PACKAGES = (
    "rooflama",
    "torch",
    "triton",
    "numpy",
    "gguf",
    "tokenizers",
    "sentencepiece",
    "protobuf",
    "jinja2",
    "huggingface_hub",
    "transformers",
)


class Variable(NamedTuple):
    """One line of the table of environment variables: names that belong together, and their effect in Markdown."""

    names: tuple[str, ...]
    effect: str


# Those that rooflama reads, and those of its dependencies that its users need.
VARIABLES = (
    Variable(("ROOFLAMA_DEBUG",), "`1` reports device memory that was never closed, with the line that allocated it"),
    Variable(
        ("TRITON_INTERPRET",),
        "`1` runs CPU tensors through the Triton kernels in Triton's interpreter instead of the NumPy definitions; "
        "read at import",
    ),
    Variable(
        ("TRITON_CACHE_DIR",),
        "the folder of compiled kernels, `~/.triton/cache` by default "
        "([LOADING_EXAMPLES.md](LOADING_EXAMPLES.md#the-first-answer-of-a-process))",
    ),
    Variable(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "the GPUs that the driver shows"),
    Variable(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"),
        "set by torchrun: the ranks that share a model ([TENSOR_PARALLEL.md](TENSOR_PARALLEL.md))",
    ),
    Variable(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "CPU threads of torch and NumPy"),
    Variable(
        ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
        "cache, access and address of the Hub, as huggingface_hub reads them",
    ),
    Variable(("COLUMNS", "NO_COLOR", "PYTHONIOENCODING"), "width, colours and encoding of what the commands print"),
    Variable(
        ("HYPOTHESIS_PROFILE",),
        "number of cases that the tests draw: `dev`, `smoke`, `ci`, `deep` ([CONTRIBUTING.md](../CONTRIBUTING.md))",
    ),
)


def facts() -> list[tuple[str, str]]:
    """(label, value) pairs."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} multiprocessors, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
            )
        )
    rows.append(("backend", _backend()))
    return rows


def _backend() -> str:
    if torch.cuda.is_available():
        return "compiled Triton kernels for tensors on the GPU, since torch sees one"
    if INTERPRETED:
        return "Triton's interpreter for CPU tensors, since TRITON_INTERPRET=1 (slow; for checking kernels)"
    return "NumPy definitions, since torch sees no GPU and TRITON_INTERPRET is not set"


def environment() -> Table:
    """``facts`` as a table."""
    return fact_table(facts())
