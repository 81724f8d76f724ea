"""Every notebook runs from top to bottom, as its reader would run it: without Triton's interpreter.

A notebook is stored twice: as text, which is edited, and as .ipynb with the outputs of ``make notebooks``.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo_oracle import checkpoint_path

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 100_000  # of a picture

of_each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.demo_checkpoint
@of_each
def test_notebook_runs(notebook, tmp_path):
    checkpoint_path()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=60", "-q", "-c", os.devnull, "--rootdir"]
    result = subprocess.run(
        [*command, str(tmp_path), str(notebook)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_text_form_has_its_notebook():
    texts = sorted(FOLDER.glob("[0-9]*.py"))
    assert texts
    assert [path.stem for path in texts] == [path.stem for path in NOTEBOOKS]


@of_each
def test_notebook_and_text_form_agree(notebook):
    jupytext = pytest.importorskip("jupytext")
    stored, text = jupytext.read(notebook), jupytext.read(notebook.with_suffix(".py"))
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (stored, text)]
    assert cells[0] == cells[1], "Edit the .py, then run: make notebooks"


@of_each
def test_outputs_are_stored_and_pictures_are_described(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], "Run: make notebooks"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
        if picture := output.get("data", {}).get("image/png"):
            assert len(base64.b64decode(picture)) < MOST_BYTES
            assert len(output["metadata"]["image/png"]["alt"]) > 40
