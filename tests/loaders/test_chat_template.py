"""Chat templates: the models' own shapes rendered as transformers renders them, and hostile ones stopped in time."""

import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from rooflama import demo_checkpoint
from rooflama.loaders import chat_template
from rooflama.loaders.chat_template import ChatTemplate, ChatTemplateError
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.tokenizer import Tokenizer
from vocabularies import bpe_metadata, trained_bpe

# The shapes that the families document, with the constructs their templates use.
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{%- endfor %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string and ns.last > index %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EVERYTHING = """{% macro show(value, depth=0) %}
{{ value ~ '/' ~ depth }}{% if depth < 2 %}{{ show(value, depth + 1) }}{% endif %}
{% endmacro %}
{% for message in messages if message.role != 'tool' %}
{% if loop.first %}{% continue %}{% endif %}
{% generation %}{{ show(message.content|upper) }}{% endgeneration %}
{{ loop.index }} {{ message | tojson(indent=2) }} {{ [1, 2.5, none, true, 'é<>'] }} {{ {'a': (1, 'b')} }}
{{ message.items()|list }} {{ message|dictsort }}
{{ dict(a=1, **{'b': 2}).keys()|join(', ') }} {{ message.get('no', 'none') }}
{% endfor %}
{% set text %}caught {{ messages|map(attribute='role')|join('+') }}{% endset %}
{{ text|replace('caught', 'held')|indent(3, true) }} {{ 2 ** 8 }}
{{ 7 % 4 }} {{ [1] + [2] }} {{ 'ab' * 3 }} {{ undefined_name }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ 'a,b,,c'.split(',') }} {{ 'x'.join(['1', '2']) }}
{% for key, group in messages|groupby('role') %}{{ key }}{{ group|length }}{% endfor %}
{{ range(3)|list }} {{ 'abc'[1:] }}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "phi3": PHI3, "everything": EVERYTHING}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

contents = st.text(st.sampled_from("ab <|>{}%#\\\"'\n\té漢🙂</think>"), max_size=30)
conversations = st.builds(
    lambda system, turns: (
        ([{"role": "system", "content": system}] if system is not None else [])
        + [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, turns, strict=False)]
    ),
    st.none() | contents,
    st.lists(contents, min_size=1, max_size=5),
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations, add_generation_prompt=st.booleans(), with_tools=st.booleans())
def test_renders_as_transformers_does(name, messages, add_generation_prompt, with_tools):
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {}}}] if with_tools else None
    options = SPECIAL | {"add_generation_prompt": add_generation_prompt, "tools": tools}
    expected, _ = render_jinja_template([messages], chat_template=TEMPLATES[name], **options)
    assert ChatTemplate(TEMPLATES[name]).render(messages, **options) == expected[0]


@pytest.mark.demo_checkpoint
def test_smollm2_chat():
    with read_gguf(demo_checkpoint()) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    messages = [{"role": "user", "content": "Hi"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    text = system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages) == text
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids) == text
    assert ids.count(1) == 3
    assert ids.count(2) == 2


def test_special_tokens_and_variables_reach_the_template():
    tokens, merges = trained_bpe()
    names = ["bos_token", "eos_token", "pad_token is defined", "thinking", "add_generation_prompt", "tools"]
    source = "|".join(f"{{{{ {name} }}}}" for name in names)
    keys = {"bos_token_id": 0, "eos_token_id": 1}
    tokenizer = Tokenizer.from_metadata(bpe_metadata(tokens, merges, **keys) | {"tokenizer.chat_template": source})
    assert tokenizer.chat_template == source
    text = tokenizer.apply_chat_template([], add_generation_prompt=False, thinking=7)
    assert text == f"{tokens[0]}|{tokens[1]}|False|7|False|None"


def test_strftime_now():
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([]) == time.strftime("%Y-%m-%d")


def test_missing_template():
    tokens, merges = trained_bpe()
    with pytest.raises(ChatTemplateError, match=r"tokenizer.chat_template is missing: .* Give a plain prompt"):
        Tokenizer.from_metadata(bpe_metadata(tokens, merges)).encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LLAMA2, "refuses the messages: Conversation roles must alternate"),
        ("{% if %}", "line 1: Expected an expression"),
        ("line\n{{ 'a'|center(9) }}", "line 2: No filter named 'center'"),
        ("{{ messages[0].content.text.more }}", "failed with UndefinedError"),
        ("{{ messages[0].content + 1 }}", "failed with TypeError"),
        ("{% include 'other' %}", "failed with TypeError: no loader"),
        ("{{ lipsum() }}", "failed with UndefinedError: 'lipsum' is undefined"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render([{"role": "assistant", "content": "Hi"}])


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ 'a'.encode() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% set ns = namespace() %}{% set ns.__html__ = cycler %}{{ ns|escape }}",
    "{{ namespace(**{'__call__': 1}) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ChatTemplateError, match=r"stopped: .*: templates run in a sandbox"):
        ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": "Hi"}]


DOUBLE = (
    "{{% set ns = namespace(x={start}, y={start}) %}}{{% for i in range(99) %}}"
    "{{% set ns.x = {step} %}}{{% set ns.y = {step} %}}{{% endfor %}}{{{{ ns.x == ns.y }}}}"
)
LOOPS = "{% set r = range(99999) %}{% for i in r %}"
TOO_LONG, TOO_MUCH, TOO_LARGE = "it takes longer than", "it makes more than", "a list in it is larger than"
BOMBS = {
    "range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "nested loops": (LOOPS + "{% for j in r %}{% endfor %}{% endfor %}", TOO_LONG),
    "loop filters": (LOOPS + "{% for j in r if false %}{% endfor %}{% endfor %}", TOO_LONG),
    "sorting in a loop": (LOOPS + "{{ messages|sort|length }}" * 99 + "{% endfor %}", TOO_LONG),
    "branching recursion": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        TOO_LONG,
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "membership in a filter": ("{{ range(99999)|select('in', [1] * 99999)|list }}", TOO_LONG),
    "numbers of one hash": ("{{ range(0, 99999 * (2**61 - 1), 2**61 - 1)|unique|list }}", TOO_LONG),
    "text in a set block": ("{% set x %}" + LOOPS + "x" * 50_000 + "{% endfor %}{% endset %}", TOO_MUCH),
    "string * number": ("{{ 'a' * 10**9 }}", TOO_MUCH),
    "list * number": ("{{ [1] * 10**9 }}", TOO_MUCH),
    "number ** number": ("{{ 10 ** (10 ** 8) }}", "out of range"),
    "squares": (DOUBLE.format(start="2", step="ns.x * ns.x"), "whole numbers end at 1024 bits"),
    "doubled strings": (DOUBLE.format(start="'a'", step="ns.x ~ ns.x"), TOO_MUCH),
    "doubled sums": (DOUBLE.format(start="'a'", step="ns.x + ns.x"), TOO_MUCH),
    "doubled by replace": (DOUBLE.format(start="'a'", step="ns.x|replace('a', 'aa')"), TOO_MUCH),
    "doubled by join": (DOUBLE.format(start="'a'", step="[ns.x, ns.x]|join"), TOO_MUCH),
    "doubled list sums": (DOUBLE.format(start="[1] * 99999", step="ns.x + ns.x"), TOO_MUCH),
    "doubled lists": (DOUBLE.format(start="[]", step="[ns.x, ns.x]"), TOO_LARGE),
    "doubled tuples": (DOUBLE.format(start="()", step="(ns.x, ns.x)"), TOO_LARGE),
    "doubled dicts": (DOUBLE.format(start="{}", step="{'a': ns.x, 'b': ns.x}"), TOO_LARGE),
    "doubled dict calls": (DOUBLE.format(start="{}", step="dict(a=ns.x, b=ns.x)"), TOO_LARGE),
    "doubled by a filter": (DOUBLE.format(start="[]", step="[ns.x, ns.x]|list"), TOO_LARGE),
    "copies by slicing": (DOUBLE.format(start="'a' * 1000000", step="ns.x[1:]"), TOO_MUCH),
    "replace method": ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", TOO_MUCH),
    "join method": ("{{ ('b' * 99999).join('a' * 99999) }}", TOO_MUCH),
    "join filter": ("{{ range(99999)|join('a' * 1000000) }}", TOO_MUCH),
    "split": ("{% for i in range(999) %}{% set x = ('a ' * 999999).split() %}{% endfor %}", TOO_MUCH),
    "split at": ("{% for i in range(999) %}{% set x = ('a ' * 999999).split(' ') %}{% endfor %}", TOO_MUCH),
    "mapped": ("{{ ([''] * 99999)|map('replace', '', 'x' * 9999)|list|length }}", TOO_MUCH),
    "words": ("{{ ('€ ' * 3000000)|title }}", TOO_MUCH),
    "characters": ("{{ ('€' * 3000000)|list|length }}", TOO_MUCH),
    "joined characters": ("{{ ('€' * 3000000)|join(',')|length }}", TOO_MUCH),
    "stripped": ("{{ ('a' * 999999).strip('b' * 999999 ~ 'a') }}", TOO_MUCH),
    "trimmed": ("{{ ('a' * 999999)|trim('b' * 999999 ~ 'a') }}", TOO_MUCH),
    "digits": (
        "{% set x = '9' * 999999 %}{{ x|int }}{{ x|float }}{% for i in range(99) %}{{ x }}{% endfor %}",
        TOO_MUCH,
    ),
    "unpacked": ("{{ dict(*('€' * 3000000)) }}", "a string is not unpacked"),
    "format width": ("{{ '%1000000000d' % 1 }}", "strings are not formatted with %"),
    "method width": ("{{ 'a'.ljust(1000000000) }}", "attribute 'ljust' of 'str' is not open"),
    "number bytes": ("{{ (1).to_bytes(1000000000, 'big') }}", "attribute 'to_bytes' of 'int' is not open"),
    "long text": ("{{ 'a b' * 30000 }}", "its text has 90,000 characters"),
    "indent": ("{{ 'a\\n'|indent(1000000000, true) }}", "an indent of 1000000000 is more than 64"),
    "json indent": ("{{ [[[[1]]]]|tojson(indent=1000000000) }}", "indents and separators end at 64"),
    "time format": ("{{ strftime_now('%c' * 99999) }}", "a time format ends at 256 characters"),
    "long source": ("a" * 70_000, "its source has 70,000 characters"),
    "deep expression": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "RecursionError"),
    "deep blocks": ("{% if 1 %}" * 6_000, "RecursionError"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_templates_end_in_bounded_time_and_memory(name, monkeypatch):
    source, reason = BOMBS[name]
    seconds = 0.2 if reason == TOO_LONG else 20.0  # the other bounds hold on a slow machine too
    monkeypatch.setattr(chat_template, "MAX_SECONDS", seconds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert time.monotonic() - start < seconds + 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_long_conversation_is_within_the_bounds():
    messages = [{"role": role, "content": "word " * 500} for role in ("user", "assistant")] * 200
    for name, source in TEMPLATES.items():
        assert len(ChatTemplate(source).render(messages, **SPECIAL)) > 1_000_000, name
