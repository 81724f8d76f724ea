"""The checks that launchers share. Each raises KernelInputError with value, rule and remedy, before any launch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .errors import KernelInputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MOST_SEQUENCES = 65535  # of one launch: CUDA's limit for the second and third dimension of a grid


def check(condition: bool, found: str, rule: str, remedy: str) -> None:
    if not condition:
        raise KernelInputError(found, rule=rule, remedy=remedy)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        check(False, f"{name} is {tensor.dtype}", f"{name} must be one of {names}", f"Convert {name} first")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """``expected`` holds a number for each dimension, or None where any size will do."""
    shape = tensor.shape
    if len(shape) == len(expected) and all(map(_fits, expected, shape)):
        return
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in expected) + "]"
    check(False, f"{name} has shape {list(shape)}", f"{name} must have shape {wanted}", f"Reshape {name}")


def check_rows(name: str, tensor: Tensor) -> None:
    """[..., columns], two dimensions or more, whose rows lie at one distance, so that they can be numbered."""
    shape = [*tensor.shape]
    check(tensor.ndim >= 2, f"{name} has shape {shape}", f"{name} must have shape [..., columns]", f"Reshape {name}")
    rows = [(size, stride) for size, stride in zip(shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
    at_one_distance = all(outer == inner * size for (_, outer), (size, inner) in itertools.pairwise(rows))
    check(
        at_one_distance or tensor.numel() == 0,
        f"{name} has shape {shape} and strides {tensor.stride()}",
        f"the rows of {name} must lie at one distance",
        f"Call {name}.contiguous()",
    )


def numbered_rows(tensor: Tensor) -> Tensor:
    """[..., columns] -> [rows, columns], a view."""
    return tensor if tensor.ndim == 2 else tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1])


def _fits(want: int | None, have: int) -> bool:
    return want is None or want == have


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        check(
            False,
            ", ".join(f"{name} on {device}" for name, device in devices.items()),
            "all tensors of one call live on one device",
            "Move them with .to(device)",
        )


def check_sequences(count: int) -> None:
    if count > MOST_SEQUENCES:
        check(False, f"{count} sequences", f"one call takes at most {MOST_SEQUENCES}", "Split the batch")


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Finite, and at least 0, or above it if ``positive``."""
    if not (value > 0 or (value == 0 and not positive)) or value == float("inf"):
        kind = "positive" if positive else "0 or more"
        check(False, f"{name} is {value}", f"{name} must be {kind}, and finite", f"Pass another {name}")


def check_count(name: str, value: int, what: str) -> None:
    """A whole number that int32 holds, 0 or more; ``what`` it counts."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        check(False, f"{name} is {value!r}", f"{name} counts {what}: a whole number, 0 to 2^31 - 1", f"Change {name}")


def check_last_dim_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 1:
            check(
                False,
                f"{name} has strides {tensor.stride()}",
                f"the last dimension of {name} must be contiguous",
                f"Call {name}.contiguous()",
            )
