"""docs/INTEGRATIONS.md: its Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[1] / "docs" / "INTEGRATIONS.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)

pytestmark = pytest.mark.usefixtures("numpy_backend")


@pytest.mark.parametrize("block", BLOCKS, ids=["transformers", "continuous-batching", "flash"])
def test_the_example_runs(block):
    exec(compile(block, "INTEGRATIONS.md", "exec"), {})
