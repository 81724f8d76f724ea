"""The examples of docs/DEVICE_BOUNDARY.md run as they stand, one after the other."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "DEVICE_BOUNDARY.md"


def test_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(examples) >= 4
    namespace: dict = {}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"{GUIDE.name}, example {number}", "exec"), namespace)
