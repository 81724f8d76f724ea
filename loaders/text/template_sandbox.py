"""A Jinja sandbox in which a hostile template runs out of budget instead of out of memory or time.

Jinja's ImmutableSandboxedEnvironment protects Python's internals and the template's inputs. It does not prevent endless
loops, strings that double, or lists nested so that printing them takes forever. Here a template pays for all that it
makes from the budget of its rendering, in units of one character:

    - ITEM_COST per iteration of a loop, per call and per item of a list; 1 per character of a new string;
    - results that may far exceed their inputs (``*``, ``join``, ``replace``, ``indent``, ``tojson``) in advance;
    - a list or dictionary must fit the budget when written out in full, with shared parts counted each time.

Loops, literals, concatenations and slices are rewritten so that they report what they make; operators, calls and output
have hooks in Jinja's sandbox. Filters and methods that are not in the tables below are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .template_budget import INTEGER_BITS, ITEM_COST, Budget, current
from .template_filters import (
    FILTERS,
    formatting,
    joined,
    padding_cost,
    percent_formatted,
    pieces,
    replaced,
    stripping_cost,
    text_of,
    ticking,
)

_TIME_PATTERN_CHARACTERS = 256

_STRING_METHODS = """
    capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix
    removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper zfill
"""
_PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
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


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _TIME_PATTERN_CHARACTERS:
        raise SecurityError(f"a time format has at most {_TIME_PATTERN_CHARACTERS} characters")
    return datetime.now().strftime(pattern)


class _Namespace(Namespace):
    """Jinja's namespace without names that Python or Jinja would call outside the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self is in args, since "self" may be one of the names
        Namespace.__init__(args[0])
        for name, value in _dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that starts with an underscore, such as {name!r}")
        super().__setitem__(name, value)


def _dict(values: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
    """``dict``, paid per item, since an item is compared with all earlier ones of equal hash."""
    made = {}
    for key, value in ticking(values.items() if isinstance(values, dict) else values):
        made[key] = value
    return made | kwargs


def _raise_exception(message: str) -> None:
    raise Refused(message)


class _Rewriter(NodeTransformer):
    """Rewrites loops, literals, slices and concatenations to report to the budget."""

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

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.ctx == "load" and node.name in ("varargs", "kwargs"):  # containers that Jinja makes for a macro
            return self._call(node, "made", [node])
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what transformers trains on; its body is rendered unchanged, in its own scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with the options that transformers renders chat templates with, and a budget."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=jinja2.pass_context(lambda context, value: text_of(value)),
        )
        self.filters = FILTERS
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
        return True  # the call is paid for

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
        return joined("", values)

    # Jinja's hooks.

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewriter().visit(source), *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        if operator == "%" and isinstance(left, str):
            return budget.pay(percent_formatted(left, right))
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
            if name in ("join", "replace"):  # without the arguments that Jinja adds for its own functions
                own = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
                return (joined if name == "join" else replaced)(text, *args, **own)
            budget.spend(len(text))
            if "strip" in name and args:
                budget.spend(stripping_cost(text, args[0]))
            if name in _PADDING_METHODS:
                budget.spend(padding_cost(text, name, args[0] if args else kwargs.get("tabsize", 8)))
            if "split" in name or "partition" in name:
                budget.spend(ITEM_COST * pieces(text, name, args[0] if args else kwargs.get("sep")))
        return budget.pay(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, tuple) and attr in getattr(type(obj), "_fields", ()):
            return True  # groupby's pairs name their items: grouper and list
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        current.get().spend(1)  # a filter may look up many names per item
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return formatting(self, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is not available to templates")


def _small_power(base: Any, exponent: Any) -> bool:
    if isinstance(base, int) and isinstance(exponent, int):
        return abs(exponent) * base.bit_length() <= INTEGER_BITS
    return isinstance(base, int | float) and isinstance(exponent, int | float)


@functools.cache
def environment() -> BudgetedEnvironment:
    """The one environment; it holds no state of a rendering."""
    return BudgetedEnvironment()
