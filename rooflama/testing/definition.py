"""A kernel's NumPy definition in float64, and its results by name, for comparisons with any implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflama.kernels.checks import FLOATS
from rooflama.kernels.kernel import Kernel
from rooflama.kernels.paged_common import POOLS


def outputs(kernel: Kernel, result: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Results as ``result 0``, ``result 1``, and the arguments that the kernel writes by their names."""
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    written = {name: arguments[name] for name in kernel.mutates if arguments.get(name) is not None}
    return {f"result {number}": one for number, one in enumerate(results)} | written


def in_float64(kernel: Kernel, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """``outputs`` of the definition in float64. No argument is written."""
    wide = {name: _widened(kernel, name, value) for name, value in arguments.items()}
    return outputs(kernel, kernel.define(wide), wide)


def with_copies(kernel: Kernel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with copies of those that the kernel writes."""
    written = {name: arguments[name] for name in kernel.mutates if arguments.get(name) is not None}
    return arguments | {name: copied(value) for name, value in written.items()}


def copied(tensor: Tensor) -> Tensor:
    """With the same strides, which kernels are told."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _widened(kernel: Kernel, name: str, value: Any) -> Any:
    """In float64, but for pools of pages, whose dtype says what they hold."""
    if isinstance(value, torch.dtype):
        return torch.float64
    if not isinstance(value, Tensor):
        return value
    if value.dtype in FLOATS and name not in POOLS:
        return value.double()
    return copied(value) if name in kernel.mutates else value
