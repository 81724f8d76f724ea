"""The checks of K/V pages, scales, block tables and slots that the kernels over pages share.

Each raises KernelInputError before any launch. The elements of a table or a slot mapping are read for CPU tensors only,
since reading them from a GPU would make every call wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import as_array
from .checks import FLOATS, check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .paged_common import LIMITS

PAGE_SIZES = (16, 32, 64, 128, 256)


def check_pages(name: str, pages: Tensor, scale_name: str, scale: Tensor | None) -> None:
    """One pool, [num_pages, page_size, num_kv_heads, head_dim], and the scales of its codes."""
    check_shape(name, pages, (None, None, None, None))
    page_size, head_dim = pages.shape[1], pages.shape[3]
    check(
        page_size in PAGE_SIZES,
        f"page_size is {page_size}",
        "page_size must be a power of two from 16 to 256",
        "Allocate the pages anew",
    )
    check(0 < head_dim <= 256, f"head_dim is {head_dim}", "head_dim must be 1 to 256", "Use a model with smaller heads")
    check_dtype(name, pages, FLOATS + tuple(LIMITS))
    check_last_dim_contiguous(**{name: pages})
    check(
        (scale is not None) == (pages.dtype in LIMITS),
        f"{scale_name} is {'given' if scale is not None else 'None'} with {pages.dtype} pages",
        "int8 and float8 pages come with scales, float pages without",
        f"Pass {'no ' if scale is not None else ''}{scale_name}",
    )
    if scale is not None:
        check_shape(scale_name, scale, tuple(pages.shape[:3]))
        check_dtype(scale_name, scale, (torch.float32,))
        check(
            scale.is_contiguous(),
            f"{scale_name} has strides {scale.stride()}",
            f"{scale_name} must be contiguous",
            "Copy it",
        )


def check_kv_pages(k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """The pools of keys and of values, which must have the same layout."""
    check_pages("k_pages", k_pages, "k_scale", k_scale)
    check_pages("v_pages", v_pages, "v_scale", v_scale)
    check_shape("v_pages", v_pages, tuple(k_pages.shape))
    check_dtype("v_pages", v_pages, (k_pages.dtype,))
    check(
        k_pages.stride() == v_pages.stride(),
        f"k_pages has strides {k_pages.stride()}, v_pages {v_pages.stride()}",
        "K and V pages must be laid out alike",
        "Allocate both pools the same way",
    )


def check_block_table(block_table: Tensor, seq_lens: Tensor) -> None:
    """int32 [num_seqs, max_pages_per_seq] and int32 [num_seqs]."""
    check_shape("block_table", block_table, (None, None))
    check_shape("seq_lens", seq_lens, (block_table.shape[0],))
    check_dtype("block_table", block_table, (torch.int32,))
    check_dtype("seq_lens", seq_lens, (torch.int32,))
    check_last_dim_contiguous(block_table=block_table, seq_lens=seq_lens)


def check_keys_in_pages(
    block_table: Tensor, seq_lens: Tensor, first_keys: Tensor, num_pages: int, page_size: int
) -> None:
    """Every key from ``first_keys`` on must lie in a page. Reads the tensors, so it is for tensors on the CPU."""
    table, lens = as_array(block_table), as_array(seq_lens)
    capacity = table.shape[1] * page_size
    check(
        not lens.size or (lens.min() >= 0 and lens.max() <= capacity),
        f"seq_lens run from {lens.min(initial=0)} to {lens.max(initial=0)}",
        f"a sequence has 0 to {capacity} keys ({table.shape[1]} pages of {page_size})",
        "Give block_table more columns",
    )
    for row, (pages, first, length) in enumerate(zip(table, first_keys.tolist(), lens.tolist(), strict=True)):
        used = pages[first // page_size : -(-length // page_size)]
        check(
            not used.size or (used.min() >= 0 and used.max() < num_pages),
            f"block_table[{row}] names pages {used.min(initial=0)} to {used.max(initial=0)}",
            f"pages are numbered 0 to {num_pages - 1}",
            "Write the table before calling",
        )


def check_write(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """What writing k and v to pages needs. For CPU tensors the slots must exist, too."""
    check_kv_pages(k_pages, v_pages, k_scale, v_scale)
    check_shape("k", k, (None, *k_pages.shape[2:]))
    check_shape("v", v, tuple(k.shape))
    check_shape("slot_mapping", slot_mapping, (k.shape[0],))
    check_dtype("k", k, FLOATS)
    check_dtype("v", v, (k.dtype,))
    check_dtype("slot_mapping", slot_mapping, (torch.int64,))
    check_same_device(
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale
    )
    check_last_dim_contiguous(k=k, v=v, slot_mapping=slot_mapping)
    if slot_mapping.device.type == "cpu":
        num_slots = k_pages.shape[0] * k_pages.shape[1]
        largest = as_array(slot_mapping).max(initial=-1)
        check(
            largest < num_slots,
            f"slot_mapping holds {largest}",
            f"slots are numbered 0 to {num_slots - 1}; a negative one writes nothing",
            "Take slots from pages of this pool",
        )
