"""Chat templates: Jinja source out of a file nobody vouches for, rendered in a sandbox with bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.sandbox

from rooflama.kernels.errors import RooflamaError


class ChatTemplateError(RooflamaError, ValueError):
    """A chat template that is missing, broken, refuses the messages, or breaks its bounds."""


class ChatTemplate:
    """One template, compiled at its first use."""

    def __init__(self, source: str):
        self.source = source

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        env.globals["strftime_now"] = lambda f: datetime.now().strftime(f)
        return env.from_string(self.source).render(messages=messages, **variables)
