"""Chat templates: Jinja source out of a file that nobody vouches for, rendered within bounds.

What a template sees is what transformers gives it: messages, add_generation_prompt, the special tokens' texts, tools
and documents (None unless given), raise_exception, strftime_now, a tojson without HTML escapes, {% break %},
{% continue %} and {% generation %}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import SecurityError

from rooflama.kernels.errors import RooflamaError

from .template_budget import Budget, OverBudget
from .template_sandbox import Refused, environment

MAX_SOURCE_CHARACTERS = 64 * 1024
MAX_SECONDS = 5.0
MAX_UNITS, UNITS_A_CHARACTER = 2**24, 64  # made in all while rendering, and so many more for each character given
MAX_TEXT, TEXT_A_CHARACTER = 2**16, 8  # characters of the rendered text, and so many more for each character given


class ChatTemplateError(RooflamaError, ValueError):
    """A chat template that is missing, broken, refuses the messages, or goes beyond its bounds."""


class ChatTemplate:
    """One template, compiled at its first use, so that a broken one spoils nothing but chat.

    Attributes:
        source: the Jinja source.
    """

    def __init__(self, source: str):
        self.source = source
        self._compiled: jinja2.Template | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for ``messages``.

        Rendering may take MAX_SECONDS, make MAX_UNITS characters in all (see ``template_sandbox``), and give a text of
        MAX_TEXT; each character of the messages and variables raises the latter two.

        Args:
            messages: dictionaries with "role" and "content", and what else the template reads.
            variables: further names for the template.

        Raises:
            ChatTemplateError: the template is no valid Jinja, refuses the messages, fails on them, reaches for what
                the sandbox keeps from it, or goes beyond its bounds of time and size.
        """
        names = {"messages": messages, "tools": None, "documents": None, **variables}
        given = len(str(names))
        units, longest = MAX_UNITS + UNITS_A_CHARACTER * given, MAX_TEXT + TEXT_A_CHARACTER * given
        budget = Budget(units, MAX_SECONDS)
        try:
            if self._compiled is None:
                self._compiled = self._compile()
            text = environment().render(self._compiled, budget, names)
            if len(text) > longest:
                raise OverBudget(f"its text has {len(text):,} characters")
            return text
        except OverBudget as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template was stopped: {error}",
                rule=f"rendering may take {MAX_SECONDS:g} s, make {units:,} characters, and give a text of {longest:,}",
                remedy="Shorten the conversation, or do not use a file with such a template",
            ) from None
        except SecurityError as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template was stopped: {error}",
                rule="templates run in a sandbox that offers them text, lists and a fixed set of filters and methods",
                remedy="Do not use a file with such a template, or give a plain prompt",
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template, line {error.lineno}: {error.message}",
                rule="a chat template must be valid Jinja that uses the filters offered here",
                remedy="Mend tokenizer.chat_template with gguf_set_metadata.py, or give a plain prompt",
            ) from None
        except Refused as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template refuses the messages: {error}",
                rule="messages must be of the roles, order and content that the template takes",
                remedy="Change the messages",
            ) from None
        except Exception as error:  # untrusted code: whatever it runs into is the template's failure
            raise ChatTemplateError(
                f"tokenizer.chat_template failed with {type(error).__name__}: {error}",
                rule="a chat template must render every message that has a role and a content",
                remedy="Check the messages' keys against the template, or give a plain prompt",
            ) from error

    def _compile(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE_CHARACTERS:
            raise OverBudget(f"its source has {len(self.source):,} characters, {MAX_SOURCE_CHARACTERS:,} at most")
        return environment().from_string(self.source)
