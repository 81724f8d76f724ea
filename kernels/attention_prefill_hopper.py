"""Prefill attention on Hopper: one warp loads K/V tiles, warpgroups of 64 rows multiply and take turns.

The definition, the layout, the rows and the order of the keys are those of ``attention_prefill``, which see. What
differs is who does what, and when; docs/WARP_ROLES.md draws it. It serves 16-bit pages of head_dim 33 to 128 on
compute capability 9.x.

Roles: a program is one producer, a warp that copies tiles of BLOCK_N keys into two rings of STAGES tiles by the copy
engine (TMA), and CONSUMERS of 64 rows each. A consumer multiplies (wgmma) and keeps its rows' softmax in registers.
Barriers: k_full and v_full say that a tile has arrived, k_empty and v_empty that every consumer is done with it. turns
says which consumer issues products next: while one consumer's products run, another one computes its softmax.
Order within a consumer: the scores of tile t + 1 are issued before the values of tile t. So the tensor cores work on
the latter while the maxima of t + 1 are found. The queries of the next block are loaded beside a block's last product.
Grid: one program per multiprocessor. It takes every num_programs-th block, longest first, and every other time in
reverse, so that all programs get about the same number of keys. The producer is ahead by a ring, across blocks too.
Bits: as in ``attention_prefill``, a row's bits depend on its own query and keys alone. They are not the bits of the
other kernel, whose tiles are shorter. Keys that the sequence has not, or that lie before the window of every row of the
block, are cleared in V's tile, so NaN there has no effect.
Moves: K/V once per 64 x CONSUMERS rows; as many flops as the other kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_common import Attended, ScoreRule
from .attention_prefill_blocks import Sequences, count_blocks
from .attention_prefill_hopper_roles import ROWS, consume, produce
from .attention_prefill_hopper_tiles import (
    Rings,
    Work,
    allocate_tiles,
    log2_page_size,
    part_widths,
    thread_barrier,
    tile_layout,
)
from .bound import Launch, launch
from .gpu import capability, num_multiprocessors
from .launch import configuration
from .paged_common import heads_of

_ROWS = gl.constexpr(ROWS)


@gluon.jit
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


# One code for every batch. Numbers in a NamedTuple are specialised whatever is said here, so these are not in one.
@gluon.jit(do_not_specialize=["block_table_stride", "num_tokens", "num_seqs"])
def _attention_prefill_hopper_kernel(
    q,  # Heads
    k_boxes,  # descriptor of [num_pages, num_kv_heads, page_size, head_dim], boxes [1, 1, rows, columns]
    v_boxes,
    k_rest,  # the same with boxes for the narrower part, if there is one
    v_rest,
    sequences,  # Sequences
    block_table_stride,
    result,  # Attended
    num_tokens,
    num_seqs,
    rule,  # ScoreRule
    GROUP: gl.constexpr,  # query heads per K/V head
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    q_tiles = allocate_tiles(DTYPE, CONSUMERS, _ROWS, HEAD_DIM)
    rings = Rings(
        (k_boxes, k_rest) if len(q_tiles) == 2 else (k_boxes,),
        (v_boxes, v_rest) if len(q_tiles) == 2 else (v_boxes,),
        allocate_tiles(DTYPE, STAGES, BLOCK_N, HEAD_DIM),
        allocate_tiles(DTYPE, STAGES, BLOCK_N, HEAD_DIM),
        _barriers(STAGES, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, CONSUMERS),
        _barriers(STAGES, CONSUMERS),
        _barriers(CONSUMERS, 1),
    )
    fence_async_shared()
    thread_barrier()

    num_blocks = num_tokens * GROUP // (CONSUMERS * _ROWS) + num_seqs + 1  # as count_blocks says
    page_shift = log2_page_size(k_boxes.shape[2])
    work = Work(
        sequences, block_table_stride, num_tokens, num_seqs, num_blocks, NUM_KV_HEADS, GROUP, page_shift, rule.window
    )
    num_turns = gl.cdiv(num_blocks * NUM_KV_HEADS, gl.num_programs(0))
    # Then the warps of each role but the first, and their registers per thread. The first role has what is left.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, q, q_tiles, work, rings, result, num_turns, rule, HEAD_DIM)),
                (consume, (1, q, q_tiles, work, rings, result, num_turns, rule, HEAD_DIM)),
                (produce, (work, rings, num_turns, 2 * _ROWS, HEAD_DIM)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, q, q_tiles, work, rings, result, num_turns, rule, HEAD_DIM)),
                (consume, (1, q, q_tiles, work, rings, result, num_turns, rule, HEAD_DIM)),
                (consume, (2, q, q_tiles, work, rings, result, num_turns, rule, HEAD_DIM)),
                (produce, (work, rings, num_turns, 3 * _ROWS, HEAD_DIM)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


def serves(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> bool:
    """Whether this kernel can compute the call, and the launch table leaves it the choice."""
    head_dim, device = q.shape[2], q.device
    return (
        capability(device)[0] == 9
        and q.dtype == k_pages.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and 32 < head_dim <= 128
        and len(k_pages) > 0
        and configuration("attention_prefill_hopper", device, head_dim=head_dim)["STAGES"] > 0
        and all(pages.data_ptr() % 16 == 0 for pages in (k_pages, v_pages))  # as the copy engine needs
        and all(stride * k_pages.element_size() % 16 == 0 for stride in k_pages.stride()[:3])
    )


def _boxes(pages: Tensor, rows: int, part: int) -> TensorDescriptor:
    """A descriptor of the pages whose boxes fill a part of this width."""
    num_pages, page_size, num_kv_heads, head_dim = pages.shape
    page_stride, slot_stride, head_stride, _ = pages.stride()
    shape, strides = [num_pages, num_kv_heads, page_size, head_dim], [page_stride, head_stride, slot_stride, 1]
    return TensorDescriptor(pages, shape, strides, [1, 1, rows, min(64, part)], tile_layout(part, 4))


def launch_hopper(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    sequences: Sequences,
    rule: ScoreRule,
) -> Launch:
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_pages.shape
    tile = configuration("attention_prefill_hopper", q.device, head_dim=head_dim)
    rows = min(page_size, tile["BLOCK_N"])
    group = num_heads // num_kv_heads
    num_seqs = len(sequences.seq_lens)
    num_blocks = count_blocks(num_tokens * group, num_seqs, ROWS * tile["CONSUMERS"])
    widths = part_widths(head_dim)
    return launch(
        _attention_prefill_hopper_kernel,
        (min(num_multiprocessors(q.device), num_blocks * num_kv_heads),),
        heads_of(q),
        _boxes(k_pages, rows, widths[0]),
        _boxes(v_pages, rows, widths[0]),
        _boxes(k_pages, rows, widths[-1]),
        _boxes(v_pages, rows, widths[-1]),
        sequences,
        sequences.block_table.stride(0),
        Attended(*out),
        num_tokens,
        num_seqs,
        rule,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        num_warps=4,
        **tile,
    )
