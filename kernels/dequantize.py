"""Dequantisation of a whole matrix: out[n, k] = scale * value (+ minimum), rounded once to the dtype asked for.

Layouts: ``reference/quant_layouts.py``. One program owns a tile of BLOCK_N x BLOCK_K weights.
Numerics: float32 until the rounding, and bit-equal to the definition: only the addition of the minimum rounds.
Moves: the planes once, and itemsize bytes a weight out: bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import runs_numpy
from .checks import FLOATS, check
from .operators import operator
from .quantized_tiles import load_tile, planes_of
from .weight import Weight, check_quantized, check_weight

BLOCK_N = 8
BLOCK_K = 512  # columns a program owns, or fewer where a row is shorter


@triton.jit
def _dequantize_kernel(
    planes,  # Planes
    out_ptr,  # [row_end - row_start, columns]
    row_start,
    row_end,
    columns,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_out = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = row_start + offs_out
    mask_n = offs_n < row_end
    step = tl.program_id(1)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = load_tile(planes, offs_n, mask_n, step, columns, num_blocks, LAYOUT, BLOCK_K)
    tl.store(
        out_ptr + offs_out[:, None] * columns + offs_k[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_k < columns)[None, :],
    )


def dequantize_rows(weight: Weight, start: int, stop: int, out: Tensor) -> None:
    """Rows start..stop of ``weight`` into ``out`` [stop - start, columns], contiguous; shapes are not checked."""
    columns = weight.shape[1]
    if start >= stop or columns == 0:
        return
    block_k = min(BLOCK_K, max(32, triton.next_power_of_2(columns)))
    _dequantize_kernel[(triton.cdiv(stop - start, BLOCK_N), triton.cdiv(columns, block_k))](
        planes_of(weight),
        out,
        start,
        stop,
        columns,
        columns // weight.layout.quant_block,
        LAYOUT=weight.layout,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        num_warps=4,
    )


def _dequantize_fake(planes: list[Tensor], ggml_type: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype, device=planes[0].device)


@operator(_dequantize_fake)
def dequantize_planes(planes: list[Tensor], ggml_type: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``dequantize`` with the weight taken apart: torch operators take lists of tensors, not named tuples."""
    weight = Weight(ggml_type, tuple(planes), (rows, columns))
    check_weight("weight", weight)
    check(dtype in FLOATS, f"dtype is {dtype}", "weights become float32, float16 or bfloat16", "Choose one of them")
    out = torch.empty((rows, columns), dtype=dtype, device=weight.device)
    if runs_numpy(out):
        return out.copy_(torch.from_numpy(reference.dequantize(weight.numpy())))
    dequantize_rows(weight, 0, rows, out)
    return out


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as plain numbers.

    Args:
        weight: [rows, columns], any type of ``LAYOUTS``.
        dtype: float32, float16 or bfloat16; numbers are rounded to it once.

    Returns:
        [rows, columns], a new tensor.

    Raises:
        KernelInputError: an unknown type, planes that do not fit it, or another dtype.
    """
    check_quantized("weight", weight)
    return dequantize_planes(list(weight.planes), weight.ggml_type, *weight.shape, dtype)
