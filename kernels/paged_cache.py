"""Writing, gathering and copying K/V in pages.

Layout: k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim], page_size a power of two from 16 to 256. Slot s
of the pool lies in page s // page_size, at s % page_size. Key j of a sequence lies in page block_table[j // page_size],
at j % page_size. Quantised pages hold int8 or e4m3 codes and a scale per token and head (paged_common).
One program owns: one token and a block of its heads (write); one page of one sequence (gather); a block of one page
(copy).
Numerics: float pages hold the input rounded once; a gathered code is multiplied by its scale in float32.
Moves: each value once in and once out: bandwidth-bound.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .attention_common import widen
from .backend import as_array, as_tensor, runs_numpy
from .checks import (
    FLOATS,
    INTEGERS,
    check,
    check_count,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_sequences,
    check_shape,
)
from .operators import operator
from .paged_checks import check_block_table, check_keys_in_pages, check_pages, check_write
from .paged_common import (
    LIMITS,
    as_codes,
    compact_pages,
    heads_of,
    paged_kv,
    write_blocks,
    write_by_definition,
    write_heads,
)

COPY_BLOCK = 4096
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def _write_kv_kernel(
    k,  # Heads
    v,  # Heads
    kv,  # PagedKV
    slot_mapping_ptr,  # [num_tokens]
    LIMIT: tl.constexpr,  # largest code, 0 for float pages
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        write_heads(k, token, kv.k_pages, kv.k_scale, kv, slot, heads, LIMIT, HEAD_DIM)
        write_heads(v, token, kv.v_pages, kv.v_scale, kv, slot, heads, LIMIT, HEAD_DIM)


@triton.jit(do_not_specialize=["num_keys"])  # one code for every batch
def _gather_kv_kernel(
    kv,  # PagedKV, of one pool: k_pages and k_scale
    block_table_ptr,  # [num_seqs, max_pages_per_seq]
    block_table_stride,
    seq_lens_ptr,  # [num_seqs]
    out_ptr,  # [num_keys, num_kv_heads, HEAD_DIM]
    num_keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # rows are (slot, head) pairs
    BLOCK_SEQS: tl.constexpr,
):
    index = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    page_size = 1 << kv.page_shift
    first_key = index * page_size
    if first_key < seq_len:
        page = tl.load(block_table_ptr + seq * block_table_stride + index).to(tl.int64)
        out_key = first_key.to(tl.int64)
        for start in range(0, seq, BLOCK_SEQS):  # after the keys of the sequences in front of this one
            seqs = start + tl.arange(0, BLOCK_SEQS)
            out_key += tl.sum(tl.load(seq_lens_ptr + seqs, mask=seqs < seq, other=0).to(tl.int64), axis=0)
        out_row = out_key * kv.num_kv_heads
        # none past the end of ``out``, which the host sized without seeing the lengths
        keys = tl.minimum(tl.minimum(page_size, seq_len - first_key), num_keys - out_key)
        num_rows = tl.maximum(keys, 0).to(tl.int32) * kv.num_kv_heads
        offs = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
        for start in range(0, num_rows, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            mask_rows = rows < num_rows
            mask = mask_rows[:, None] & (offs < HEAD_DIM)[None, :]
            slots_in_page, heads = (rows // kv.num_kv_heads).to(tl.int64), (rows % kv.num_kv_heads).to(tl.int64)
            offs_rows = page * kv.page_stride + slots_in_page * kv.slot_stride + heads * kv.head_stride
            x = tl.load(kv.k_pages + offs_rows[:, None] + offs[None, :], mask=mask, other=0)
            if kv.k_scale is not None:
                scale_row = page * page_size * kv.num_kv_heads
                scale = tl.load(kv.k_scale + scale_row + rows, mask=mask_rows, other=0.0)
                x = widen(x, tl.float32) * scale[:, None]
            out_rows = (out_row + rows) * HEAD_DIM
            tl.store(out_ptr + out_rows[:, None] + offs[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_pages_kernel(
    pages_ptr,  # [num_pages, page_elements]
    source_ptr,  # [num_copies]
    target_ptr,  # [num_copies]
    page_stride,
    page_elements,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < page_elements
    source = tl.load(source_ptr + copy).to(tl.int64) * page_stride
    target = tl.load(target_ptr + copy).to(tl.int64) * page_stride
    tl.store(pages_ptr + target + offs, tl.load(pages_ptr + source + offs, mask=mask), mask=mask)


def _write_kv_fake(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    return None


@operator(_write_kv_fake, mutates=("k_pages", "v_pages", "k_scale", "v_scale"))
def write_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write each token's keys and values to its slot.

    Args:
        k: [num_tokens, num_kv_heads, head_dim], float32, float16 or bfloat16; any token and head strides.
        v: the same shape and dtype.
        k_pages: [num_pages, page_size, num_kv_heads, head_dim], a float dtype, int8 or float8_e4m3fn. Written.
        v_pages: the same shape, dtype and strides. Written.
        slot_mapping: int64 [num_tokens], page * page_size + slot, each slot at most once; negative writes nothing.
        k_scale: float32 [num_pages, page_size, num_kv_heads], contiguous, for int8 and float8 pages only. Written.
        v_scale: the same for V. Written.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) a slot lies past the pages.
    """
    check_write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    if runs_numpy(k, k_pages):
        k_array, v_array = as_array(k), as_array(v)
        write_by_definition(
            lambda *pages: reference.write_kv(k_array, v_array, *pages),
            k_pages,
            v_pages,
            slot_mapping,
            k_scale,
            v_scale,
        )
        return
    num_tokens, num_kv_heads, head_dim = k.shape
    if k.numel() == 0:
        return
    block_heads, block_dim = write_blocks(num_kv_heads, head_dim)
    _write_kv_kernel[(num_tokens, triton.cdiv(num_kv_heads, block_heads))](
        heads_of(k),
        heads_of(v),
        paged_kv(as_codes(k_pages), as_codes(v_pages), k_scale, v_scale),
        slot_mapping,
        LIMIT=LIMITS.get(k_pages.dtype, 0),
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        num_warps=max(1, block_heads * block_dim // 256),
    )


def _gather_dtype(pages: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float32 if pages.dtype in LIMITS else pages.dtype)


def _gather_kv_fake(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor | None = None,
    *,
    num_keys: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty((num_keys, *pages.shape[2:]), dtype=_gather_dtype(pages, dtype), device=pages.device)


@operator(_gather_kv_fake)
def gather_kv(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor | None = None,
    *,
    num_keys: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The keys (or values) of all sequences, one sequence after the other.

    Args:
        pages: [num_pages, page_size, num_kv_heads, head_dim], a float dtype, int8 or float8_e4m3fn.
        block_table: int32 [num_seqs, max_pages_per_seq].
        seq_lens: int32 [num_seqs].
        scale: float32 [num_pages, page_size, num_kv_heads], for int8 and float8 pages only.
        num_keys: sum of seq_lens; given, so that the host need not wait for the device. On a GPU, where it is not
            compared with that sum, a smaller one leaves the last keys out and a larger one leaves rows unwritten.
        dtype: of the result, float32, float16 or bfloat16; that of the pages by default, float32 for int8 and float8.

    Returns:
        [num_keys, num_kv_heads, head_dim].

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) the table names a page that
            does not exist or ``num_keys`` is wrong.
    """
    check_pages("pages", pages, "scale", scale)
    check_block_table(block_table, seq_lens)
    check_same_device(pages=pages, block_table=block_table, seq_lens=seq_lens, scale=scale)
    out_dtype = _gather_dtype(pages, dtype)
    check(out_dtype in FLOATS, f"dtype is {dtype}", "keys become float32, float16 or bfloat16", "Choose one of them")
    check_count("num_keys", num_keys, "the keys of all sequences")
    check_sequences(block_table.shape[0])
    if pages.device.type == "cpu":
        check_keys_in_pages(block_table, seq_lens, torch.zeros_like(seq_lens), pages.shape[0], pages.shape[1])
        total = int(seq_lens.sum())
        check(num_keys == total, f"num_keys is {num_keys}", f"the sum of seq_lens is {total}", "Pass the sum")
    _, page_size, num_kv_heads, head_dim = pages.shape
    out = torch.empty((num_keys, num_kv_heads, head_dim), dtype=out_dtype, device=pages.device)
    if runs_numpy(pages, out):
        pages, scale, table = compact_pages(pages, scale, block_table=block_table)
        scale_array = None if scale is None else as_array(scale)
        rows = reference.gather_kv(as_array(pages), as_array(table), as_array(seq_lens), scale_array)
        return as_tensor(rows, like=pages, dtype=out_dtype)
    if out.numel() == 0:
        return out
    block_rows, _ = write_blocks(page_size * num_kv_heads, head_dim)
    _gather_kv_kernel[(block_table.shape[1], block_table.shape[0])](
        paged_kv(as_codes(pages), None, scale, None),
        block_table,
        block_table.stride(0),
        seq_lens,
        out,
        num_keys,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_SEQS=1024,
    )
    return out


def _copy_pages_fake(pages: Tensor, source: Tensor, target: Tensor) -> None:
    return None


@operator(_copy_pages_fake, mutates=("pages",))
def copy_pages(pages: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole pages inside a pool, bit for bit: pages[target[i]] = pages[source[i]].

    Args:
        pages: [num_pages, ...], any dtype of 1, 2 or 4 bytes, each page contiguous; scales as well as K or V. Written.
        source: int32 or int64 [num_copies].
        target: the same, each page at most once, and none that is also a source.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) a page does not exist or is
            written twice, or read and written.
    """
    check(
        pages.dim() > 1 and pages[:1].is_contiguous() and pages.element_size() in _BITS,
        f"pages is {pages.dtype} {list(pages.shape)} with strides {pages.stride()}",
        "each page is contiguous, its elements of 1, 2 or 4 bytes",
        "Allocate the pages with torch.empty",
    )
    check_shape("source", source, (None,))
    check_shape("target", target, tuple(source.shape))
    check_dtype("source", source, INTEGERS)
    check_dtype("target", target, INTEGERS)
    check_same_device(pages=pages, source=source, target=target)
    check_last_dim_contiguous(source=source, target=target)
    if pages.device.type == "cpu":
        _check_copies(as_array(source), as_array(target), pages.shape[0])
    bits = pages.view(_BITS[pages.element_size()])
    if runs_numpy(bits):
        array = as_array(bits)
        reference.copy_pages(array, as_array(source), as_array(target))
        if pages.device.type != "cpu":
            bits.copy_(torch.from_numpy(array))
        return
    page_elements = pages[:1].numel()
    if source.numel() and page_elements:
        grid = (source.shape[0], triton.cdiv(page_elements, COPY_BLOCK))
        _copy_pages_kernel[grid](bits, source, target, pages.stride(0), page_elements, BLOCK=COPY_BLOCK)


def _check_copies(source: np.ndarray, target: np.ndarray, num_pages: int) -> None:
    both = np.concatenate([source, target])
    check(
        not both.size or (both.min() >= 0 and both.max() < num_pages),
        f"copies name pages {both.min(initial=0)} to {both.max(initial=0)}",
        f"pages are numbered 0 to {num_pages - 1}",
        "Take both from this pool",
    )
    check(
        np.unique(target).size == target.size and not np.isin(target, source).any(),
        f"targets {target.tolist()} of sources {source.tolist()}",
        "a page is written once, and no page is both read and written",
        "Split the copies over two calls",
    )
