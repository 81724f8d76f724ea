"""What top-k and top-p keep: for each row the smallest value kept, its floor, found on the device without a sort.

    floor = the smallest value such that all larger values of the row weigh less than a bound
            top-k: every value weighs 1, bound k
            top-p: a value weighs its probability among those that top-k keeps, bound top_p

The search runs on the float's order-preserving integer image, BITS bits per launch: each program adds up its chunk's
weights by the next digit, and the next launch sums the chunks in a fixed order and chooses the digit.
Layout: logits [num_seqs, vocab]; every limit a tensor [num_seqs].
One program owns a chunk of CHUNK tokens of one row.
Numerics: exact, but for the rounding of the weights' sums, which are float32 in a fixed order.
Moves: the logits LEVELS times per filter that is on, from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import Launch, launch, scratch

BITS = tl.constexpr(4)
LEVELS = 32 // BITS.value
_DIGITS = tl.constexpr(2**BITS.value)
_TINY = tl.constexpr(2.0**-126)


class Search(NamedTuple):
    """What each level of a search leaves for the next one; two searches may use the same memory in turn."""

    sums: Tensor  # float32 [LEVELS, num_seqs, num_chunks, _DIGITS], weights by digit
    prefix: Tensor  # int32 [LEVELS, num_seqs], the digits found before a level
    above: Tensor  # float32 [LEVELS, num_seqs], weight of the values larger than every one with those digits
    bound: Tensor  # float32 [LEVELS, num_seqs]


def search_memory(num_seqs: int, num_chunks: int, device: torch.device) -> Search:
    rows = (LEVELS, num_seqs)
    return Search(
        sums=scratch(*rows, num_chunks, _DIGITS.value, dtype=torch.float32, device=device),
        prefix=scratch(*rows, dtype=torch.int32, device=device),
        above=scratch(*rows, dtype=torch.float32, device=device),
        bound=scratch(*rows, dtype=torch.float32, device=device),
    )


@triton.jit
def load_chunk(logits_ptr, logits_stride, row, offs, vocab_size):
    """A row's logits in float32; -inf past the vocabulary."""
    ptrs = logits_ptr + row * logits_stride + offs
    return tl.load(ptrs, mask=offs < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def image_of(x):
    """uint32 in the order of the floats; both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def relative(logits, largest, temperature):
    """(logits - largest) / temperature; 0 at the largest even if that is infinite."""
    return tl.where(logits == largest, 0.0, (logits - largest) / temperature)


@triton.jit
def row_max(maxima_ptr, row, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    offs = tl.arange(0, BLOCK_CHUNKS)
    return tl.max(tl.load(maxima_ptr + row * num_chunks + offs, mask=offs < num_chunks, other=float("-inf")))


@triton.jit
def _is_on(limit_ptr, temperature_ptr, row, WEIGHTED: tl.constexpr):
    """Whether the row draws, and its top_p (WEIGHTED) or top_k is on."""
    limit = tl.load(limit_ptr + row)
    on = limit < 1.0 if WEIGHTED else limit > 0
    return on & (tl.load(temperature_ptr + row) > 0.0)


@triton.jit
def _resume_search(
    search,
    limit_ptr,  # [num_seqs]
    row,
    num_seqs,
    num_chunks,
    LEVEL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """After LEVEL digits: those digits, the weight of everything larger than they allow, and the bound."""
    prefix, above, bound = tl.zeros([], tl.uint32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if LEVEL > 0:
        before = (LEVEL - 1) * num_seqs + row
        digits = tl.arange(0, _DIGITS)
        chunks = tl.arange(0, BLOCK_CHUNKS)
        offs = (before * num_chunks + chunks[:, None]) * _DIGITS + digits[None, :]
        weights = tl.sum(tl.load(search.sums + offs, mask=(chunks < num_chunks)[:, None], other=0.0), axis=0)
        if LEVEL > 1:
            prefix = tl.load(search.prefix + before).to(tl.uint32)
            above = tl.load(search.above + before)
            bound = tl.load(search.bound + before)
        else:
            bound = tl.load(limit_ptr + row).to(tl.float32)
            if WEIGHTED:
                bound = tl.maximum(bound * tl.sum(weights), _TINY)
        larger = tl.where(digits[:, None] > digits[None, :], weights[:, None], 0.0)
        weight_above = above + tl.sum(larger, axis=0)
        digit = tl.min(tl.where(weight_above < bound, digits, _DIGITS - 1))
        above = tl.sum(tl.where(digits == digit, weight_above, 0.0))
        prefix = (prefix << BITS) | digit.to(tl.uint32)
    return prefix, above, bound


@triton.jit(do_not_specialize=["num_seqs"])  # one code for every batch
def _narrow_kernel(
    logits_ptr,  # [num_seqs, vocab]
    maxima_ptr,  # [num_seqs, num_chunks], read if WEIGHTED
    temperature_ptr,  # [num_seqs]
    limit_ptr,  # [num_seqs], top_p if WEIGHTED, else top_k
    floor_ptr,  # [num_seqs], image of the smallest value that an earlier search kept
    search,  # row LEVEL is written
    logits_stride,
    vocab_size,
    num_seqs,
    WEIGHTED: tl.constexpr,
    LEVEL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,  # power of two >= num_chunks
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    if _is_on(limit_ptr, temperature_ptr, row, WEIGHTED):
        prefix, above, bound = _resume_search(
            search, limit_ptr, row, num_seqs, num_chunks, LEVEL, WEIGHTED, BLOCK_CHUNKS
        )
        if chunk == 0:
            here = LEVEL * num_seqs + row
            tl.store(search.prefix + here, prefix.to(tl.int32))
            tl.store(search.above + here, above)
            tl.store(search.bound + here, bound)

        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = load_chunk(logits_ptr, logits_stride, row, offs, vocab_size)
        image = image_of(logits)
        candidate = (offs < vocab_size) & (image >= tl.load(floor_ptr + row).to(tl.uint32))
        if LEVEL > 0:
            candidate = candidate & (image >> (32 - LEVEL * BITS) == prefix)
        weight = tl.full([CHUNK], 1.0, tl.float32)
        if WEIGHTED:
            largest = row_max(maxima_ptr, row, num_chunks, BLOCK_CHUNKS)
            weight = tl.exp(relative(logits, largest, tl.load(temperature_ptr + row)))
        digits = tl.arange(0, _DIGITS)
        digit = ((image >> (32 - (LEVEL + 1) * BITS)) & (_DIGITS - 1)).to(tl.int32)
        chosen = candidate[:, None] & (digit[:, None] == digits[None, :])
        sums = tl.sum(tl.where(chosen, weight[:, None], 0.0), axis=0)
        tl.store(search.sums + ((LEVEL * num_seqs + row) * num_chunks + chunk) * _DIGITS + digits, sums)


@triton.jit(do_not_specialize=["num_seqs"])
def _raise_floor_kernel(
    temperature_ptr,  # [num_seqs]
    limit_ptr,  # [num_seqs]
    floor_ptr,  # [num_seqs]
    search,
    num_seqs,
    num_chunks,
    WEIGHTED: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if _is_on(limit_ptr, temperature_ptr, row, WEIGHTED):
        found, _, _ = _resume_search(search, limit_ptr, row, num_seqs, num_chunks, LEVELS, WEIGHTED, BLOCK_CHUNKS)
        floor = tl.load(floor_ptr + row).to(tl.uint32)
        tl.store(floor_ptr + row, tl.maximum(floor, found).to(tl.int32))


def raise_floor(
    limit: Tensor,
    weighted: bool,
    logits: Tensor,
    vocab_size: int,
    maxima: Tensor,
    temperature: Tensor,
    floor: Tensor,
    search: Search,
    chunk: int,
) -> list[Launch]:
    """Raise ``floor`` to the image of the smallest value that the limit keeps, of those that the floor keeps now.

    Args:
        limit: int32 [num_seqs], top_k; or float32, top_p, if ``weighted``.
        logits, vocab_size, temperature: as ``sample`` takes them; a greedy row's floor stays as it is.
        maxima: float32 [num_seqs, num_chunks], each chunk's largest logit.
        floor: int32 [num_seqs], the bits of an image. Written.
        search: the memory that the search takes. Written.
        chunk: tokens per program.
    """
    num_seqs, num_chunks = maxima.shape
    block_chunks = triton.next_power_of_2(num_chunks)
    levels = [
        launch(
            _narrow_kernel,
            (num_chunks, num_seqs),
            logits,
            maxima,
            temperature,
            limit,
            floor,
            search,
            logits.stride(0),
            vocab_size,
            num_seqs,
            WEIGHTED=weighted,
            LEVEL=level,
            CHUNK=chunk,
            BLOCK_CHUNKS=block_chunks,
            num_warps=8,
        )
        for level in range(LEVELS)
    ]
    return [
        *levels,
        launch(
            _raise_floor_kernel,
            (num_seqs,),
            temperature,
            limit,
            floor,
            search,
            num_seqs,
            num_chunks,
            WEIGHTED=weighted,
            LEVELS=LEVELS,
            BLOCK_CHUNKS=block_chunks,
        ),
    ]
