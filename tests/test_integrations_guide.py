"""docs/INTEGRATIONS.md: its Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[1] / "docs" / "INTEGRATIONS.md").read_text()
BLOCKS = re.findall(r"^## (\S+)$.*?```python\n(.*?)```", GUIDE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("library", "block"), BLOCKS, ids=[library for library, _ in BLOCKS])
def test_the_example_runs(library, block):
    exec(compile(block, f"INTEGRATIONS.md, {library}", "exec"), {})
