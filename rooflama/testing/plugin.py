"""A pytest plugin for tests of kernels: ``pytest_plugins = ["rooflama.testing.plugin"]`` in a conftest.py.

Without a GPU, kernels run in Triton's interpreter, with an order of sums and a watch over memory (interpreter.py). New
memory is full of NaN or of the largest integer, so that an element that a kernel leaves unwritten is seen. Tests marked
``gpu`` are skipped where there is none.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before a kernel is decorated, when Triton reads it
    os.environ["TRITON_INTERPRET"] = "1"

from .interpreter import use_ordered_dot, watch_memory

use_ordered_dot()
watch_memory()

torch.set_deterministic_debug_mode("warn")  # the same as use_deterministic_algorithms, which imports inductor
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # defined by assignment
torch.backends.cuda.matmul.allow_tf32 = False


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or HIP device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device"))


@pytest.fixture
def numpy_backend():
    """Run the kernels' NumPy definitions, as on a machine without a GPU."""
    from rooflama.kernels import use_backend

    with use_backend("numpy"):
        yield
