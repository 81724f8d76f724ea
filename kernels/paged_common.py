"""What the kernels over K/V pages share: their arguments, the codes of quantised pages, and how definitions are run.

Quantised pages hold int8 or float8 e4m3 codes, with scales [num_pages, page_size, num_kv_heads], float32:
    scale = max|x| / limit, limit 127 or 448;  code = x / scale, rounded half to even;  value = code * scale
A row of zeros has scale 0. A row with an infinity or a NaN has scale NaN, so that readers see it.
Numerics: float32 divisions are correctly rounded, as in the NumPy definition. e4m3 is encoded with integer arithmetic,
because not every target converts it and Triton's interpreter rounds it wrongly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import Kernel, run_definition

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}  # the largest code
WRITE_ELEMENTS = 1024  # elements of heads x head_dim that one program writes
_INT8_LIMIT = tl.constexpr(127)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # float32's step there is 1, so adding it rounds to an integer


class Heads(NamedTuple):
    """q, k or v, as a kernel takes them."""

    ptr: Tensor  # [num_tokens, num_heads, head_dim], the last dimension contiguous
    token_stride: int
    head_stride: int


class PagedKV(NamedTuple):
    """K and V in pages, as a kernel takes them. The strides are those of both pools."""

    k_pages: Tensor  # [num_pages, page_size, num_kv_heads, head_dim], the last dimension contiguous
    v_pages: Tensor | None  # the same
    k_scale: Tensor | None  # [num_pages, page_size, num_kv_heads] float32, contiguous; None for float pages
    v_scale: Tensor | None  # the same
    page_stride: int
    slot_stride: int
    head_stride: int
    num_kv_heads: int
    page_shift: int  # log2(page_size)


def heads_of(x: Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1))


def paged_kv(k_pages: Tensor, v_pages: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> PagedKV:
    _, page_size, num_kv_heads, _ = k_pages.shape
    page_stride, slot_stride, head_stride, _ = k_pages.stride()
    page_shift = page_size.bit_length() - 1
    return PagedKV(k_pages, v_pages, k_scale, v_scale, page_stride, slot_stride, head_stride, num_kv_heads, page_shift)


@triton.jit
def largest_magnitude(x):
    """[ROWS, COLUMNS] float32 -> [ROWS]; NaN if the row holds an infinity or a NaN, which tl.max may ignore."""
    return tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)


@triton.jit
def row_scale(largest, LIMIT: tl.constexpr):
    return tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))


@triton.jit
def encode(x, scale, LIMIT: tl.constexpr):
    """[ROWS, COLUMNS] float32, [ROWS] -> codes: int8, or e4m3's bits as uint8."""
    divisor = tl.where(scale > 0.0, scale, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    ratio = tl.minimum(tl.maximum(ratio, -LIMIT), LIMIT)
    if LIMIT == _INT8_LIMIT:
        codes = ((ratio + _ROUNDER) - _ROUNDER).to(tl.int8)
    else:
        bits = ratio.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # From 2^-6 on: drop 20 of 23 fraction bits, rounding half to even, and take the exponent's bias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # Below, e4m3's step is 2^-9. That is float32's step at 2^14: adding 2^14 rounds, and the low bits are the code.
        subnormal = (tl.abs(ratio) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
        codes = (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def slot_offset(slot, kv):
    """Elements from the start of a pool to a slot, int64."""
    slot_in_page = slot & ((1 << kv.page_shift) - 1)
    return (slot >> kv.page_shift) * kv.page_stride + slot_in_page * kv.slot_stride


@triton.jit
def write_heads(
    x,  # Heads: k or v
    token,
    pages_ptr,  # kv.k_pages or kv.v_pages
    scale_ptr,  # kv.k_scale or kv.v_scale, written if LIMIT
    kv,  # PagedKV
    slot,  # int64
    heads,  # [BLOCK_HEADS] int64
    LIMIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write one token's heads to its slot, as they are or quantised."""
    offs = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask_heads = heads < kv.num_kv_heads
    mask = mask_heads[:, None] & (offs < HEAD_DIM)[None, :]
    x_ptr = x.ptr + token * x.token_stride
    ptrs = x_ptr + heads[:, None] * x.head_stride + offs[None, :]
    values = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    slot_ptr = pages_ptr + slot_offset(slot, kv)
    ptrs = slot_ptr + heads[:, None] * kv.head_stride + offs[None, :]
    if LIMIT:
        scale = row_scale(largest_magnitude(values), LIMIT)
        tl.store(scale_ptr + slot * kv.num_kv_heads + heads, scale, mask=mask_heads)
        tl.store(ptrs, encode(values, scale, LIMIT), mask=mask)
    else:
        tl.store(ptrs, values.to(pages_ptr.dtype.element_ty), mask=mask)


POOLS = ("k_pages", "v_pages", "k_scale", "v_scale", "pages", "scale")


def _needs_copies(pools: dict[str, Tensor]) -> bool:
    """Whether NumPy cannot work on the pools themselves: it lacks bfloat16 and float8, and sees the CPU alone."""
    return any(p.device.type != "cpu" or p.dtype in (torch.bfloat16, torch.float8_e4m3fn) for p in pools.values())


def _pools(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arguments[name] for name in POOLS if arguments.get(name) is not None}


def read_by_definition(one: Kernel, arguments: dict[str, Any]) -> Any:
    """Run a definition that reads pages, on the pages in its block table alone: a pool is too large to convert."""
    pools = _pools(arguments)
    if not _needs_copies(pools):
        return run_definition(one, arguments)
    num_pages = next(iter(pools.values())).shape[0]
    used, table = torch.unique(arguments["block_table"].clamp(0, max(0, num_pages - 1)), return_inverse=True)
    used = used[:num_pages]  # none of an empty pool
    few = {name: as_codes(pool)[used].view(pool.dtype) for name, pool in pools.items()}
    return run_definition(one, {**arguments, **few, "block_table": table})


def write_by_definition(one: Kernel, arguments: dict[str, Any]) -> Any:
    """Run a definition that writes pages, on pages of one slot each, and copy what it wrote to the pools."""
    pools, slot_mapping = _pools(arguments), arguments["slot_mapping"]
    if not _needs_copies(pools):
        return run_definition(one, arguments)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    page_size = pools["k_pages"].shape[1]
    where = slots // page_size, slots % page_size
    few = {name: as_codes(pool)[where].unsqueeze(1).view(pool.dtype) for name, pool in pools.items()}
    result = run_definition(one, {**arguments, **few, "slot_mapping": torch.where(kept, kept.cumsum(0) - 1, -1)})
    for name, pool in pools.items():
        as_codes(pool)[where] = as_codes(few[name])[:, 0]
    return result


def write_blocks(num_heads: int, head_dim: int) -> tuple[int, int]:
    """(BLOCK_HEADS, BLOCK_DIM) for about WRITE_ELEMENTS elements per program. No heads at all count as one."""
    block_dim = triton.next_power_of_2(head_dim)
    return min(triton.next_power_of_2(max(1, num_heads)), max(1, WRITE_ELEMENTS // block_dim)), block_dim


def as_codes(pages: Tensor) -> Tensor:
    """e4m3 pages as their bits, since Triton does not handle e4m3 on every device; other pages as they are."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
