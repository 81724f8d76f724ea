"""A Jinja sandbox in which a hostile template runs out of budget instead of out of memory or time.

Jinja's ImmutableSandboxedEnvironment keeps a template from Python's internals and from changing what it is given. It
does not keep it from looping, doubling strings, or nesting lists until printing them takes for ever. Here everything
a template makes is paid for, in units of one character, from the budget of its rendering:

    - each round of a loop, each call, each item of a list: ITEM_COST; each character of a new string: 1;
    - what may grow far beyond its inputs (``*``, ``join``, ``replace``, ``indent``, ``tojson``) is paid for beforehand;
    - no list or dictionary may be larger than the budget when written out in full, shared parts counted each time.

Loops, literals, concatenations and slices are rewritten to say what they make; operators, calls and output have hooks
in Jinja's sandbox. Filters and methods that are not in the tables below are refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .template_budget import INTEGER_BITS, ITEM_COST, Budget, current

_INDENT_CHARACTERS = 64
_TIME_PATTERN_CHARACTERS = 256

_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min
    reject rejectattr reverse safe select selectattr sort title truncate unique upper wordcount
"""
_SPLITTING_FILTERS = frozenset({"groupby", "list", "sort", "title", "wordcount"})  # of a string: an item a character
_LAZY_FILTERS = frozenset({"map", "reject", "rejectattr", "select", "selectattr", "unique"})
_STRING_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS.split()),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    bytes: frozenset(),
    int: frozenset(),
    float: frozenset(),
}


class Refused(Exception):
    """The template called ``raise_exception``."""


def _text(value: Any) -> str:
    """``str(value)``, paid for."""
    budget = current.get()
    if not isinstance(value, str):
        budget.spend(budget.size(value))
        value = str(value)
    return budget.pay(value)


def _joined(separator: str, values: Iterable[Any]) -> str:
    if isinstance(values, str):
        current.get().spend(ITEM_COST * len(values))
    texts = [_text(value) for value in values]
    current.get().spend(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replaced(text: str, old: str, new: str, count: int | None = -1) -> str:
    found = text.count(old)
    count = -1 if count is None else count
    current.get().spend(len(text) + len(new) * (found if count < 0 else min(found, count)))
    return text.replace(old, new, count)


def _stripping_cost(text: str, characters: Any) -> int:
    """Each character of the text may be looked for among all that are stripped."""
    return len(text) * len(characters) if isinstance(characters, str) else len(text)


def _pieces(text: str, method: str, separator: Any) -> int:
    """At most so many strings come out of one of the splitting methods."""
    if method.endswith("partition"):
        return 3
    return text.count(separator) + 1 if separator and isinstance(separator, str) else len(text)


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    return _joined(_text(d), value)


def _trim_filter(value: Any, chars: str | None = None) -> str:
    text = _text(value)
    current.get().spend(_stripping_cost(text, chars))
    return text.strip(chars)


def _replace_filter(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replaced(_text(s), _text(old), _text(new), count)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    s, step = _text(s), width if isinstance(width, int) else len(width)
    if step > _INDENT_CHARACTERS:
        raise SecurityError(f"an indent of {step} is more than {_INDENT_CHARACTERS} characters")
    current.get().spend(len(s) + (step + 1) * (1 + len(s.splitlines())))
    return filters.do_indent(s, width, first, blank)


def _tojson_filter(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: no HTML escapes."""
    step = indent if isinstance(indent, int) else len(indent or "")
    if max(step, *map(len, separators or ("",))) > _INDENT_CHARACTERS:
        raise SecurityError(f"indents and separators end at {_INDENT_CHARACTERS} characters")
    budget = current.get()
    budget.spend(budget.size(value) * (1 + max(map(len, separators or ("",)))))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=False
    )
    chunks = []
    for chunk in encoder.iterencode(value):
        budget.spend(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _TIME_PATTERN_CHARACTERS:
        raise SecurityError(f"a time format ends at {_TIME_PATTERN_CHARACTERS} characters")
    return datetime.now().strftime(pattern)


class _Namespace(Namespace):
    """Jinja's namespace, without names that Python or Jinja would call behind the sandbox's back."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self is among args: "self" may be one of the names
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no name with an underscore before it, such as {name!r}")
        super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise Refused(message)


class _Rewriter(NodeTransformer):
    """Makes loops, literals, slices and concatenations report to the budget."""

    def _call(self, node: nodes.Node, hook: str, arguments: list[nodes.Expr]) -> nodes.Call:
        target = nodes.EnvironmentAttribute(hook, lineno=node.lineno, environment=node.environment)
        return nodes.Call(target, arguments, [], None, None, lineno=node.lineno, environment=node.environment)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call(node, "tick", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call(node, "concatenate", node.nodes)

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._call(node, "made", [node])

    visit_List = visit_Dict = _made

    def _unpacking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._call(node, "unpacked", [node.dyn_args])
        return node

    visit_Call = visit_Filter = visit_Test = _unpacking

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self._made(node)
        return self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return self._made(node)
        return self.generic_visit(node)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what transformers trains on; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with the options that transformers renders chat templates with, and a budget."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=jinja2.pass_context(lambda context, value: _text(value)),
        )
        self.filters = {name: _paid(name, self.filters[name]) for name in _FILTERS.split()}
        self.filters.update(join=_join_filter, replace=_replace_filter, indent=_indent_filter, tojson=_tojson_filter)
        self.filters.update(string=_text, trim=_trim_filter)
        del self.globals["lipsum"]
        self.globals.update(dict=_dict, namespace=_Namespace)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def render(self, template: jinja2.Template, budget: Budget, variables: dict[str, Any]) -> str:
        token = current.set(budget)
        try:
            return template.render(variables)
        finally:
            current.reset(token)

    # What the rewritten template calls.

    @staticmethod
    def tick() -> bool:
        return True  # the call itself is paid for

    @staticmethod
    def made(value: Any) -> Any:
        return value  # the result of every call is paid for

    @staticmethod
    def unpacked(values: Any) -> Any:
        if isinstance(values, str):
            raise SecurityError("a string is not unpacked into arguments")
        return values

    @staticmethod
    def concatenate(*values: Any) -> str:
        return _joined("", values)

    # Jinja's hooks.

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewriter().visit(source), *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("strings are not formatted with % here; join them with ~")
        if operator == "**" and not _small_power(left, right):
            raise SecurityError(f"{left!r} ** {right!r} is out of range")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    unit = 1 if isinstance(sequence, str) else ITEM_COST
                    budget.spend(unit * len(sequence) * max(times, 0))
        return budget.pay(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.spend(ITEM_COST)
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str):
            if name == "join":
                return _joined(text, *args)
            if name == "replace":
                return _replaced(text, *args, **kwargs)
            budget.spend(len(text))
            if "strip" in name and args:
                budget.spend(_stripping_cost(text, args[0]))
            if "split" in name or "partition" in name:
                budget.spend(ITEM_COST * _pieces(text, name, args[0] if args else kwargs.get("sep")))
        return budget.pay(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        return None  # str.format is no method of the table

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is not open to templates")


def _small_power(base: Any, exponent: Any) -> bool:
    if isinstance(base, int) and isinstance(exponent, int):
        return abs(exponent) * base.bit_length() <= INTEGER_BITS
    return isinstance(base, int | float) and isinstance(exponent, int | float)


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, its result paid for; and what a lazy one takes, item by item, for its result is made elsewhere."""
    value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        if name in _LAZY_FILTERS and args[value_at]:
            args = (*args[:value_at], _ticking(args[value_at]), *args[value_at + 1 :])
        if name in _SPLITTING_FILTERS:
            current.get().spend(ITEM_COST * max((len(arg) for arg in args if isinstance(arg, str)), default=0))
        return current.get().pay(function(*args, **kwargs))

    return paid


def _ticking(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        current.get().spend(ITEM_COST)
        yield value


@functools.cache
def environment() -> BudgetedEnvironment:
    """The one environment, which holds no state of any rendering."""
    return BudgetedEnvironment()
