"""Dequantisation of a whole matrix: out[n, k] = scale * value (+ minimum), rounded once to the requested dtype.

Layouts: ``reference/quant_layouts.py``. One program owns a tile of BLOCK_N x BLOCK_K weights.
Numerics: float32 until the rounding, and bit-equal to the definition: only the addition of the minimum rounds.
Moves: the planes once, and itemsize bytes per weight out: bandwidth-bound.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, check
from .kernel import Kernel, Launch, kernel, launch
from .quantized_tiles import load_tile, planes_of, tile_for
from .weight import Weight, check_weight


@triton.jit
def _dequantize_kernel(
    planes,  # Planes
    out_ptr,  # [rows, columns]
    rows,
    columns,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < rows
    step = tl.program_id(1)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = load_tile(planes, offs_n, mask_n, step, columns, num_blocks, LAYOUT, BLOCK_K)
    tl.store(
        out_ptr + offs_n[:, None] * columns + offs_k[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_k < columns)[None, :],
    )


def _check(weight: Weight, dtype: torch.dtype) -> None:
    check_weight("weight", weight)
    check(dtype in FLOATS, f"dtype is {dtype}", "weights become float32, float16 or bfloat16", "Choose one of them")


def _output(weight: Weight, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _by_definition(one: Kernel, arguments: dict[str, Any]) -> Tensor:
    """A copy, because the definition returns the planes of float weights themselves."""
    return one.output(**arguments).copy_(torch.from_numpy(one.definition(arguments["weight"].numpy())))


@kernel(checks=_check, output=_output, definition=reference.dequantize, by_definition=_by_definition)
def dequantize(out: Tensor, weight: Weight, dtype: torch.dtype = torch.float32) -> Launch:
    """The weights as plain numbers.

    Args:
        weight: [rows, columns], any type of ``LAYOUTS``.
        dtype: float32, float16 or bfloat16; numbers are rounded to it once.

    Returns:
        [rows, columns], a new tensor.

    Raises:
        KernelInputError: an unknown type, planes that do not fit it, or another dtype.
    """
    rows, columns = weight.shape
    tile = tile_for("dequantize", out.device, columns, 32)
    return launch(
        _dequantize_kernel,
        (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(columns, tile["BLOCK_K"])),
        planes_of(weight),
        out,
        rows,
        columns,
        columns // weight.layout.quant_block,
        LAYOUT=weight.layout,
        **tile,
    )
