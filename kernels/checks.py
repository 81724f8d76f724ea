"""The checks that launchers share. Each raises KernelInputError with value, rule and remedy, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import KernelInputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check(condition: bool, found: str, rule: str, remedy: str) -> None:
    if not condition:
        raise KernelInputError(found, rule=rule, remedy=remedy)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    check(tensor.dtype in allowed, f"{name} is {tensor.dtype}", f"{name} must be one of {names}", f"Convert {name} first")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """``expected`` holds a number for each dimension, or None where any size will do."""
    matches = tensor.dim() == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in expected) + "]"
    check(matches, f"{name} has shape {list(tensor.shape)}", f"{name} must have shape {wanted}", f"Reshape {name}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    check(
        len(set(devices.values())) <= 1,
        ", ".join(f"{name} on {device}" for name, device in devices.items()),
        "all tensors of one call live on one device",
        "Move them with .to(device)",
    )


def check_last_dim_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() > 1:
            check(
                tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
                f"{name} has strides {tensor.stride()}",
                f"the last dimension of {name} must be contiguous",
                f"Call {name}.contiguous()",
            )
