"""How a launcher becomes a torch operator, so that torch.compile can trace through it and opcheck can check it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch


def operator(fake: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated launcher as ``torch.ops.rooflama.<its name>``.

    Args:
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        mutates: names of the arguments that the launcher writes to.

    An eager call goes straight to the launcher: torch's dispatcher costs about 80 us a call from Python, more than most
    kernels run. Under torch.compile the call goes through the registered operator.
    """

    def register(launcher: Callable) -> Callable:
        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        if mutates:
            # torch drops trailing arguments that equal their default, and torch 2.11 then fails on a mutated one.
            positional, star, keyword = schema.partition(", *, ")
            schema = re.sub(r"=\w+", "", positional) + star + keyword
        op = torch.library.custom_op(f"rooflama::{launcher.__name__}", launcher, mutates_args=mutates, schema=schema)
        op.register_fake(fake)

        defaults = [
            (parameter.name, parameter.default)
            for parameter in inspect.signature(launcher).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return launcher(*args, **kwargs)
            rest = [kwargs.pop(name, default) for name, default in defaults[len(args) :]]
            return op(*args, *rest, **kwargs)

        return call

    return register
