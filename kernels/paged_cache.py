"""Writing, gathering and copying K/V in pages.

Layout: k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim], page_size a power of two from 16 to 256. Slot s
of the pool lies in page s // page_size, at s % page_size. Key j of a sequence lies in page block_table[j // page_size],
at j % page_size. Quantised pages hold int8 or e4m3 codes and a scale per token and head (paged_common).
One program owns one token and a block of its heads (write), one page of one sequence (gather), or a block of one page
(copy).
Numerics: float pages hold the input, rounded once. A gathered code is multiplied by its scale in float32.
Moves: reads and writes each value once: bandwidth-bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .attention_common import widen
from .backend import as_array
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
from .kernel import Kernel, Launch, kernel, launch, nothing, run_definition
from .paged_checks import check_block_table, check_keys_in_pages, check_pages, check_write
from .paged_common import (
    LIMITS,
    as_codes,
    heads_of,
    paged_kv,
    read_by_definition,
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
        for start in range(0, seq, BLOCK_SEQS):  # add the lengths of the sequences in front of this one
            seqs = start + tl.arange(0, BLOCK_SEQS)
            out_key += tl.sum(tl.load(seq_lens_ptr + seqs, mask=seqs < seq, other=0).to(tl.int64), axis=0)
        out_row = out_key * kv.num_kv_heads
        # Nothing past the end of ``out``: the host chose its size without reading the lengths.
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


@kernel(
    checks=check_write,
    output=nothing,
    definition=reference.write_kv,
    mutates=("k_pages", "v_pages", "k_scale", "v_scale"),
    by_definition=write_by_definition,
)
def write_kv(
    out: None,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Launch:
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
        KernelInputError: shapes, dtypes or devices do not fit, or (checked on the CPU only) a slot lies past the pages.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    block_heads, block_dim = write_blocks(num_kv_heads, head_dim)
    return launch(
        _write_kv_kernel,
        (num_tokens, triton.cdiv(num_kv_heads, block_heads)),
        heads_of(k),
        heads_of(v),
        paged_kv(as_codes(k_pages), as_codes(v_pages), k_scale, v_scale),
        slot_mapping,
        LIMIT=LIMITS.get(k_pages.dtype, 0),
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        num_warps=max(1, block_heads * block_dim // 256),
    )


def _check_gather(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor | None,
    num_keys: int,
    dtype: torch.dtype | None,
) -> None:
    check_pages("pages", pages, "scale", scale)
    check_block_table(block_table, seq_lens)
    check_same_device(pages=pages, block_table=block_table, seq_lens=seq_lens, scale=scale)
    wanted = dtype or _gathered_dtype(pages)
    check(wanted in FLOATS, f"dtype is {dtype}", "keys become float32, float16 or bfloat16", "Choose one of them")
    check_count("num_keys", num_keys, "the keys of all sequences")
    check_sequences(block_table.shape[0])
    if pages.device.type == "cpu":
        check_keys_in_pages(block_table, seq_lens, torch.zeros_like(seq_lens), pages.shape[0], pages.shape[1])
        total = int(seq_lens.sum())
        check(num_keys == total, f"num_keys is {num_keys}", f"the sum of seq_lens is {total}", "Pass the sum")


def _gathered_dtype(pages: Tensor) -> torch.dtype:
    return torch.float32 if pages.dtype in LIMITS else pages.dtype


def _gathered(pages: Tensor, num_keys: int, dtype: torch.dtype | None, **_: Any) -> Tensor:
    return torch.empty((num_keys, *pages.shape[2:]), dtype=dtype or _gathered_dtype(pages), device=pages.device)


@kernel(checks=_check_gather, output=_gathered, definition=reference.gather_kv, by_definition=read_by_definition)
def gather_kv(
    out: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor | None = None,
    *,
    num_keys: int,
    dtype: torch.dtype | None = None,
) -> Launch:
    """The keys (or values) of all sequences, one sequence after the other.

    Args:
        pages: [num_pages, page_size, num_kv_heads, head_dim], a float dtype, int8 or float8_e4m3fn.
        block_table: int32 [num_seqs, max_pages_per_seq].
        seq_lens: int32 [num_seqs].
        scale: float32 [num_pages, page_size, num_kv_heads], for int8 and float8 pages only.
        num_keys: the sum of seq_lens, an argument so that the host need not wait for the device. A GPU does not compare
            it with that sum: a smaller num_keys leaves the last keys out, a larger one leaves rows unwritten.
        dtype: of the result, float32, float16 or bfloat16; by default that of the pages, float32 for int8 and float8.

    Returns:
        [num_keys, num_kv_heads, head_dim].

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (checked on the CPU only) the table names a page that
            does not exist or ``num_keys`` is wrong.
    """
    _, page_size, num_kv_heads, head_dim = pages.shape
    block_rows, _ = write_blocks(page_size * num_kv_heads, head_dim)
    return launch(
        _gather_kv_kernel,
        (block_table.shape[1], block_table.shape[0]),
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


def _check_copy(pages: Tensor, source: Tensor, target: Tensor) -> None:
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
        _check_copied_pages(as_array(source), as_array(target), pages.shape[0])


def _check_copied_pages(source: np.ndarray, target: np.ndarray, num_pages: int) -> None:
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


def _bits(pages: Tensor) -> Tensor:
    return pages.view(_BITS[pages.element_size()])


def _copy_by_definition(one: Kernel, arguments: dict[str, Any]) -> None:
    run_definition(one, {**arguments, "pages": _bits(arguments["pages"])})


@kernel(
    checks=_check_copy,
    output=nothing,
    definition=reference.copy_pages,
    mutates=("pages",),
    by_definition=_copy_by_definition,
    moves_bits=True,
)
def copy_pages(out: None, pages: Tensor, source: Tensor, target: Tensor) -> Launch:
    """Copy whole pages inside a pool, bit for bit: pages[target[i]] = pages[source[i]].

    Args:
        pages: [num_pages, ...], any dtype of 1, 2 or 4 bytes, each page contiguous; scales as well as K or V. Written.
        source: int32 or int64 [num_copies].
        target: the same, each page at most once, and none that is also a source.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (checked on the CPU only) a page does not exist or is
            written twice, or read and written.
    """
    page_elements = pages[:1].numel()
    return launch(
        _copy_pages_kernel,
        (source.shape[0], triton.cdiv(page_elements, COPY_BLOCK)),
        _bits(pages),
        source,
        target,
        pages.stride(0),
        page_elements,
        BLOCK=COPY_BLOCK,
    )
