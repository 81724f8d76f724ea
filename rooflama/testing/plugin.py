"""A pytest plugin for tests of kernels: ``pytest_plugins = ["rooflama.testing.plugin"]`` in a conftest.py.

Without a GPU, kernels run in Triton's interpreter, with an order of sums and a watch over memory (interpreter.py). New
memory is full of NaN or of the largest integer, so that an element that a kernel leaves unwritten is seen. Tests marked
``gpu`` are skipped where there is none.

HYPOTHESIS_PROFILE chooses how many cases are drawn: ``dev`` (10, the default), ``smoke`` (1), ``ci`` (20, the same each
time) or ``deep`` (20, others each time). ``pytest --triton-sanitizer MODE`` compiles kernels with Triton's sanitizer.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():  # before a kernel is decorated, when Triton reads it
    os.environ["TRITON_INTERPRET"] = "1"

from .interpreter import use_ordered_dot, watch_memory

use_ordered_dot()
watch_memory()

torch.set_deterministic_debug_mode("warn")  # the same as use_deterministic_algorithms, which imports inductor
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # defined by assignment
torch.backends.cuda.matmul.allow_tf32 = False


_common: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("dev", max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate], **_common)
settings.register_profile("smoke", max_examples=1, derandomize=True, **_common)  # under a sanitizer
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **_common)
settings.register_profile("deep", max_examples=20, print_blob=True, **_common)
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

SANITIZERS = {"consan": (3, 6), "iisan": (3, 7), "fpsan": (3, 8)}  # and the version of Triton that has it


def pytest_addoption(parser):
    about = "compile kernels with this sanitizer of Triton's: races (consan, iisan) or rewritten floats (fpsan); a GPU"
    parser.addoption("--triton-sanitizer", choices=SANITIZERS, help=about)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or HIP device")
    if mode := config.getoption("--triton-sanitizer", None):
        _sanitize(mode)


def _sanitize(mode):
    """Every kernel compiled from now on is instrumented."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--triton-sanitizer {mode}: it instruments compiled code, and there is no GPU")
    if version < SANITIZERS[mode]:
        needed = ".".join(map(str, SANITIZERS[mode]))
        raise pytest.UsageError(f"--triton-sanitizer {mode}: Triton {triton.__version__} has none; {needed} does")
    triton.knobs.compilation.instrumentation_mode = mode


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
