"""Set-up of the whole suite: where kernels run, hypothesis profiles, poisoned memory."""

import os
from collections import Counter

import torch

if not torch.cuda.is_available():  # before rooflama.kernels is imported: Triton reads it when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings

from interpreter import use_ordered_dot, watch_memory

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate], **_common)
settings.register_profile("smoke", max_examples=1, derandomize=True, **_common)  # under a sanitizer
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **_common)
settings.register_profile("deep", max_examples=20, print_blob=True, **_common)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
settings.load_profile(PROFILE)
CASES_A_FILE = 500  # of the deep profile, at least, over all properties of a file that run its kernel

use_ordered_dot()
watch_memory()

# torch.empty now hands out NaN (or the largest integer), so a kernel that leaves an element unwritten is seen.
torch.set_deterministic_debug_mode("warn")  # the same as use_deterministic_algorithms, which imports inductor
torch.utils.deterministic.fill_uninitialized_memory = True
torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(items):
    if PROFILE == "deep":
        _draw_enough(items)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device"))


def _draw_enough(items):
    """Share CASES_A_FILE drawn cases out among the properties of each file that run its kernel.

    Not among those that concern the definition alone; and a property that fixes a number itself keeps it.
    """
    properties = [
        item
        for item in items
        if is_hypothesis_test(getattr(item, "function", None))
        and "numpy_backend" not in item.fixturenames
        and not item.name.startswith("test_definition")
    ]
    count = Counter(item.path for item in properties)
    for function, path in {(item.function, item.path) for item in properties}:
        share = -(-CASES_A_FILE // count[path])
        if share > settings.default.max_examples and not hasattr(function, "_hypothesis_internal_settings_applied"):
            settings(max_examples=share)(function)


@pytest.fixture
def numpy_backend():
    """Run the kernels' NumPy definitions, as on a machine without a GPU."""
    from rooflama.kernels import use_backend

    with use_backend("numpy"):
        yield
