"""What attention over pages keeps, whoever wrote it. Each law takes PREFILL or DECODE, a kernel, and a drawn problem.

The kernel has the signature of ``attention_prefill`` or ``attention_decode`` and returns (out, lse); lse may be None.
Slots that no sequence owns, and tables beyond a sequence's pages, are poisoned in every problem (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import reference

from .assertions import assert_bit_equal
from .attention import Dense, Drawn, assert_attention, define, run_decode, run_prefill, sequences, with_keys
from .strategies import DEVICE

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Kind:
    """One of the two kernels: how it is run, and its NumPy definition."""

    run: Callable[..., tuple[Tensor, Tensor | None]]
    definition: Callable[..., Any]
    decode: bool

    def wanted(self, drawn: Drawn, dense: list[Dense]) -> tuple[np.ndarray, np.ndarray]:
        return define(self.definition, drawn, dense, decode=self.decode)


PREFILL = Kind(run_prefill, reference.attention_prefill, decode=False)
DECODE = Kind(run_decode, reference.attention_decode, decode=True)


def assert_same_bits(got: Any, want: Any, context: str) -> None:
    for one, other in zip(got, want, strict=True):
        if one is not None:
            assert_bit_equal(one, other, context=context)


def equals_definition(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    dense = sequences(drawn)
    assert_attention(kind.run(kernel, drawn, dense), kind.wanted(drawn, dense), drawn, dense)


def the_same_call_gives_the_same_bits(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    dense = sequences(drawn)
    assert_same_bits(kind.run(kernel, drawn, dense), kind.run(kernel, drawn, dense), str(drawn))


def grouped_heads_equal_repeated_heads(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    """GQA is MHA over K/V heads written out once for each query head. For one K/V head."""
    drawn = replace(drawn, num_kv_heads=1, group=1 + drawn.group % 8)  # a program per head costs the interpreter
    dense = sequences(drawn)

    def repeated(x: Tensor | None) -> Any:
        return None if x is None else x.repeat_interleave(drawn.group, 1)

    alone = [
        replace(s, k=repeated(s.k), v=repeated(s.v), k_scale=repeated(s.k_scale), v_scale=repeated(s.v_scale))
        for s in dense
    ]
    assert_same_bits(kind.run(kernel, drawn, dense), kind.run(kernel, drawn, alone), str(drawn))


def placement_of_pages_changes_no_bit(
    kind: Kind, kernel: Attention, drawn: Drawn, page_size: int | None = None, seed: int = 1
) -> None:
    """Nor does their size, where the kernel takes several."""
    dense = sequences(drawn)
    moved = replace(drawn, page_size=page_size or drawn.page_size)
    got, want = kind.run(kernel, drawn, dense), kind.run(kernel, moved, dense, seed=seed)
    assert_same_bits(got, want, f"{drawn} page_size={page_size}")


def neighbours_change_no_bit(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    """Alone, a sequence has a narrower table too."""
    dense = sequences(drawn)
    together = kind.run(kernel, drawn, dense)
    alone = [kind.run(kernel, drawn, [s]) for s in dense]
    for one, others in zip(together, zip(*alone, strict=True), strict=True):
        if one is not None:
            assert_bit_equal(one, torch.cat(others), context=str(drawn))


def keys_out_of_sight_are_not_read(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    """Pages before the window may be gone: their slots are poisoned, and their entries in the table name no page."""
    dense = sequences(drawn)[:1]
    base = max(0, len(dense[0].k) - len(dense[0].q) - drawn.sliding_window + 1) if drawn.sliding_window else 0
    got, want = kind.run(kernel, drawn, dense, base=base), kind.run(kernel, drawn, dense)
    assert_same_bits(got, want, f"{drawn} base={base}")


def a_finite_future_changes_no_bit_of_the_past(
    kind: Kind, kernel: Attention, drawn: Drawn, cut: int | None = None
) -> None:
    """Of keys from ``cut`` on, by default from the middle query's. A NaN in V may: its weight of 0 makes NaN of it."""
    dense = sequences(drawn)[:1]
    position = len(dense[0].k) - len(dense[0].q)
    cut = position + len(dense[0].q) // 2 if cut is None else cut
    k, v = dense[0].k.clone(), dense[0].v.clone()
    k[cut:], v[cut:] = 5.0, -7.0
    past = slice(0, max(0, cut - position))
    got, want = kind.run(kernel, drawn, dense), kind.run(kernel, drawn, [replace(dense[0], k=k, v=v)])
    before, after = ([x if x is None else x[past] for x in one] for one in (got, want))
    assert_same_bits(before, after, f"{drawn} cut={cut}")


def chunks_change_no_bit(kind: Kind, kernel: Attention, drawn: Drawn, chunk: int = 5) -> None:
    """Each chunk of the queries runs when only its own keys and those before it exist."""
    dense = sequences(drawn)[:1]
    queries, context = len(dense[0].q), len(dense[0].k) - len(dense[0].q)
    whole = kind.run(kernel, drawn, dense)
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        part = [replace(with_keys(dense, context + end)[0], q=dense[0].q[start:end])]
        wanted = [x if x is None else x[start:end] for x in whole]
        assert_same_bits(kind.run(kernel, drawn, part), wanted, f"{drawn} chunk={chunk} start={start}")


def order_of_keys_matters_only_to_rounding(kind: Kind, kernel: Attention, drawn: Drawn) -> None:
    """Softmax is a sum over keys: permuting them, K and V alike, changes nothing else. One query, no window."""
    drawn = replace(drawn, sliding_window=0)
    dense = sequences(drawn)
    shuffled = []
    for s in dense:
        order = torch.from_numpy(np.random.default_rng(drawn.seed).permutation(len(s.k))).to(DEVICE)
        parts = {name: getattr(s, name) for name in ("k", "v", "k_scale", "v_scale")}
        shuffled.append(replace(s, **{name: x[order] for name, x in parts.items() if x is not None}))
    assert_attention(kind.run(kernel, drawn, shuffled), kind.wanted(drawn, dense), drawn, dense)
