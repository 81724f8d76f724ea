"""Options of ``rooflama run --chat`` and ``rooflama chat`` for the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import refuse

TemplateVariables = Annotated[
    list[str],
    typer.Option(
        "--template-variable",
        metavar="NAME=VALUE",
        help="set a variable of the chat template, such as enable_thinking=false; VALUE is JSON, else text; repeatable",
    ),
]
ToolsFile = Annotated[
    Path | None,
    typer.Option("--tools", metavar="FILE", help="JSON file with the list of tools, for the chat template"),
]

_PYTHON_WORDS = {"True": True, "False": False, "None": None}  # as text, "False" would be true


def template_variables(given: Sequence[str], tools: Path | None, *, chat: bool = True) -> dict[str, Any]:
    """Keyword arguments of ``Tokenizer.encode_chat``.

    Args:
        given: a list of "NAME=VALUE".
        tools: file with the JSON schemas of the tools.
        chat: whether the prompt goes through the template.

    Raises:
        ArgumentError: an option is malformed, the file cannot be read, or the prompt goes through no template.
    """
    variables: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            refuse(f"--template-variable {text!r}", "it must be NAME=VALUE", "Write it like enable_thinking=false")
        if name in ("messages", "tools"):
            refuse(f"--template-variable {name}", f"{name} is set otherwise", "Use --tools FILE, and the prompt")
        if name in variables:
            refuse(f"--template-variable {name} twice", "a variable has one value", "Give it once")
        variables[name] = _value(value)
    if tools is not None:
        variables["tools"] = _read_tools(tools)
    if variables and not chat:
        option = "--tools" if "tools" in variables else "--template-variable"
        refuse(f"{option} without --chat", "only a chat template reads it", "Add --chat")
    return variables


def _value(text: str) -> Any:
    try:
        return _PYTHON_WORDS[text] if text in _PYTHON_WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_tools(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        found = f"is no JSON ({error})"
    refuse(f"--tools {file}: it {found}", "it must be a file with a JSON list of schemas", "Check the file")
