"""How a launcher becomes a torch operator, so that torch.compile can trace through it and opcheck can check it."""

from __future__ import annotations

import functools
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
        op = torch.library.custom_op(f"rooflama::{launcher.__name__}", launcher, mutates_args=mutates)
        op.register_fake(fake)

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs) if torch.compiler.is_compiling() else launcher(*args, **kwargs)

        return call

    return register
