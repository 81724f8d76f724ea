"""Sums over ranks: each rank holds one addend of a product whose columns were cut, and each needs the sum.

    out = addend of rank 0 + addend of rank 1 + ... (+ bias) (+ residual)

    sum_parts     the addends were gathered before, by NCCL or gloo: any number of tokens
    one_shot_sum  one launch does all, for the few tokens of a decode step, where latency counts. Each program copies
                  its elements into memory that every rank of the host has mapped, raises a flag at each rank, waits
                  for their flags, and reads their addends.

Layout: addends [num_tokens, columns], contiguous. One program owns BLOCK elements.
Numerics: float32 sums in the order of the ranks, then bias, then residual; one rounding on the way out. Both kernels
give the same bits, on every rank, for one token as for thousands.
Moves, per rank: (ranks + 1) x itemsize bytes per element, and the residual; all but one addend cross the link.

Why one flag per program, rank and slot is enough: a program writes and reads only its own elements of the two slots,
which it uses in turn. It writes slot 0 anew two launches later. Before that, the launch between has waited for the same
program of each peer, and a peer raises that flag only after its launch before has ended, and so has read slot 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from . import reference
from .backend import as_array
from .bound import Bindable
from .checks import FLOATS, check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .kernel import Launch, kernel, launch
from .launch import configuration, overlaps

BLOCK = 1024  # elements of a program; every rank must use the same
MOST_TRIES = 2**27  # looks at a flag, about a minute; then the result is NaN, since the peer must have ended


@triton.jit
def _store_sum(total, bias_ptr, residual_ptr, out_ptr, offs, mask, columns):
    """out = total (+ bias) (+ residual), rounded once."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs % columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts_kernel(
    parts_ptr,  # [ranks, num_elements]
    bias_ptr,  # [columns] or None
    residual_ptr,  # [num_elements] or None
    out_ptr,  # [num_elements]
    num_elements,
    columns,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(RANKS):
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        parts_ptr += num_elements
    _store_sum(total, bias_ptr, residual_ptr, out_ptr, offs, mask, columns)


@triton.jit
def _one_shot_sum_kernel(
    addend_ptr,  # [num_elements]
    slots,  # of each rank: [2, capacity]
    flags,  # of each rank: [2, capacity / BLOCK, ranks]
    launches_ptr,  # [capacity / BLOCK], of this rank
    bias_ptr,  # [columns] or None
    residual_ptr,  # [num_elements] or None
    out_ptr,  # [num_elements]
    num_elements,
    columns,
    capacity,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_TRIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the next kernel may ask for its weights while this one waits for its peers
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    number = tl.load(launches_ptr + block) + 1
    slot = number & 1
    mine = tl.load(addend_ptr + offs, mask=mask, other=0.0)
    tl.store(slots[RANK] + slot * capacity + offs, mine, mask=mask)
    tl.debug_barrier()  # all threads have stored before one raises the flags
    place = (slot * (capacity // BLOCK) + block) * RANKS
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.atomic_xchg(flags[rank] + place + RANK, number, sem="release", scope="sys")
    tries = 0
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flag = flags[RANK] + place + rank
            while (tl.atomic_add(flag, 0, sem="acquire", scope="sys") != number) & (tries < MOST_TRIES):
                tries += 1
    tl.debug_barrier()  # one thread has seen the flags before any reads
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            theirs = tl.load(slots[rank] + slot * capacity + offs, mask=mask, other=0.0, cache_modifier=".cg")
            total += theirs.to(tl.float32)
    total = tl.where(tries < MOST_TRIES, total, float("nan"))
    _store_sum(total, bias_ptr, residual_ptr, out_ptr, offs, mask, columns)
    tl.store(launches_ptr + block, number)


class _Fields(NamedTuple):
    slots: tuple[Tensor, ...]
    flags: tuple[Tensor, ...]
    launches: Tensor
    rank: int


class Peers(_Fields, Bindable):
    """The memory through which ranks of one host exchange addends. All but ``launches`` is mapped by every rank.

    slots: of each rank, [2, capacity] in the dtype of the addends; capacity is a multiple of ``BLOCK``.
    flags: of each rank, int32 [2, capacity / BLOCK, ranks], zero at first.
    launches: int32 [capacity / BLOCK], zero at first: how often each program of this rank has run.
    rank: this one's number.
    """

    @property
    def capacity(self) -> int:
        """Elements of an addend, at most."""
        return self.slots[0].shape[1]

    def numpy(self) -> Peers:
        slots: Any = tuple(map(as_array, self.slots))
        flags: Any = tuple(map(as_array, self.flags))
        launches: Any = as_array(self.launches)
        return self._replace(slots=slots, flags=flags, launches=launches)


def _check_sum(columns: int, shape: tuple[int, ...], bias: Tensor | None, residual: Tensor | None) -> None:
    if bias is not None:
        check_shape("bias", bias, (columns,))
        check_dtype("bias", bias, FLOATS)
        check_last_dim_contiguous(bias=bias)
    if residual is not None:
        check_shape("residual", residual, shape)
        check_dtype("residual", residual, FLOATS)
        check(residual.is_contiguous(), "residual", "must be contiguous", "Call residual.contiguous()")


def _check_parts(parts: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("parts", parts, (None, None, None))
    check_dtype("parts", parts, FLOATS)
    check(len(parts) > 0, "parts of no rank", "a sum over ranks has at least one addend", "Gather them first")
    check(parts.is_contiguous(), "parts", "must be contiguous", "Call parts.contiguous()")
    _check_sum(parts.shape[2], tuple(parts.shape[1:]), bias, residual)
    check_same_device(parts=parts, bias=bias, residual=residual)


def _output_of_parts(parts: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)


@kernel(checks=_check_parts, output=_output_of_parts, definition=reference.sum_parts)
def sum_parts(out: Tensor, parts: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Launch:
    """The sum of the ranks' addends, in the order of the ranks, then bias, then residual.

    Args:
        parts: [ranks, num_tokens, columns], float32, float16 or bfloat16, contiguous.
        bias: [columns].
        residual: [num_tokens, columns], contiguous.

    Returns:
        [num_tokens, columns], dtype of ``parts``.

    Raises:
        KernelInputError: shapes, dtypes, strides or devices do not fit.
    """
    ranks, num_tokens, columns = parts.shape
    num_elements = num_tokens * columns
    return launch(
        _sum_parts_kernel,
        (triton.cdiv(num_elements, BLOCK),),
        parts,
        bias,
        residual,
        out,
        num_elements,
        columns,
        RANKS=ranks,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _check_one_shot(addend: Tensor, peers: Peers, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("addend", addend, (None, None))
    check_dtype("addend", addend, FLOATS)
    check(addend.is_contiguous(), "addend", "must be contiguous", "Call addend.contiguous()")
    check(isinstance(peers, Peers), f"peers is a {type(peers).__name__}", "it must be Peers", "Pass Peers")
    ranks, capacity = len(peers.slots), peers.capacity
    check(capacity % BLOCK == 0, f"a capacity of {capacity}", f"it is a multiple of {BLOCK}", "Allocate whole blocks")
    for slots, flags in zip(peers.slots, peers.flags, strict=True):
        check_shape("slots", slots, (2, capacity))
        check_dtype("slots", slots, (addend.dtype,))
        check_shape("flags", flags, (2, capacity // BLOCK, ranks))
        check_dtype("flags", flags, (torch.int32,))
    check_shape("launches", peers.launches, (capacity // BLOCK,))
    check_dtype("launches", peers.launches, (torch.int32,))
    check(
        addend.numel() <= capacity,
        f"an addend of {addend.numel()} elements",
        f"these peers exchange at most {capacity}",
        "Gather the addends and call sum_parts",
    )
    _check_sum(addend.shape[1], tuple(addend.shape), bias, residual)
    check_same_device(addend=addend, launches=peers.launches, bias=bias, residual=residual)


def _output_of_one_shot(addend: Tensor, peers: Peers, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.empty_like(addend)


@kernel(checks=_check_one_shot, output=_output_of_one_shot, definition=reference.one_shot_sum)
def one_shot_sum(
    out: Tensor, addend: Tensor, peers: Peers, bias: Tensor | None = None, residual: Tensor | None = None
) -> Launch:
    """``sum_parts`` of the ranks' addends, exchanged in the same launch. Every rank must call it, in the same order.

    Args:
        addend: [num_tokens, columns], float32, float16 or bfloat16, contiguous: this rank's.
        peers: the memory of the exchange, of at least as many elements.
        bias: [columns].
        residual: [num_tokens, columns], contiguous.

    Returns:
        [num_tokens, columns], dtype of ``addend``; NaN if a peer does not come within about a minute.

    Raises:
        KernelInputError: shapes, dtypes, strides or devices do not fit, or the addend is too large for ``peers``.
    """
    num_elements, columns = addend.numel(), addend.shape[1]
    overlap = overlaps(addend.device)
    options = {"launch_pdl": True} if overlap else {}
    return launch(
        _one_shot_sum_kernel,
        (triton.cdiv(num_elements, BLOCK),),
        addend,
        peers.slots,
        peers.flags,
        peers.launches,
        bias,
        residual,
        out,
        num_elements,
        columns,
        peers.capacity,
        RANK=peers.rank,
        RANKS=len(peers.slots),
        BLOCK=BLOCK,
        MOST_TRIES=MOST_TRIES,
        OVERLAP=overlap,
        num_warps=4,
        **options,
    )


def most_bytes(ranks: int, device: torch.device | None) -> dict[str, int]:
    """The most bytes of an addend that each way of exchange serves. The first that serves a call takes it."""
    return configuration("all_reduce", device, ranks=ranks)


def slot_elements(num_elements: int, itemsize: int, ranks: int, device: torch.device | None) -> int:
    """Elements of a slot of ``Peers`` that serves addends of up to ``num_elements``, in whole blocks.

    Fewer than ``num_elements`` where ``one_shot_sum`` does not take so large addends.
    """
    most = most_bytes(ranks, device)["ONE_SHOT_BYTES"] // itemsize
    return -(-min(num_elements, most) // BLOCK) * BLOCK


def peers_bytes(capacity: int, itemsize: int, ranks: int) -> int:
    """The memory that one rank maps into the others: two slots, and their flags."""
    return 2 * capacity * itemsize + 2 * 4 * capacity // BLOCK * ranks
