"""Conversations: shapes that templates accept, and mistakes that are refused before rendering."""

import enum
import warnings

import numpy as np
import pytest
import transformers
from packaging.version import Version
from transformers import PreTrainedTokenizerFast

from rooflama.loaders.text.chat_template import ChatTemplate, ChatTemplateError
from rooflama.loaders.text.tokenizer import Tokenizer
from vocabularies import bpe_metadata, byte_level_json, trained_bpe

HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "größe", "description": "d", "parameters": {"type": "object"}}}
ASKED = [{"type": "function", "function": {"name": "größe", "arguments": {"of": "a <b>"}}}]
SOURCE = (
    "{% for m in messages %}{{ m.role }}{% if m.content is string %}: {{ m.content }}{% elif m.content is defined %}: "
    "{% for p in m.content %}{{ p.text if p.type == 'text' else p.type }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% if 'tool_calls' in m %}!{% endif %}"
    "{{ m.reasoning_content }}{{ m.thinking }}\n{% endfor %}{{ tools|tojson if tools }}"
    "{{ documents|length if documents }}"
)


def tokenizer(source: str = SOURCE) -> Tokenizer:
    return Tokenizer.from_metadata(bpe_metadata(*trained_bpe()) | {"tokenizer.chat_template": source})


class Role(enum.StrEnum):
    USER = "user"


def since_5_23(messages: list) -> object:
    """A case in which releases of transformers before 5.23 pass other keys to the template."""
    reason = "before 5.23, content and tool_calls that are None reach the template, and thinking stands alone"
    return pytest.param(
        messages, marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason=reason)
    )


@pytest.mark.parametrize(
    "messages",
    [
        [HELLO],
        (HELLO,),
        [{"role": "system", "content": ""}, HELLO],
        [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
        since_5_23(
            [HELLO, {"role": "assistant", "content": None, "tool_calls": ASKED}, {"role": "tool", "content": "5 m"}]
        ),
        [HELLO, {"role": "assistant", "tool_calls": ASKED}, {"role": "tool", "name": "größe", "content": "5"}],
        since_5_23([HELLO, {"role": "assistant", "content": "Hi", "tool_calls": None}, HELLO]),
        since_5_23([HELLO, {"role": "assistant", "content": "Hi", "thinking": "Hm"}]),
        since_5_23([HELLO, {"role": "assistant", "content": "Hi", "reasoning": "Hm"}]),
        [{"role": "user", "content": "Hi", "weight": np.float64(0.5)}, {"role": Role.USER, "content": np.str_("Hi")}],
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_conversation_reads_as_in_transformers(messages, tools):
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level_json(), chat_template=SOURCE)
    wanted = theirs.apply_chat_template(messages, tools=tools, documents=[{"text": "a"}], tokenize=False)
    given = [dict(message) for message in messages]
    assert tokenizer().apply_chat_template(messages, tools=tools, documents=[{"text": "a"}]) == wanted
    assert list(messages) == given


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("Hello", r"messages is a str \('Hello'\): it must be a list of messages. Write \[{\"role\""),
        (HELLO, "messages is a dict: it must be a list"),
        (None, "messages is a NoneType: it must be a list"),
        (iter([HELLO]), "messages is a list_iterator: it must be a list"),
        (["Hello"], r"messages\[0\] is a str \('Hello'\): each message must be a dictionary"),
        ([HELLO, ("user", "Hello")], r"messages\[1\] is a tuple: each message must be a dictionary"),
        ([[HELLO]], r"messages\[0\] is a list: each message must be a dictionary"),
        ([{"content": "Hello"}], r"messages\[0\] has no role \(its keys: content\)"),
        ([{}], r"messages\[0\] has no role \(its keys: none\)"),
        ([{"role": 1, "content": "Hello"}], r"messages\[0\]\['role'\] is 1: each message must have a role"),
        ([{"role": "", "content": "Hello"}], r"messages\[0\]\['role'\] is ''"),
        ([{"role": "user"}], r"messages\[0\] has no content: only a message of the assistant"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "text": "Hello"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] is a int: content must be text"),
        ([{"role": "user", "content": b"Hello"}], r"messages\[0\]\['content'\] is a bytes"),
        ([{"role": "user", "content": {"type": "text"}}], r"messages\[0\]\['content'\] is a dict"),
        ([{"role": "user", "content": ["Hello"]}], r"messages\[0\]\['content'\]\[0\] is a str"),
        ([{"role": "tool", "content": {1, 2}}], r"messages\[0\]\['content'\] is a set: a template takes JSON"),
        ([HELLO | {"image": object()}], r"messages\[0\]\['image'\] is a object: a template takes JSON values"),
    ],
)
def test_slips_are_refused(messages, found):
    with pytest.raises(ChatTemplateError, match=found):
        tokenizer().encode_chat(messages)
    with pytest.raises(ChatTemplateError, match=found):
        ChatTemplate(SOURCE).render(messages)


def weather(city: str) -> str:
    """Never called."""
    return city


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"tools": TOOL}, "tools is a dict: it must be a list of dictionaries. Put it into a list"),
        ({"tools": "weather"}, r"tools is a str \('weather'\): it must be a list of dictionaries"),
        ({"tools": ["weather"]}, r"tools\[0\] is a str"),
        ({"tools": [weather]}, r"tools\[0\] is a function: .* JSON schema, such as .*get_json_schema"),
        ({"documents": ["a"]}, r"documents\[0\] is a str"),
        ({"moment": object()}, "moment is a object: a template takes JSON values"),
        ({"moment": {"now": [object()]}}, r"moment\['now'\]\[0\] is a object"),
        ({"call": weather}, "call is a function: a template takes JSON values"),
    ],
)
def test_variables_of_other_types_are_refused(variables, found):
    with pytest.raises(ChatTemplateError, match=found):
        tokenizer(SOURCE + "{{ moment }}{{ call }}").apply_chat_template([HELLO], **variables)


def test_what_holds_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ChatTemplateError, match="nests deeper than 128"):
        tokenizer().apply_chat_template([HELLO], tools=[{"a": endless}])


@pytest.mark.parametrize(
    ("source", "variables", "unused"),
    [
        ("{{ messages }}", {"max_tokens": 5, "enable_thinking": False}, "max_tokens, enable_thinking"),
        ("{{ messages }}", {"tools": [TOOL], "documents": []}, "tools"),
        ("{{ messages }}", {"tools": None, "documents": None}, None),
        ("{% if enable_thinking is defined %}{% endif %}", {"enable_thinking": False}, None),
        ("{% set thinking = thinking if thinking is defined else true %}", {"thinking": False}, None),
        ("{% macro m() %}{{ style }}{% endmacro %}", {"style": "x"}, None),
        ("{% set style = 1 %}", {"style": "x"}, "style"),
        ("{{ messages[0].style }}", {"style": "x"}, "style"),
    ],
)
def test_a_variable_that_the_template_never_reads_is_named(source, variables, unused):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer(source).apply_chat_template([HELLO], **variables)
    wanted = [f"the chat template does not use {unused}: no effect"] if unused else []
    assert [str(warning.message) for warning in caught] == wanted
