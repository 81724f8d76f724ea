"""How a launcher becomes a torch operator, so that torch.compile can trace through it and opcheck can check it.

What holds for every launcher stands here too: it runs on the device of its tensors, whichever is current, and refuses
tensors that want a gradient.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .backend import INTERPRETED
from .checks import check


def operator(fake: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated launcher as ``torch.ops.rooflama.<its name>``.

    Args:
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        mutates: names of the arguments that the launcher writes to.

    An eager call goes straight to the launcher: torch's dispatcher costs about 80 us a call from Python, more than most
    kernels run. A call that is traced (torch.compile, make_fx, torch.jit.trace) goes through the registered operator.
    """

    def register(launcher: Callable) -> Callable:
        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        if mutates:
            # torch drops trailing arguments that equal their default, and torch 2.11 then fails on a mutated one.
            positional, star, keyword = schema.partition(", *, ")
            schema = re.sub(r"=\w+", "", positional) + star + keyword

        @functools.wraps(launcher)
        def launch(*args: Any, **kwargs: Any) -> Any:
            device = next(_tensors((*args, *kwargs.values()))).device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launcher(*args, **kwargs)
            with torch.cuda.device(device):  # Triton launches on the current device
                return launcher(*args, **kwargs)

        op = torch.library.custom_op(f"rooflama::{launcher.__name__}", launch, mutates_args=mutates, schema=schema)
        op.register_fake(fake)

        defaults = [
            (parameter.name, parameter.default)
            for parameter in inspect.signature(launcher).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not is_traced():
                if torch.is_grad_enabled():
                    _refuse_gradients(launcher.__name__, (*args, *kwargs.values()))
                return launch(*args, **kwargs)
            rest = [kwargs.pop(name, default) for name, default in defaults[len(args) :]]
            return op(*args, *rest, **kwargs)

        return call

    return register


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel on this device may start before the one in front of it has ended.

    Programmatic dependent launch, from Hopper on: such a kernel calls ``gdc_wait`` before it touches what others write.
    """
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def overlapped(device: torch.device) -> dict[str, bool]:
    """The options of a launch whose kernel waits if OVERLAP: it may start early where ``overlaps`` allows that."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


def is_traced() -> bool:
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


def _refuse_gradients(name: str, values: Iterable[Any]) -> None:
    for tensor in _tensors(values):
        if tensor.requires_grad:
            check(
                False,
                f"{name} of a tensor {list(tensor.shape)} that requires grad",
                "kernels compute no gradients",
                "Call it under torch.no_grad(), or detach the tensor",
            )
