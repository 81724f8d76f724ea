"""Checking the input of a chat template, and rebuilding it from plain JSON types.

A template is untrusted code, so it never receives an object with methods of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from rooflama.kernels.errors import RooflamaError

MAX_DEPTH = 128
_TOOL_ROLES = frozenset({"tool", "ipython", "function"})  # a tool may return any JSON value
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates read the reasoning
_EXAMPLE = '[{"role": "user", "content": "Hello"}]'


class ChatTemplateError(RooflamaError, ValueError):
    """A chat template that is missing, broken or exceeds its bounds, or a conversation that it does not accept."""


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as plain data.

    Raises:
        ChatTemplateError: messages is not a list of dictionaries, or a message lacks a valid role or content.
    """
    if not isinstance(messages, list | tuple):
        _refuse(f"messages is a {_kind(messages)}", "it must be a list of messages", f"Write {_EXAMPLE}")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_dictionaries(values: Any, name: str) -> None:
    """Raise ChatTemplateError unless ``values`` (tools or documents) is None or a list of dictionaries."""
    wanted = "a list of dictionaries"
    if values is not None and not isinstance(values, list | tuple):
        _refuse(f"{name} is a {_kind(values)}", f"it must be {wanted}", f"Put it into a list: {name}=[...]")
    for index, value in enumerate(values or ()):
        if not isinstance(value, Mapping):
            remedy = (
                "Describe the function by its JSON schema, such as transformers.utils.get_json_schema makes"
                if callable(value)
                else "Give the JSON schema of each tool, or the title and text of each document"
            )
            _refuse(f"{name}[{index}] is a {_kind(value)}", f"{name} must be {wanted}", remedy)


def with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each name that templates use, as in transformers."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def plain(value: Any, place: str, depth: int = 0) -> Any:
    """``value`` rebuilt from None, bool, int, float, str, list, tuple and dict only.

    Raises:
        ChatTemplateError: it contains another type, or nests deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        _refuse(f"{place} nests deeper than {MAX_DEPTH}", "a template takes JSON values", "Nest it less deeply")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), place, depth + 1)
    for kind in (str, int, float):  # drops the methods of a subclass
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {
            plain(key, f"a key of {place}", depth + 1): plain(item, f"{place}[{key!r}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [plain(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    _refuse(
        f"{place} is a {_kind(value)}",
        "a template takes JSON values: text, numbers, true, false, null, and lists and dictionaries of these",
        "Convert it to one of them, such as str(...)",
    )


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        rule = "each message must be a dictionary with role and content"
        _refuse(f"{place} is a {_kind(message)}", rule, f"Write {_EXAMPLE}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = f"has no role (its keys: {', '.join(map(str, message)) or 'none'})" if role is None else f"{role!r}"
        _refuse(
            f"{place} {found}" if role is None else f"{place}['role'] is {found}",
            "each message must have a role",
            'Set "role" to "system", "user", "assistant" or another role of the template',
        )
    _check_content(message.get("content"), role, place)
    return plain(message, place)


def _check_content(content: Any, role: str, place: str) -> None:
    if content is None:
        if role != "assistant":
            _refuse(
                f"{place} has no content",
                "only a message of the assistant (tool calls, reasoning) may have none",
                'Set "content" to the message\'s text',
            )
    elif isinstance(content, list | tuple) and role not in _TOOL_ROLES:
        for index, part in enumerate(content):
            if not isinstance(part, Mapping):
                _refuse(
                    f"{place}['content'][{index}] is a {_kind(part)}",
                    "content in parts must be a list of dictionaries",
                    'Write each part as {"type": "text", "text": ...}, or give the text alone',
                )
    elif not isinstance(content, str) and role not in _TOOL_ROLES:
        _refuse(
            f"{place}['content'] is a {_kind(content)}",
            "content must be text, or a list of parts",
            'Give a string, or [{"type": "text", "text": ...}]',
        )


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} ({value[:40]!r})" if isinstance(value, str) else name


def _refuse(found: str, rule: str, remedy: str) -> NoReturn:
    raise ChatTemplateError(found, rule=rule, remedy=remedy)
