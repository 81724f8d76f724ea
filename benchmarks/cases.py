"""What a measured case is, and the buffers that cases share. ``registry`` holds the cases, one file per kernel.

A case builds so many sets of buffers that a replay does not find its input in the L2 cache. The exception is a set
smaller than ``CACHE_BYTES / MOST_SETS``, 49 KB: one token of a norm, of RoPE, of an embedding or of a page write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rooflama.kernels import LAYOUTS, Weight

CUDA = "cuda"
BF16 = torch.bfloat16
CACHE_BYTES = 200_000_000  # four times the L2 of an H100
MOST_SETS = 4096  # each is at least one launch in the graph

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One shape of one kernel.

    Attributes:
        label: which shape.
        num_bytes: bytes that must move, with each input read once and each output written once.
        num_flops: operations on tensor cores that the result needs.
        implementations: name -> calls on different buffers; ``rooflama`` and its peers.
        facts: what kernels/launch.py may ask about the case.
    """

    label: str
    num_bytes: int
    num_flops: int
    implementations: dict[str, Calls] = field(repr=False)
    facts: dict[str, int] = field(default_factory=dict)


def copies(num_bytes: int) -> int:
    """How many sets of buffers of this size exceed the L2 cache several times."""
    return max(2, min(MOST_SETS, -(-CACHE_BYTES // num_bytes)))


def random_weight(ggml_type: str, rows: int, columns: int) -> Weight:
    """Random codes with small scales; any bits are a valid weight."""
    planes = []
    for plane in LAYOUTS[ggml_type].planes:
        shape, dtype = (rows, columns // plane.elements), getattr(torch, plane.dtype)
        if dtype.is_floating_point:
            planes.append((torch.randn(shape, device=CUDA) * 0.01).to(dtype))
        else:
            limits = torch.iinfo(dtype)
            planes.append(torch.randint(limits.min, limits.max + 1, shape, device=CUDA, dtype=torch.int64).to(dtype))
    return Weight.make(ggml_type, planes, (rows, columns))


def paged(num_seqs: int, context: int, kv_heads: int, head_dim: int, page_size: int) -> tuple[list, Tensor, Tensor]:
    """Sets of (k_pages, v_pages), full of sequences of ``context`` tokens; block_table, seq_lens."""
    num_pages = num_seqs * context // page_size
    shape = (num_pages, page_size, kv_heads, head_dim)
    sets = copies(4 * num_seqs * context * kv_heads * head_dim)
    pools = [tuple(torch.randn(shape, device=CUDA, dtype=BF16) for _ in range(2)) for _ in range(sets)]
    block_table = torch.randperm(num_pages, device=CUDA).to(torch.int32).view(num_seqs, -1)
    return pools, block_table, torch.full((num_seqs,), context, device=CUDA, dtype=torch.int32)


def page_pools() -> list[Tensor]:
    """K and V pages of 16 tokens, 8 heads of 128."""
    return [torch.randn(4096, 16, 8, 128, device=CUDA, dtype=BF16) for _ in range(2)]


def heads_and_slots(tokens: int, num_slots: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Sets of q (32 heads of 128), k and v (8 heads), and the slots that k and v go to."""
    sets = []
    for _ in range(copies(2 * tokens * 48 * 128)):
        q, k, v = torch.randn(tokens, 48, 128, device=CUDA, dtype=BF16).split([32, 8, 8], dim=1)
        sets.append((q, k, v, torch.randperm(num_slots, device=CUDA)[:tokens].clone()))
    return sets
