"""Set-up of the whole suite: hypothesis profiles. The plugin says where kernels run, and poisons memory."""

import os
from collections import Counter

from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings

pytest_plugins = ["rooflama.testing.plugin"]

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate], **_common)
settings.register_profile("smoke", max_examples=1, derandomize=True, **_common)  # under a sanitizer
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **_common)
settings.register_profile("deep", max_examples=20, print_blob=True, **_common)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
settings.load_profile(PROFILE)
CASES_A_FILE = 500  # of the deep profile, at least, over all properties of a file that run its kernel


def pytest_collection_modifyitems(items):
    if PROFILE == "deep":
        _draw_enough(items)


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
