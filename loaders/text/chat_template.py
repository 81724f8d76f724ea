"""Chat templates: Jinja source from an untrusted file, rendered within bounds of time and size.

A template sees what transformers passes to it: messages, add_generation_prompt (False by default), the texts of special
tokens, tools and documents (None by default), raise_exception, strftime_now, a tojson without HTML escapes, and
{% break %}, {% continue %} and {% generation %}. A file may hold several templates, each with a name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import SecurityError

from .chat_messages import ChatTemplateError, checked_dictionaries, checked_messages, plain, with_reasoning_names
from .template_budget import Budget, OverBudget
from .template_sandbox import Refused, environment

MAX_SOURCE_CHARACTERS = 64 * 1024
MAX_SECONDS = 5.0
MAX_UNITS, UNITS_PER_CHARACTER = 2**24, 64  # characters made while rendering, plus these per character of the input
MAX_TEXT, TEXT_PER_CHARACTER = 2**16, 8  # characters of the rendered text, plus these per character of the input
DEFAULT, TOOL_USE = "default", "tool_use"


class ChatTemplate:
    """One template. It is compiled when it is first used, so that a broken template affects nothing but chat.

    Attributes:
        source: the Jinja source.
    """

    def __init__(self, source: str):
        self.source = source
        self._compiled: jinja2.Template | None = None
        self._names: frozenset[str] = frozenset()

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for ``messages``.

        Rendering may take MAX_SECONDS, make MAX_UNITS characters in total (see ``template_sandbox``), and return
        MAX_TEXT characters. The last two bounds grow with the messages and variables.

        Args:
            messages: dictionaries with "role", "content" and other keys that the template reads.
            variables: further variables of the template.

        Raises:
            ChatTemplateError: messages or variables have a wrong type; or the template is not valid Jinja, refuses the
                messages, fails on them, violates the sandbox, or exceeds a bound.
        """
        for name in ("tools", "documents"):
            checked_dictionaries(variables.get(name), name)
        names: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False}
        names |= {name: plain(value, name) for name, value in variables.items()}
        names["messages"] = [with_reasoning_names(message) for message in checked_messages(messages)]
        given = len(str(names))
        units, longest = MAX_UNITS + UNITS_PER_CHARACTER * given, MAX_TEXT + TEXT_PER_CHARACTER * given
        budget = Budget(units, MAX_SECONDS)
        try:
            text = environment().render(self._compiled or self._compile(), budget, names)
            if len(text) > longest:
                raise OverBudget(f"its text has {len(text):,} characters")
            return text
        except OverBudget as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template was stopped: {error}",
                rule=f"rendering may take {MAX_SECONDS:g} s, make {units:,} characters and return {longest:,}",
                remedy="Shorten the conversation, or do not use a file with such a template",
            ) from None
        except SecurityError as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template was stopped: {error}",
                rule="templates run in a sandbox with text, lists and a fixed set of filters and methods",
                remedy="Do not use a file with such a template, or give a plain prompt",
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template, line {error.lineno}: {error.message}",
                rule="a chat template must be valid Jinja with filters that the sandbox has",
                remedy="Fix tokenizer.chat_template with gguf_set_metadata.py, or give a plain prompt",
            ) from None
        except Refused as error:
            raise ChatTemplateError(
                f"tokenizer.chat_template refuses the messages: {error}",
                rule="messages must be of the roles, order and content that the template takes",
                remedy="Change the messages",
            ) from None
        except Exception as error:  # the template is untrusted code: any failure is its own
            raise ChatTemplateError(
                f"tokenizer.chat_template failed with {type(error).__name__}: {error}",
                rule="a chat template must render every message that has a role and a content",
                remedy="Check the messages' keys against the template, or give a plain prompt",
            ) from error

    def _compile(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE_CHARACTERS:
            raise OverBudget(f"its source has {len(self.source):,} characters, {MAX_SOURCE_CHARACTERS:,} at most")
        tree = environment().parse(self.source)
        self._names = frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")
        self._compiled = environment().from_string(tree)
        return self._compiled

    def reads(self, name: str) -> bool:
        """Whether the template mentions a variable; known once it has been rendered."""
        return name in self._names


class ChatTemplates:
    """The templates of one file or folder.

    Args:
        sources: name -> Jinja source; the default template is named "default".
    """

    def __init__(self, sources: Mapping[str, str]):
        self._templates = {name: ChatTemplate(source) for name, source in sources.items()}

    @property
    def sources(self) -> dict[str, str]:
        """Name -> Jinja source."""
        return {name: template.source for name, template in self._templates.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        name: str | None,
        standard: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt, as transformers' ``apply_chat_template`` renders it: keys of a message that are None are dropped.

        Args:
            messages: dictionaries with "role" and "content".
            name: the template; None selects "tool_use" if it exists and tools are given, else "default".
            standard: variables that a template may ignore.
            variables: variables of the caller; a warning names those that the template never mentions.

        Raises:
            ChatTemplateError: there is no such template, or rendering fails as in ``ChatTemplate.render``.
        """
        said = [{key: value for key, value in m.items() if value is not None} for m in checked_messages(messages)]
        template = self._choose(name, variables.get("tools") is not None)
        text = template.render(said, **{**standard, **variables})
        given = [key for key, value in variables.items() if value is not None and value != []]
        if unused := [key for key in given if not template.reads(key)]:
            warnings.warn(
                f"the chat template does not use {', '.join(unused)}: no effect",
                stacklevel=4,
            )
        return text

    def _choose(self, name: str | None, with_tools: bool) -> ChatTemplate:
        if name is None:
            name = TOOL_USE if with_tools and TOOL_USE in self._templates else DEFAULT
        if name in self._templates:
            return self._templates[name]
        if not self._templates:
            raise ChatTemplateError(
                "tokenizer.chat_template is missing",
                rule="a conversation needs the template that the model was trained with",
                remedy="Give a plain prompt, or use a chat or instruct version of the model",
            )
        names = ", ".join(map(repr, sorted(self._templates)))
        raise ChatTemplateError(
            f"there is no chat template named {name!r}",
            rule=f"its templates are {names}",
            remedy="Choose one of them with chat_template=..., or give tools where tool_use is one of them",
        )
