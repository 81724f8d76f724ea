"""Every notebook runs from top to bottom, as its reader would run it: without Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo_oracle import checkpoint_path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.demo_checkpoint
@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    checkpoint_path()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=60", "-q", "-c", os.devnull, "--rootdir"]
    result = subprocess.run(
        [*command, str(tmp_path), str(notebook)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
