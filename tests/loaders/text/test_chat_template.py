"""Chat templates: the styles of known models rendered as in transformers, and hostile templates stopped in time."""

import itertools
import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from rooflama import demo_checkpoint
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.text import chat_template
from rooflama.loaders.text.chat_template import ChatTemplate, ChatTemplateError
from rooflama.loaders.text.tokenizer import Tokenizer
from template_styles import STYLES
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
{% for pair in messages|groupby('role') %}{{ pair.grouper }}{{ pair.list|length }}{% endfor %}
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


# A call in each place where Jinja tells the called function where it is: a loop, a macro, a block, a set block, a call.
PLACES = {
    "plain": "{}",
    "loop": "{{% for x in [1, 2] %}}{}{{% endfor %}}",
    "set in a loop": "{{% for x in [1, 2] %}}{{% set y = x %}}{}{{% endfor %}}",
    "macro": "{{% macro m(x) %}}{}{{% endmacro %}}{{{{ m(1) }}}}",
    "loop in a macro": "{{% macro m(x) %}}{{% for y in [x] %}}{}{{% endfor %}}{{% endmacro %}}{{{{ m(1) }}}}",
    "block": "{{% block b %}}{{% set x = 1 %}}{}{{% endblock %}}{{{{ self.b() }}}}",
    "loop in a block": "{{% block b %}}{{% for x in [1] %}}{}{{% endfor %}}{{% endblock %}}",
    "set block": "{{% set s %}}{}{{% endset %}}{{{{ s }}}}",
    "call block": "{{% macro m() %}}{{{{ caller(1) }}}}{{% endmacro %}}{{% call(x) m() %}}{}{{% endcall %}}",
    "call block in a loop": "{{% macro m() %}}{{{{ caller() }}}}{{% endmacro %}}{{% for x in [1] %}}{{% call m() %}}{}"
    "{{% endcall %}}{{% endfor %}}",
    "generation": "{{% for x in [1] %}}{{% generation %}}{}{{% endgeneration %}}{{% endfor %}}",
}
CALLS = """{{ 'a-b'.replace('-', '+') }}{{ 'a-b-c'.replace('-', '+', 1) }}{{ ','.join(['a', 'b']) }}
{{ 'a,b'.split(',') }}{{ 'a b'.split() }}{{ 'a b c'.split(' ', 1) }}{{ 'a,b,c'.rsplit(',', maxsplit=1) }}
{{ ' a '.strip() }}{{ 'xay'.strip('xy') }}{{ '//a'.lstrip('/') }}{{ 'a\n'.rstrip('\n') }}{{ 'ab'.startswith('a') }}
{{ 'ab'.endswith(('x', 'b')) }}{{ 'ab cd'.title() }}{{ 'ab'.upper() }}{{ 'AB'.lower() }}{{ 'ab'.capitalize() }}
{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.items()|list }}{{ {'a': 1}.keys()|list }}{{ {'a': 1}.values()|list }}
{{ [1, 2, 1].index(2) }}{{ [1, 2, 1].count(1) }}{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'abcb'.count('b') }}
{{ 'a {} {b} {0[c]}'.format({'c': 1}, b=2)|replace('{} ', '') if false else '{} {b}'.format(1, b=[2]) }}
{{ '{0[c]:>4}|{0!r}'.format({'c': 1}) }}{{ '{x:{w}.2f}'.format(x=1.5, w=8) }}{{ '{a}'.format_map({'a': none}) }}
{{ 'a'.center(5) }}|{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3) }}|{{ '7'.zfill(3) }}|{{ 'a\tb'.expandtabs(4) }}
{{ '%s %5.1f %%' % ('a', 1.25) }}{{ '%(a)03d' % {'a': 5} }}{{ '%s' % [1] }}{{ 'a\nb'.splitlines() }}
{{ 'a=b'.partition('=') }}{{ 'ab'.removeprefix('a') }}{{ namespace(a=1).a }}{{ dict(a=1) }}{{ range(3)|list }}
{{ cycler(1, 2).next() }}{{ joiner(',')() }}"""


@pytest.mark.parametrize("place", PLACES)
def test_a_call_gives_the_same_wherever_it_stands(place):
    source = PLACES[place].format(CALLS)
    expected, _ = render_jinja_template([[]], chat_template=source)
    assert "a+b" in expected[0]
    assert ChatTemplate(source).render([]) == expected[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Größe <b>", "enum": ["Oslo", "Köln"]},
        "days": {"type": ["integer", "null"], "default": 1},
        "also": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}},
    },
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "sun", "description": "d", "parameters": SCHEMA, "return": SCHEMA}}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "sun", "arguments": {"city": "Köln's"}}}
ASKED = [{"role": "system", "content": " Be brief. /no_think"}, {"role": "user", "content": " Sun?\n/think"}]
ANSWERED = [{"role": "assistant", "content": "<think>\nHm\n</think>\n\nNo."}, {"role": "user", "content": "Why?"}]
CALLED = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
CONVERSATIONS = {
    "question": ASKED[1:],
    "answered": ASKED + ANSWERED,
    "reasoned": [*ASKED[1:], {"role": "assistant", "content": "No.", "reasoning_content": "Hm"}],
    "called": [*ASKED, *CALLED, {"role": "tool", "name": "sun", "tool_call_id": "abcdefghi", "content": "<5>"}],
    "called twice": [*ASKED[1:], *CALLED, *[{"role": "tool", "tool_call_id": i, "content": {"h": 5}} for i in "ab"]],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Where? "}]}],
    "out of order": [*ANSWERED[:1], *ASKED],
}


VARIABLES = [
    {},
    {"tools": TOOLS, "add_generation_prompt": True},
    {"enable_thinking": False, "add_generation_prompt": True, "date_string": "1 Jan"},
    {"documents": [{"title": "t", "text": "é"}], "controls": {"length": "short"}, "xml_tools": ["a"]},
]


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_the_families(style):
    agreed = 0
    for said, variables in itertools.product(CONVERSATIONS.values(), VARIABLES):
        try:
            wanted, _ = render_jinja_template([said], chat_template=STYLES[style], **SPECIAL, **variables)
        except Exception:  # the template refuses this conversation, or Jinja fails on it
            with pytest.raises(ChatTemplateError, match=r"refuses the messages|failed with"):
                ChatTemplate(STYLES[style]).render(said, **SPECIAL, **variables)
        else:
            assert ChatTemplate(STYLES[style]).render(said, **SPECIAL, **variables) == wanted[0]
            agreed += 1
    assert agreed >= 10


FILTERS = """{% set n = [3, 1, 2, 1] %}{% set w = ['b', 'A', 'c'] %}{% set d = {'b': 1, 'a': 2} %}
{{ n|sort }}{{ n|sort(reverse=true) }}{{ w|sort }}{{ w|sort(case_sensitive=true) }}{{ n|unique|list }}{{ n|sum }}
{{ n|first }}{{ n|last }}{{ n|length }}{{ n|count }}{{ n|min }}{{ n|max }}{{ n|reverse|list }}{{ 'abc'|reverse }}
{{ n|batch(3)|list }}{{ n|batch(3, 0)|list }}{{ n|slice(3)|list }}{{ n|slice(3, 'x')|list }}{{ n|join(', ') }}
{{ messages|sum(attribute='n', start=1) }}{{ [[1], [2]]|sum(start=[]) }}{{ messages|join('/', attribute='role') }}
{{ messages|map(attribute='role')|list }}{{ messages|map(attribute='no', default='-')|list }}{{ w|map('upper')|join }}
{{ messages|selectattr('role', 'in', ['user'])|list|length }}{{ messages|rejectattr('tools')|list|length }}
{{ messages|selectattr('tools', 'defined')|list|length }}{{ n|select('odd')|list }}{{ n|reject('gt', 1)|list }}
{{ d|dictsort }}{{ d|dictsort(by='value') }}{{ d|items|list }}{{ d|list }}{{ d|tojson }}{{ d|tojson(indent=4) }}
{{ d|tojson(separators=(',', ':'), sort_keys=true) }}{{ 'é<&>"'|tojson }}{{ 'é'|tojson(ensure_ascii=true) }}
{{ no|default('x') }}{{ ''|default('x', true) }}{{ no|d('x') }}{{ '7'|int + 1 }}{{ 'x'|int(5) }}{{ '1.5'|float }}
{{ 2.345|round(2) }}{{ 2.5|round }}{{ 2.1|round(0, 'ceil')|int }}{{ -3|abs }}{{ 5|string ~ 'a' }}{{ 'a<b'|e }}
{{ 'a'|safe }}{{ ' a '|trim }}{{ 'xax'|trim('x') }}{{ 'a b'|title }}{{ 'a'|upper }}{{ 'A'|lower }}{{ 'ab'|capitalize }}
{{ 'a b a'|replace('a', 'c') }}{{ 'a b a'|replace('a', 'c', 1) }}{{ 'a\nb'|indent }}{{ 'a\nb'|indent(2, first=true) }}
{{ 'a\n\nb'|indent('> ', blank=true) }}{{ 'a b'|wordcount }}{{ 'a'|center(5) }}|{{ '%s-%s'|format(1, 'b') }}
{{ '%(a)s'|format(a=1) }}{{ 'long words here'|truncate(9) }}{{ 2048|filesizeformat }}{{ d|attr('items') is callable }}
{% for role, group in messages|groupby('role') %}{{ role }}:{{ group|length }}{% endfor %}{{ 'a<'|forceescape }}
{{ messages[1:]|length }}{{ messages[::-1][0].role }}{{ messages[-1]['role'] }}{{ 'abc'[:-1] }}{{ messages[:2]|length }}
{{ '%s' % messages|length }}{{ 'a' in 'abc' }}{{ 3 is divisibleby 3 }}{{ d is mapping }}{{ 'a' is string }}
{{ none is none }}{{ [] is iterable }}{{ [] is sequence }}{{ 1 is number }}{{ true is boolean }}{{ 1 is integer }}
{{ 1.0 is float }}{{ no is undefined }}{{ false is false }}{{ 'a' is eq('a') }}{{ 1 is sameas(1) }}
{{ 'a'|length is odd }}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem is defined }}
{{ loop.cycle(1, 2) }}
{{- loop.revindex }}{{ loop.changed(m.role) }}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}
{%- for x in n recursive %}{{ x }}{{ loop([]) }}{% endfor %}{% filter upper %}a{{ 'b' }}{% endfilter %}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% set a, b = 1, 2 %}{{ a // b }}{{ 7 / 2 }}{{ -a }}{{ not a }}
{% macro m(a, b='x') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, c=4) }}
{% generation %}{% set inner = 1 %}{{ inner }}{% endgeneration %}{{ inner is defined }}{% raw %}{{ x }}{% endraw %}
{# comment #}{% for x in n if x > 1 %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}{{ (1, 2)|list }}"""


def test_filters_tests_and_statements_give_what_transformers_gives():
    messages = [{"role": "user", "content": "a", "n": 1}, {"role": "assistant", "content": "b", "n": 2, "tools": [1]}]
    expected, _ = render_jinja_template([messages], chat_template=FILTERS)
    assert ChatTemplate(FILTERS).render(messages) == expected[0]


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
        ("line\n{{ 'a'|pprint }}", "line 2: No filter named 'pprint'"),
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
    "{{ ''|attr('__class__') }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ '{0[0].__class__}'.format([1]) }}",
    "{{ '{a.__class__}'.format(a='') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ '{:{0.__class__}}'.format(1) }}",
    "{{ ['{0.__class__}']|map(attribute='format')|first }}{{ '{0.__init__}'.format(cycler) }}",
    "{% set f = '{0.append}'.format %}{{ f(messages) }}",
    "{{ ''.format.__globals__ }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{% macro m() %}{{ caller._func.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for m in messages %}{{ loop.__init__ }}{% endfor %}",
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
    "squares": (DOUBLE.format(start="2", step="ns.x * ns.x"), "integers have at most 1024 bits"),
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
    "percent width": ("{{ '%100000000d' % 1 }}", TOO_MUCH),
    "percent places": ("{{ '%.99999999f' % 1 }}", TOO_MUCH),
    "percent digits": ("{{ '%09999999999d' % 1 }}", "a number in a format has at most 9 digits"),
    "percent width as argument": ("{{ '%*d' % (1000000000, 1) }}", "widths written as numbers"),
    "percent key in parentheses": ("{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}", "without parentheses in them"),
    "percent again and again": ("{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}", TOO_MUCH),
    "percent of characters spelled out": ("{{ '%a' % ('\U0001f642' * 999999) }}" * 9, TOO_MUCH),
    "format filter": ("{{ '%1$s %999999999s'|format('a') }}", "widths written as numbers"),
    "format filter width": ("{{ '%999999999s'|format('a') }}", TOO_MUCH),
    "format width": ("{{ '{:999999999}'.format(1) }}", TOO_MUCH),
    "format width in other digits": ("{{ '{:\u0669\u0669\u0669\u0669\u0669\u0669\u0669\u0669}'.format(1) }}", TOO_MUCH),
    "format places": ("{{ '{:.999999999f}'.format(1) }}", TOO_MUCH),
    "format width as argument": ("{{ '{:{}}'.format(1, 999999999) }}", TOO_MUCH),
    "format again and again": ("{{ ('{0}' * 99999).format('x' * 99999) }}", TOO_MUCH),
    "format spelled out": ("{{ ('{0!a}' * 9).format('\U0001f642' * 999999) }}", TOO_MUCH),
    "format_map": ("{{ ('{a}' * 99999).format_map({'a': 'x' * 99999}) }}", TOO_MUCH),
    "mapped formats": ("{{ (['%999999s'] * 999)|map('format', 1)|join }}", TOO_MUCH),
    "center filter": ("{{ 'a'|center(999999999) }}", TOO_MUCH),
    "padding methods": (
        "{% for i in range(9) %}{{ 'a'.ljust(999999)|length + 'a'.zfill(999999)|length }}{% endfor %}",
        TOO_MUCH,
    ),
    "tabs": ("{{ '\t\t'.expandtabs(99999999) }}", TOO_MUCH),
    "tabs by name": ("{{ '\t\t'.expandtabs(tabsize=99999999) }}", TOO_MUCH),
    "batch filled": ("{{ [1]|batch(99999999, 0)|list }}", TOO_MUCH),
    "slices": ("{{ [1]|slice(99999999)|list }}", TOO_MUCH),
    "sum of lists": ("{{ ([[1] * 999] * 999)|sum(start=[])|length }}", TOO_LARGE),
    "round": ("{{ 1.5|round(99999999, 'ceil') }}", "rounding takes at most 300 places"),
    "doubled item views": (DOUBLE.format(start="{}", step="{'a': ns.x.items(), 'b': ns.x.items()}"), TOO_LARGE),
    "doubled value views": (DOUBLE.format(start="{}", step="{'a': ns.x.values(), 'b': ns.x.values()}"), TOO_LARGE),
    "doubled cyclers": (DOUBLE.format(start="()", step="cycler(ns.x, ns.x).items"), TOO_LARGE),
    "doubled by a macro": (
        "{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{% set ns = namespace(x=()) %}"
        "{% for i in range(99) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ {ns.x: 1} }}",
        TOO_LARGE,
    ),
    "doubled by a macro's names": (
        "{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}{% set ns = namespace(x={}) %}"
        "{% for i in range(99) %}{{ f(a=ns.x, b=ns.x) }}{% endfor %}{{ ns.x == ns.x.copy() }}",
        TOO_LARGE,
    ),
    "deep tuples": (  # hashing a tuple 100,000 deep overflows Python's stack
        "{% set ns = namespace(x=()) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
        "nest at most 256 deep",
    ),
    "sorting by many attributes": ("{{ range(99999)|sort(attribute='a,' * 30000)|length }}", TOO_LONG),
    "keys of one hash": ("{{ dict(range(0, 99999 * (2**61 - 1), 2**61 - 1)|batch(2))|length }}", TOO_LONG),
    "names of one hash": ("{{ namespace(range(0, 99999 * (2**61 - 1), 2**61 - 1)|batch(2)) }}", TOO_LONG),
    "recursion through a block's caller": (
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}",
        "RecursionError",
    ),
    "recursive loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
    "number bytes": ("{{ (1).to_bytes(1000000000, 'big') }}", "attribute 'to_bytes' of 'int' is not available"),
    "long text": ("{{ 'a b' * 30000 }}", "its text has 90,000 characters"),
    "indent": ("{{ 'a\\n'|indent(1000000000, true) }}", "an indent of 1000000000 is more than 64"),
    "json indent": ("{{ [[[[1]]]]|tojson(indent=1000000000) }}", "indents and separators have at most 64"),
    "time format": ("{{ strftime_now('%c' * 99999) }}", "a time format has at most 256 characters"),
    "long source": ("a" * 70_000, "its source has 70,000 characters"),
    "deep expression": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "RecursionError"),
    "deep blocks": ("{% if 1 %}" * 6_000, "RecursionError"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_templates_end_in_bounded_time_and_memory(name, monkeypatch):
    source, reason = BOMBS[name]
    seconds = 0.2 if reason == TOO_LONG else 20.0  # the other bounds do not depend on the machine's speed
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
