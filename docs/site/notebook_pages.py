"""Notebooks as pages: the cells' text, code and stored outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any


def markdown(path: Path) -> str:
    """The notebook as Markdown, with pictures inside."""
    return "\n\n".join(_parts(json.loads(path.read_text(encoding="utf-8")))) + "\n"


def index(paths: Iterable[Path]) -> str:
    """A list of notebooks with their titles and first paragraphs."""
    lines = [
        "# Notebooks",
        "",
        "Each runs in less than a minute on two CPU cores. `make notebooks` runs them all.",
        "",
    ]
    for path in paths:
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, about = (part.strip() for part in first.split("\n", 1))
        summary = " ".join(about.split("\n\n")[0].split())
        lines.append(f"- [{title.removeprefix('# ')}]({path.name}): {summary}")
    return "\n".join(lines) + "\n"


def _parts(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            yield _output(output)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        alt = escape(output["metadata"].get("image/png", {}).get("alt", ""), quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        html = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))  # a blank line would end the block
        return f"<div>{html}</div>"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return f"```text\n{''.join(output.get('text') or data.get('text/plain', ''))}\n```"
