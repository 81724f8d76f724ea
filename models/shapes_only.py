"""Operators on tensors without memory, by their shapes alone.

torch has rules of its own for its meta device, but for many operators they import its compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as trees


class ShapesOnly(TorchFunctionMode):
    """Replaces the rules for what ``Decoder.load`` and the passes of the families do. Others remain torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(getattr(func, "__name__", ""))
        return func(*args, **kwargs) if rule is None else rule(func, args, kwargs)


def _into(func: Any, args: Any, kwargs: Any) -> Any:
    """A product with ``out=``, which is the result."""
    return kwargs["out"] if _is_meta(kwargs.get("out")) else func(*args, **kwargs)


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if _is_meta(args[0]) else func(*args, **kwargs)


def _joined(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.cat``, which loading applies to whole weights."""
    first, *others = args[0]
    if not _is_meta(first):
        return func(*args, **kwargs)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    shape = list(first.shape)
    shape[dim] += sum(tensor.shape[dim] for tensor in others)
    return first.new_empty(shape)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on at most activations, computed with zeros on the CPU to find shape and dtype."""
    if not any(map(_is_meta, trees.tree_leaves((args, kwargs)))):
        return func(*args, **kwargs)
    found = func(*trees.tree_map(_zeros, args), **trees.tree_map(_zeros, kwargs))
    return torch.empty(found.shape, dtype=found.dtype, device="meta")


def _item(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices are views, whose offsets matter; what a tensor selects is computed."""
    return (_computed if isinstance(args[1], Tensor) else _as_it_is)(func, args, kwargs)


def _as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


RULES = {
    **dict.fromkeys(("mm", "addmm"), _into),
    "add_": _in_place,
    "cat": _joined,
    "__getitem__": _item,
    **dict.fromkeys(("add", "mul", "cos", "sin", "arange", "empty_like"), _computed),
}


def _is_meta(value: Any) -> bool:
    """Whether it is a tensor without memory, or the device of such."""
    return value.is_meta if isinstance(value, Tensor) else isinstance(value, torch.device) and value.type == "meta"


def _zeros(value: Any) -> Any:
    """The same on the CPU, where all elements of a tensor are one."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape) if _is_meta(value) else value


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside the block, tensors are made without memory."""
    with torch.device("meta"), ShapesOnly():
        yield
