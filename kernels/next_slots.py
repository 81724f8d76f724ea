"""Where the next token of each sequence goes: the first launch of a decode step.

    position = min(length, most_positions - 1)
    slot     = page block_table[position // page_size] * page_size + position % page_size; -1 at the limit
    length   = length + 1 below the limit

Layout: lengths and limits int32 [num_seqs], block_table int32 [num_seqs, max_pages_per_seq]. A sequence at its limit
stays there, and its slot of -1 is written by nobody. One program owns BLOCK sequences.
Numerics: integers.
Moves: 32 bytes per sequence: bound by the launch, in place of a dozen launches of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import (
    check,
    check_count,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_sequences,
    check_shape,
)
from .kernel import Launch, kernel, launch

BLOCK = 32


@triton.jit
def _next_slots_kernel(
    lengths_ptr,  # [num_seqs]
    limits_ptr,  # [num_seqs]
    block_table_ptr,  # [num_seqs, max_pages_per_seq]
    positions_ptr,  # [num_seqs]
    slots_ptr,  # [num_seqs]
    block_table_stride,
    num_seqs,
    most_positions,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_seqs
    length = tl.load(lengths_ptr + offs, mask=mask, other=0)
    active = length < tl.load(limits_ptr + offs, mask=mask, other=0)
    position = tl.minimum(length, most_positions - 1)
    row = block_table_ptr + offs.to(tl.int64) * block_table_stride
    page = tl.load(row + position // PAGE_SIZE, mask=mask & active, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    tl.store(positions_ptr + offs, position, mask=mask)
    tl.store(slots_ptr + offs, tl.where(active, slot, -1), mask=mask)
    tl.store(lengths_ptr + offs, length + 1, mask=mask & active)


def _check(lengths: Tensor, limits: Tensor, block_table: Tensor, page_size: int, most_positions: int) -> None:
    check_shape("block_table", block_table, (None, None))
    num_seqs, width = block_table.shape
    check_sequences(num_seqs)
    check_shape("lengths", lengths, (num_seqs,))
    check_shape("limits", limits, (num_seqs,))
    tensors = {"lengths": lengths, "limits": limits, "block_table": block_table}
    for name, tensor in tensors.items():
        check_dtype(name, tensor, (torch.int32,))
    check_last_dim_contiguous(**tensors)
    check_count("page_size", page_size, "the tokens of a page")
    check_count("most_positions", most_positions, "the positions of a sequence")
    check(
        0 < most_positions <= width * page_size,
        f"{most_positions} positions",
        f"a sequence has 1 to {width * page_size} ({width} pages of {page_size})",
        "Give block_table more columns",
    )
    check_same_device(**tensors)


def _output(
    lengths: Tensor, limits: Tensor, block_table: Tensor, page_size: int, most_positions: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lengths), torch.empty_like(lengths, dtype=torch.int64)


@kernel(checks=_check, output=_output, definition=reference.next_slots, mutates=("lengths",))
def next_slots(
    out: tuple[Tensor, Tensor],
    lengths: Tensor,
    limits: Tensor,
    block_table: Tensor,
    page_size: int,
    most_positions: int,
) -> Launch:
    """The position and the slot of each sequence's next token. Counts it in ``lengths``, unless it is at its limit.

    Args:
        lengths: int32 [num_seqs], tokens in the cache, 0 or more. Written.
        limits: int32 [num_seqs], the most tokens that a sequence has pages for.
        block_table: int32 [num_seqs, max_pages_per_seq].
        page_size: tokens of a page.
        most_positions: positions that the model has; a sequence of so many tokens is given the last.

    Returns:
        positions, int32 [num_seqs], and slots in the pool of pages, int64 [num_seqs], -1 for a sequence at its limit.

    Raises:
        KernelInputError: shapes, dtypes, strides or devices do not fit, or the block table is too narrow.
    """
    num_seqs = len(lengths)
    return launch(
        _next_slots_kernel,
        (triton.cdiv(num_seqs, BLOCK),),
        lengths,
        limits,
        block_table,
        *out,
        block_table.stride(0),
        num_seqs,
        most_positions,
        PAGE_SIZE=page_size,
        BLOCK=BLOCK,
        num_warps=1,
    )
