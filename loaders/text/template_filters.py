"""Filters, string methods and formatting of the chat template sandbox. Each spends units of the rendering's budget.

A result that may be far larger than its inputs is paid for before it is made, any other result afterwards. Jinja's
filters that are not in FILTERS are refused when a template is compiled: ``random`` (a prompt must be reproducible),
``pprint`` (its time grows with the square of the depth) and those that make HTML or URLs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import filters
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter, SecurityError

from .template_budget import ITEM_COST, current

_INDENT_CHARACTERS = 64
_WIDTH_DIGITS = 9  # of a number in a format; the width itself is paid for
_DECIMAL_PLACES = 300  # more than a float has before or after its point
_SPELLED_OUT = 10  # characters that repr() and ascii() write per character, at most

_FILTERS = """
    abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape groupby int items last
    length list lower map max min reject rejectattr reverse safe select selectattr sort title truncate unique upper
    wordcount
"""
_SPLITTING_FILTERS = frozenset({"groupby", "list", "sort", "title", "wordcount"})  # an item per character
_LAZY_FILTERS = frozenset({"map", "reject", "rejectattr", "select", "selectattr", "unique"})

_PERCENT_FORMAT = re.compile(r"%(?:%|(?:\([^()]*\))?[-#0 +]*(\d*)(?:\.(\d*))?[hlL]?([A-Za-z]))")


def text_of(value: Any) -> str:
    """``str(value)``, paid from the budget."""
    budget = current.get()
    if not isinstance(value, str):
        budget.spend(budget.size(value))
    return budget.pay(str(value))


def joined(separator: str, values: Iterable[Any]) -> str:
    """``separator.join(values)`` for values of any type."""
    if isinstance(values, str):
        current.get().spend(ITEM_COST * len(values))
    texts = [text_of(value) for value in values]
    current.get().spend(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replaced(text: str, old: str, new: str, count: int | None = -1) -> str:
    """``text.replace(old, new, count)``."""
    found = text.count(old)
    count = -1 if count is None else count
    current.get().spend(len(text) + len(new) * (found if count < 0 else min(found, count)))
    return text.replace(old, new, count)


def stripping_cost(text: str, characters: Any) -> int:
    """Units of a strip: each character of the text may be compared with each that is stripped."""
    return len(text) * len(characters) if isinstance(characters, str) else len(text)


def padding_cost(text: str, method: str, size: Any) -> int:
    """Characters that ``center``, ``ljust``, ``rjust``, ``zfill`` and ``expandtabs`` may add."""
    if not isinstance(size, int):
        return 0
    return max(size, 0) * (text.count("\t") if method == "expandtabs" else 1)


def pieces(text: str, method: str, separator: Any) -> int:
    """The largest number of strings that a splitting method may return."""
    if method.endswith("partition"):
        return 3
    return text.count(separator) + 1 if separator and isinstance(separator, str) else len(text)


def ticking(values: Iterable[Any]) -> Iterator[Any]:
    """The values, each paid for as it is taken."""
    for value in values:
        current.get().spend(ITEM_COST)
        yield value


class _Formatter(SandboxedFormatter):
    """``str.format`` with fields looked up in the sandbox and widths paid for."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget = current.get()
        budget.spend(_SPELLED_OUT * budget.size(value) if conversion else 0)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = current.get()
        budget.spend(budget.size(value))
        for digits in re.findall(r"\d+", format_spec):
            _pay_width(digits)
        return super().format_field(value, format_spec)


def formatting(environment: SandboxedEnvironment, method: Callable[..., Any]) -> Callable[..., str] | None:
    """A budgeted version of a string's method ``format`` or ``format_map``; None for any other method."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str) or name not in ("format", "format_map"):
        return None

    def format(*args: Any, **kwargs: Any) -> str:
        return _Formatter(environment).vformat(str(text), args, kwargs)

    def format_map(mapping: Any) -> str:
        return _Formatter(environment).vformat(str(text), (), mapping)

    return format if name == "format" else format_map


def percent_formatted(text: str, values: Any) -> str:
    """``text % values``."""
    budget = current.get()
    fields = list(_PERCENT_FORMAT.finditer(text))
    if "%" in _PERCENT_FORMAT.sub("", text):
        raise SecurityError("a % format has widths written as numbers, and %(names) without parentheses in them")
    for field in fields:
        for digits in filter(None, field.group(1, 2)):
            _pay_width(digits)
    copies = len(fields) if isinstance(values, dict) else 1  # each field may be the same value of a dictionary
    spelled = _SPELLED_OUT if any(field[3] in ("r", "a") for field in fields) else 1
    budget.spend(len(text) + copies * spelled * budget.size(values))
    return text % values


def _pay_width(digits: str) -> None:
    if len(digits) > _WIDTH_DIGITS:
        raise SecurityError(f"a number in a format has at most {_WIDTH_DIGITS} digits")
    current.get().spend(int(digits))


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    return joined(text_of(d), value)


def _trim_filter(value: Any, chars: str | None = None) -> str:
    text = text_of(value)
    current.get().spend(stripping_cost(text, chars))
    return text.strip(chars)


def _replace_filter(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    return replaced(text_of(s), text_of(old), text_of(new), count)


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.filters.FilterArgumentError("positional and keyword arguments cannot be mixed")
    return percent_formatted(text_of(value), kwargs or args)


def _center_filter(value: Any, width: int = 80) -> str:
    text = text_of(value)
    current.get().spend(padding_cost(text, "center", width))
    return text.center(width)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    s, step = text_of(s), width if isinstance(width, int) else len(width)
    if step > _INDENT_CHARACTERS:
        raise SecurityError(f"an indent of {step} is more than {_INDENT_CHARACTERS} characters")
    current.get().spend(len(s) + (step + 1) * (1 + len(s.splitlines())))
    return filters.do_indent(s, width, first, blank)


def _batch_filter(value: Any, linecount: int, fill_with: Any = None) -> list[Any]:
    current.get().spend(ITEM_COST * linecount if fill_with is not None and isinstance(linecount, int) else 0)
    return current.get().pay(list(filters.do_batch(ticking(value), linecount, fill_with)))


def _slice_filter(value: Any, slices: int, fill_with: Any = None) -> list[Any]:
    current.get().spend(ITEM_COST * slices if isinstance(slices, int) else 0)
    return current.get().pay(list(filters.sync_do_slice(list(ticking(value)), slices, fill_with)))


def _round_filter(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _DECIMAL_PLACES:
        raise SecurityError(f"rounding takes at most {_DECIMAL_PLACES} places")
    return filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum_filter(environment: SandboxedEnvironment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = map(filters.make_attrgetter(environment, attribute), iterable)
    for item in ticking(iterable):
        start = environment.call_binop(None, "+", start, item)  # type: ignore[arg-type]  # call_binop does not use the context
    return start


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
        raise SecurityError(f"indents and separators have at most {_INDENT_CHARACTERS} characters")
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


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its result. A lazy filter pays per item, since its result is made later."""
    value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        if name in _LAZY_FILTERS and args[value_at]:
            args = (*args[:value_at], ticking(args[value_at]), *args[value_at + 1 :])
        if name in _SPLITTING_FILTERS:
            current.get().spend(ITEM_COST * max((len(arg) for arg in args if isinstance(arg, str)), default=0))
        return current.get().pay(function(*args, **kwargs))

    return paid


FILTERS: dict[str, Callable[..., Any]] = {name: _paid(name, filters.FILTERS[name]) for name in _FILTERS.split()} | {
    "batch": _batch_filter,
    "center": _center_filter,
    "format": _format_filter,
    "indent": _indent_filter,
    "join": _join_filter,
    "replace": _replace_filter,
    "round": _round_filter,
    "slice": _slice_filter,
    "string": text_of,
    "sum": _sum_filter,
    "tojson": _tojson_filter,
    "trim": _trim_filter,
}
