"""How prefill attention cuts the rows of a ragged batch into blocks, for both of its kernels.

Row r of a sequence is its token r // group, head r % group of one K/V head. A block is BLOCK_M rows of one sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sequences(NamedTuple):
    """Where each sequence's queries and keys lie, and how many keys it has. All int32."""

    query_start_loc: Tensor  # [num_seqs + 1]
    block_table: Tensor  # [num_seqs, max_pages_per_seq]
    seq_lens: Tensor  # [num_seqs]


def count_blocks(num_rows: int, num_seqs: int, block_m: int) -> int:
    """Blocks that hold ``num_rows`` rows of one K/V head, however they are shared among the sequences.

    A sequence of R rows spans at most R // block_m + 1 blocks, and so do the tokens that belong to none.
    """
    return num_rows // block_m + num_seqs + 1


@triton.jit
def first_block(query_start_loc_ptr, sequence, group, BLOCK_M: tl.constexpr):
    """The block at which a sequence's rows start.

    Adding the sequence's number leaves room for the block that is not full, so two sequences never share a block.
    """
    return tl.load(query_start_loc_ptr + sequence) * group // BLOCK_M + sequence


@triton.jit
def find_sequence(query_start_loc_ptr, block, num_seqs, group, BLOCK_M: tl.constexpr):
    """The last sequence that starts at or before ``block``; num_seqs for tokens that belong to no sequence."""
    low = 0
    high = num_seqs + 1
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(query_start_loc_ptr, middle, group, BLOCK_M) <= block:
            low = middle
        else:
            high = middle
    return low
