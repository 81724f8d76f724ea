"""Embedding from a quantised table: out[t] = dequantize(table)[token_ids[t]]. Only these rows are read.

Layouts: token_ids [num_tokens]; table [vocab, hidden] in planes (``reference/quant_layouts.py``).
One program owns BLOCK_K columns of one token's row. Numerics: bit-equal to the dequantised row, rounded once.
Moves: one quantised row in and hidden x itemsize bytes out per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, INTEGERS, check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .kernel import Launch, kernel, launch
from .quantized_tiles import load_tile, planes_of, tile_for
from .weight import Weight, check_weight


@triton.jit
def _embedding_kernel(
    token_ids_ptr,  # [num_tokens]
    planes,  # Planes
    out_ptr,  # [num_tokens, columns]
    rows,
    columns,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([1], tl.int64)
    mask_n = (offs_n >= 0) & (offs_n < rows)
    tile = load_tile(planes, offs_n, mask_n, step, columns, num_blocks, LAYOUT, BLOCK_K)
    tile = tl.where(mask_n[:, None], tile, float("nan"))
    offs = token * columns + offs_k[None, :]
    tl.store(out_ptr + offs, tile.to(out_ptr.dtype.element_ty), mask=(offs_k < columns)[None, :])


def _check(token_ids: Tensor, table: Weight, dtype: torch.dtype) -> None:
    check_weight("table", table)
    check_shape("token_ids", token_ids, (None,))
    check_dtype("token_ids", token_ids, INTEGERS)
    check(dtype in FLOATS, f"dtype is {dtype}", "rows become float32, float16 or bfloat16", "Choose one of them")
    check_same_device(token_ids=token_ids, table=table.planes[0])
    check_last_dim_contiguous(token_ids=token_ids)
    if token_ids.device.type == "cpu" and len(token_ids):
        low, high = (int(n) for n in token_ids.aminmax())
        check(
            low >= 0 and high < table.shape[0],
            f"token ids from {low} to {high}",
            f"a token id is at least 0 and below the {table.shape[0]} rows of the table",
            "Tokenise with this model's own tokenizer",
        )


def _output(token_ids: Tensor, table: Weight, dtype: torch.dtype) -> Tensor:
    return torch.empty((len(token_ids), table.shape[1]), dtype=dtype, device=token_ids.device)


@kernel(checks=_check, output=_output, definition=reference.embedding)
def embedding(out: Tensor, token_ids: Tensor, table: Weight, dtype: torch.dtype = torch.float32) -> Launch:
    """The rows of ``table`` that the tokens name.

    Args:
        token_ids: [num_tokens], int32 or int64.
        table: [vocab, hidden], any type of ``LAYOUTS``.
        dtype: of the result; float32, float16 or bfloat16.

    Returns:
        [num_tokens, hidden]. On a GPU, where looking at the ids would stall the stream, a token id outside the table
        gives a row of NaN.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (on the CPU) a token id is outside the table.
    """
    rows, columns = table.shape
    tile = tile_for("embedding", out.device, columns, 32)
    return launch(
        _embedding_kernel,
        (len(token_ids), triton.cdiv(columns, tile["BLOCK_K"])),
        token_ids,
        planes_of(table),
        out,
        rows,
        columns,
        columns // table.layout.quant_block,
        LAYOUT=table.layout,
        **tile,
    )
