"""What the two attention kernels share: the walk over one sequence's keys, and the checks of their inputs.

    out = softmax(cap(softmax_scale * q.K^T) + mask).V           (Vaswani et al., 2017)
    running maximum, sum and weighted values, one tile of keys at a time (Milakov and Gimelshein, 2018)

Layout: K and V lie in pages [num_pages, page_size, num_kv_heads, head_dim]. Key j of a sequence lies in page
block_table[j // page_size], at slot j % page_size.
Order: tiles of BLOCK_N keys start at multiples of BLOCK_N, counted from the sequence's key 0. So a row meets the same
keys in the same order whatever the page size, the chunk or the batch. A tile in which a row sees no key changes no bit
of the row's state: the state is multiplied by exp2(0) = 1, and what is added is 0 times V, which is 0 for finite V.
Padding: a head_dim that is not a power of two is padded to the next one, in registers only. Two parts (96 = 64 + 32)
would multiply less, but Triton 3.6 compiles them to wrong values and reads past shared memory (docs/LOG.md).
Codes: quantised pages hold float8 e4m3 or int8 codes. Each code is widened exactly to the dtype of q. The scale of its
token and head multiplies the key's score and the value's weight.
Numerics: scores, softmax and sums are float32, in base 2 with log2(e) folded into the scale. Weights are rounded to the
dtype of q before they multiply V. Keys outside [first_key, end_key) are not read, so NaN there has no effect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    FLOATS,
    check,
    check_count,
    check_dtype,
    check_last_dim_contiguous,
    check_number,
    check_same_device,
    check_shape,
)
from .gpu import capability
from .paged_checks import check_block_table, check_keys_in_pages, check_kv_pages
from .paged_common import LIMITS, PagedKV, paged_kv

LOG2_E = 1.4426950408889634

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Scaled weights p * v_scale can be as small as 1e-7, where float16 loses bits. 64 * 65504 / 127 still fits float16.
_HALF_LIFT = tl.constexpr(64.0)


@triton.jit
def tanh(x):
    """To float32 rounding: a polynomial where 1 - exp would cancel (Cephes' split at 0.625), exponentials elsewhere."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * square * series
    decay = tl.exp2(tl.abs(x) * -2.0 * _LOG2_E)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.constexpr_function
def block_dim(head_dim):
    """BLOCK_D, the columns of a tile: the least power of two from 16 on that holds a head."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """Values or codes of a page as ``dtype``, exactly. uint8 is e4m3's bits, for devices that cannot convert e4m3."""
    if tile.dtype == tl.uint8:
        # e4m3's bits, moved to where float16 has them, are value / 2^8. Only NaN is lost, which no writer stores.
        bits = tile.to(tl.uint16)
        tile = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tile.to(dtype)


@triton.jit
def load_columns(
    ptr,  # at column 0
    rows,  # [N] element offset of each row, int64
    mask_rows,  # [N], used if MASKED
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[N, BLOCK_D] the HEAD_DIM columns of each row. Masked rows and the padding are 0."""
    offs = tl.arange(0, block_dim(HEAD_DIM))
    ptrs = ptr + rows[:, None] + offs[None, :]
    if block_dim(HEAD_DIM) > HEAD_DIM:
        mask = (offs < HEAD_DIM)[None, :]
        if MASKED:
            mask = mask & mask_rows[:, None]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    else:
        tile = tl.load(ptrs)
    return widen(tile, dtype)


@triton.jit
def store_columns(
    ptr,
    rows,  # [N] element offset of each row, int64
    mask_rows,  # [N]
    tile,  # [N, BLOCK_D]
    HEAD_DIM: tl.constexpr,
):
    offs = tl.arange(0, block_dim(HEAD_DIM))
    mask = mask_rows[:, None] & (offs < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] + offs[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


class ScoreRule(NamedTuple):
    """How q.k becomes a score in base 2, and which keys a query sees."""

    scale: float  # softmax_scale * log2(e), or softmax_scale / softcap if there is a softcap
    softcap: float | None
    window: int | None  # keys that a query sees, its own included; None for all


class Softmax(NamedTuple):
    """The running softmax of a tile's rows, float32. Scores are in base 2."""

    row_max: tl.tensor  # [M] largest score
    row_sum: tl.tensor  # [M] sum of the weights 2^(score - row_max)
    acc: tl.tensor  # [M, BLOCK_D] sum of the values times their weights


class Attended(NamedTuple):
    """Where results are stored: attention over all keys of a sequence, or over the keys of one split."""

    out: Tensor  # [num_tokens, num_heads, head_dim], contiguous; of splits [num_seqs, num_heads, splits, head_dim]
    lse: Tensor  # [num_tokens, num_heads] float32, natural log; of splits [num_seqs, num_heads, splits], log2


def score_rule(softmax_scale: float, sliding_window: int, softcap: float) -> ScoreRule:
    scale = softmax_scale / softcap if softcap else softmax_scale * LOG2_E
    return ScoreRule(scale, softcap or None, sliding_window or None)


@triton.jit
def no_keys(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax before the first key."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return Softmax(row_max, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))


@triton.jit
def attend(
    q,  # [M, BLOCK_D]
    state,  # Softmax
    positions,  # [M] position of each row's query
    kv,  # PagedKV
    kv_head,  # int64
    block_table_ptr,  # [max_pages_per_seq], at this sequence
    start,  # first key of the first tile, a multiple of BLOCK_N
    end,  # past the last key of the last tile
    first_key,  # keys before it are not read
    end_key,  # nor are keys from here on
    rule,  # ScoreRule
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,  # False promises that every row sees every key of every tile
    ONE_PAGE: tl.constexpr,  # a tile lies within one page
):
    """``state`` after the keys of the tiles in [start, end)."""
    dtype: tl.constexpr = q.dtype
    row_max, row_sum, acc = state
    k_pages_ptr = kv.k_pages + kv_head * kv.head_stride
    v_pages_ptr = kv.v_pages + kv_head * kv.head_stride
    if kv.k_scale is not None:
        k_scale_ptr = kv.k_scale + kv_head
        v_scale_ptr = kv.v_scale + kv_head
    offs_n = tl.arange(0, BLOCK_N)
    page_mask = (1 << kv.page_shift) - 1
    for tile_start in tl.range(start, end, BLOCK_N):
        keys = tile_start + offs_n
        mask_keys = (keys >= first_key) & (keys < end_key)
        if ONE_PAGE:
            page = tl.load(block_table_ptr + (tile_start >> kv.page_shift)).to(tl.int64)
            slots = (tile_start & page_mask) + offs_n
        else:
            if MASKED:
                page = tl.load(block_table_ptr + (keys >> kv.page_shift), mask=mask_keys, other=0).to(tl.int64)
            else:
                page = tl.load(block_table_ptr + (keys >> kv.page_shift)).to(tl.int64)
            slots = offs_n & page_mask
        rows = page * kv.page_stride + slots.to(tl.int64) * kv.slot_stride

        k = load_columns(k_pages_ptr, rows, mask_keys, dtype, HEAD_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if kv.k_scale is not None:
            scale_rows = ((page << kv.page_shift) + slots) * kv.num_kv_heads
            scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)[None, :]
        scale = rule.scale
        if rule.softcap is not None:
            scores = tanh(scores * rule.scale)
            scale = rule.softcap * _LOG2_E
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if rule.window is not None:
                visible = visible & (positions[:, None] - keys[None, :] < rule.window)
            scores = tl.where(visible, scores, float("-inf"))

        # An explicit fma, because masked and unmasked tiles must round alike.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        decay = tl.exp2(row_max - shift)
        row_sum = tl.fma(row_sum, decay, tl.sum(weights, axis=1))
        row_max = new_max
        if kv.k_scale is not None:
            v_scale = tl.load(v_scale_ptr + scale_rows, mask=mask_keys, other=0.0)
            if dtype == tl.float16:
                v_scale *= _HALF_LIFT
            weights *= v_scale[None, :]
        weights = weights.to(dtype)

        v = load_columns(v_pages_ptr, rows, mask_keys, dtype, HEAD_DIM, MASKED)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    return Softmax(row_max, row_sum, acc)


@triton.jit
def normalized(state, dtype: tl.constexpr, SCALED: tl.constexpr):
    """[M, BLOCK_D] the weighted mean of the values; 0 for a row that saw no key.

    The acc of such a row may be NaN: 0 times a NaN that another row of the block sees.
    """
    total = state.row_sum
    if SCALED and dtype == tl.float16:
        total *= _HALF_LIFT
    unseen = state.row_sum == 0.0
    return tl.where(unseen[:, None], 0.0, state.acc / tl.where(unseen, 1.0, total)[:, None])


@triton.jit
def log2_sum(row_max, row_sum):
    """[M] log2 of the sum of 2^score; -inf for a row that saw no key."""
    return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))


@triton.jit
def natural(lse):
    """From base 2 to base e."""
    return lse * _LN_2


def converts_float8(device: torch.device) -> bool:
    """Whether Triton converts e4m3: on Nvidia's devices from compute capability 8.9 on. Elsewhere ``widen`` does."""
    return capability(device) >= (8, 9)


def attention_kv(k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> PagedKV:
    """The pages, e4m3 codes as their bits where Triton cannot convert them."""
    if k_pages.dtype == torch.float8_e4m3fn and not converts_float8(k_pages.device):
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    return paged_kv(k_pages, v_pages, k_scale, v_scale)


def result_like_q(q: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse float32)."""
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def check_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softmax_scale: float,
    sliding_window: int,
    softcap: float,
) -> None:
    """All checks that read no element of a tensor."""
    check_shape("q", q, (None, None, None))
    num_heads, head_dim = q.shape[1:]
    check_dtype("q", q, FLOATS)
    check_kv_pages(k_pages, v_pages, k_scale, v_scale)
    check_shape("k_pages", k_pages, (None, None, None, head_dim))
    check_block_table(block_table, seq_lens)
    num_kv_heads = k_pages.shape[2]
    check(
        num_kv_heads > 0 and num_heads > 0 and num_heads % num_kv_heads == 0,
        f"{num_heads} query heads over {num_kv_heads} K/V heads",
        "num_heads must be a multiple of num_kv_heads",
        "Read both numbers from the same model",
    )
    check(
        k_pages.dtype in LIMITS or q.dtype in (k_pages.dtype, torch.float32),
        f"q is {q.dtype}, the pages are {k_pages.dtype}",
        "pages of floats have the dtype of q, or q is float32",
        "Convert q",
    )
    check_same_device(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        block_table=block_table,
        seq_lens=seq_lens,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    check_last_dim_contiguous(q=q)
    check_number("softmax_scale", softmax_scale, positive=True)
    check_number("softcap", softcap)
    check_count("sliding_window", sliding_window, "tokens, 0 for all")


def check_reach(q_lens: Tensor | int, seq_lens: Tensor, block_table: Tensor, k_pages: Tensor, window: int) -> None:
    """Every key in reach of the queries must lie in a page. Reads the tensors, so it is for tensors on the CPU."""
    first_keys = (seq_lens - q_lens - window + 1).clamp(min=0) if window else torch.zeros_like(seq_lens)
    check_keys_in_pages(block_table, seq_lens, first_keys, k_pages.shape[0], k_pages.shape[1])
