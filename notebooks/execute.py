"""Execute notebooks from their text form, and store the outputs: python notebooks/execute.py [NAME ...]

``NN_name.py`` is what one edits. ``NN_name.ipynb`` is the same cells with the outputs of their last execution.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SECONDS_PER_CELL = 60
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_of(text: Path) -> nbformat.NotebookNode:
    """The notebook of a text form, without outputs. A cell's id is its number, so that only outputs change."""
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        cell["metadata"] = {}
    notebook["metadata"] = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def execute(text: Path) -> None:
    """Write the notebook beside its text form, with outputs. Raises CellExecutionError."""
    notebook = notebook_of(text)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in notebook.cells:
        if "outputs" in cell:  # a widget needs the kernel that made it
            cell["outputs"] = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]
    notebook["metadata"]["language_info"] = {"name": "python"}  # without the version that ran
    nbformat.write(notebook, text.with_suffix(".ipynb"))


def main(names: list[str]) -> None:
    for text in sorted(FOLDER.glob("[0-9]*.py")):
        if not names or any(name in text.stem for name in names):
            start = time.monotonic()
            execute(text)
            print(f"{text.stem}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
