"""What the tests of rope build: tables of angles and positions, and a fused call's inputs and pages, between poison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import rope_and_cache_write

from .assertions import assert_guards_intact
from .strategies import DEVICE, guarded, normal


def angle_tables(max_positions: int, rotary_dim: int, theta: float = 1e4) -> tuple[Tensor, ...]:
    """cos and sin, [max_positions, rotary_dim / 2]."""
    angles = np.outer(np.arange(max_positions), theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim))
    return tuple(guarded(torch.from_numpy(t).float().to(DEVICE))[0] for t in (np.cos(angles), np.sin(angles)))


def random_positions(rng: np.random.Generator, num_tokens: int, max_positions: int = 500) -> Tensor:
    return guarded(torch.from_numpy(rng.integers(0, max_positions, num_tokens).astype(np.int32)).to(DEVICE))[0]


class Step:
    """Inputs of one fused call, its pages full of poison."""

    def __init__(
        self,
        seed: int,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        dtype: torch.dtype,
        page_dtype: torch.dtype | None = None,  # None: that of k
        page_size: int = 16,
    ):
        rng = np.random.default_rng(seed)
        qkv, _ = guarded(normal(rng, num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype))
        self.q, self.k, self.v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        self.tables = angle_tables(500, rotary_dim)
        self.positions = random_positions(rng, num_tokens)
        slots = rng.permutation(4 * page_size)[:num_tokens]
        slots[rng.random(num_tokens) < 0.2] = -1
        self.slots, _ = guarded(torch.from_numpy(slots).to(DEVICE))
        self.norms = [guarded(normal(rng, head_dim))[0] for _ in range(2)]
        self.shape = (4, page_size, num_kv_heads, head_dim)
        self.page_dtype = page_dtype or dtype
        self.scaled = page_dtype is not None
        self.buffers: list[Tensor] = []

    def pages(self) -> list[Any]:
        """k_pages, v_pages, k_scale, v_scale; the last two None for float pages."""
        poison = -128 if self.page_dtype == torch.int8 else float("nan")
        pages = [torch.full(self.shape, poison, device=DEVICE).to(self.page_dtype) for _ in range(2)]
        scales = [torch.full(self.shape[:3], float("nan"), device=DEVICE) for _ in range(2 if self.scaled else 0)]
        views, self.buffers = (list(tensors) for tensors in zip(*map(guarded, pages + scales), strict=True))
        return views + [None] * (4 - len(views))

    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, *self.tables, self.positions, self.slots

    def fused(self, q_norm: Tensor | None = None, k_norm: Tensor | None = None, **options: Any) -> Any:
        """(q, the contents of pages and scales afterwards). Asserts that nothing around the pages was written."""
        pages = self.pages()
        kernel: Any = rope_and_cache_write
        q = kernel(*self.inputs(), *pages[:2], q_norm, k_norm, *pages[2:], **options)
        for buffer in self.buffers:
            assert_guards_intact(buffer if buffer.dtype == torch.int8 else buffer.float())
        return q, [t.float() for t in pages if t is not None]
