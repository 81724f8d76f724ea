"""Set-up of the whole suite, beyond the plugin's: how many cases the deep profile draws."""

import os
from collections import Counter

from hypothesis import is_hypothesis_test, settings

pytest_plugins = ["rooflama.testing.plugin"]

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
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
