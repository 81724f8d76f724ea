"""Drawing the next token on the device: greedy, or temperature with top-k, top-p and min-p.

    token = argmax over the tokens kept of (logit - largest) / temperature - log(e),  e = -log(1 - u)   (Gumbel, 1954)

u comes from Philox4x32-10 of (seed, step, token), so a sequence's token does not depend on the other sequences. The
NumPy definition, which states the filters, draws the same numbers.
Layout: logits [num_seqs, vocab], last dimension contiguous; every parameter a tensor [num_seqs] on the device, so that
a captured graph can be replayed with other values.
One program owns a chunk of CHUNK tokens of one row; one more program per row compares the chunks' winners.
Top-k and top-p become one number per row, the smallest value kept, which ``sampling_filters`` finds without a sort.
Numerics: float32 throughout; sums in a fixed order, so the same call gives the same token.
Moves: the logits once when greedy, twice when drawing, and 8 times more from L2 for each of top-k and top-p that is on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import (
    FLOATS,
    check,
    check_count,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_sequences,
    check_shape,
)
from .kernel import Launch, kernel, launch, scratch
from .sampling_filters import image_of, load_chunk, raise_floor, relative, row_max, search_memory

CHUNK = 1024  # tokens per program


@triton.jit
def _max_kernel(
    logits_ptr,  # [num_seqs, vocab]
    maxima_ptr,  # [num_seqs, num_chunks]
    floor_ptr,  # [num_seqs], or None; set to 0, which keeps every token
    logits_stride,
    vocab_size,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = load_chunk(logits_ptr, logits_stride, row, offs, vocab_size)
    largest = tl.max(tl.where(logits != logits, float("-inf"), logits))
    tl.store(maxima_ptr + row * tl.num_programs(0) + chunk, largest)
    if floor_ptr is not None and chunk == 0:
        tl.store(floor_ptr + row, 0)


@triton.jit
def _exponential(seed, step, tokens):
    """-log(1 - u) for u of (seed, step, token): standard exponential variates, to full precision near 0 as well."""
    low, high = (step & 0xFFFFFFFF).to(tl.uint32), ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = tokens.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, counter, counter * 0 + low, counter * 0 + high, counter * 0)
    u = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    rest = 1.0 - u
    # The rounding of 1 - u moves the log by the same factor as it moves u (Kahan's log1p).
    return tl.where(rest == 1.0, u, -tl.log(rest) * (u / (1.0 - rest)))


@triton.jit
def _choose_kernel(
    logits_ptr,  # [num_seqs, vocab]
    maxima_ptr,  # [num_seqs, num_chunks], read if there is a temperature, as all up to steps
    temperature_ptr,  # [num_seqs], or None: every row is greedy
    min_p_ptr,  # [num_seqs], or None
    floor_ptr,  # [num_seqs], or None
    seeds_ptr,  # [num_seqs]
    steps_ptr,  # [num_seqs]
    scores_ptr,  # [num_seqs, num_chunks], the winner's
    winners_ptr,  # [num_seqs, num_chunks], tokens; -1 if the chunk holds a NaN
    logits_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,  # power of two >= num_chunks
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = load_chunk(logits_ptr, logits_stride, row, offs, vocab_size)
    has_nan = tl.max((logits != logits).to(tl.int32)) != 0
    score = tl.where(logits != logits, float("-inf"), logits)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            z = relative(score, row_max(maxima_ptr, row, num_chunks, BLOCK_CHUNKS), temperature)
            kept = offs < vocab_size
            if floor_ptr is not None:
                kept = kept & (image_of(score) >= tl.load(floor_ptr + row).to(tl.uint32))
            if min_p_ptr is not None:
                kept = kept & (z >= tl.log(tl.load(min_p_ptr + row)))
            noise = -tl.log(_exponential(tl.load(seeds_ptr + row), tl.load(steps_ptr + row), offs))
            score = tl.where(kept, z + noise, float("-inf"))
    winner = chunk * CHUNK + tl.argmax(score, axis=0)
    tl.store(scores_ptr + row * num_chunks + chunk, tl.max(score))
    tl.store(winners_ptr + row * num_chunks + chunk, tl.where(has_nan, -1, winner))


@triton.jit
def _last_kernel(
    scores_ptr,  # [num_seqs, num_chunks]
    winners_ptr,  # [num_seqs, num_chunks]
    out_ptr,  # [num_seqs]
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,  # power of two >= num_chunks
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_CHUNKS)
    mask = offs < num_chunks
    scores = tl.load(scores_ptr + row * num_chunks + offs, mask=mask, other=float("-inf"))
    winners = tl.load(winners_ptr + row * num_chunks + offs, mask=mask, other=0)
    best = tl.sum(tl.where(offs == tl.argmax(scores, axis=0), winners, 0))
    tl.store(out_ptr + row, tl.where(tl.min(winners) < 0, -1, best))


def _check(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    vocab_size: int | None,
) -> None:
    check_shape("logits", logits, (None, None))
    num_seqs, vocab = logits.shape
    vocab_size = vocab if vocab_size is None else vocab_size
    check_sequences(num_seqs)
    check_count("vocab_size", vocab_size, "tokens")
    check_dtype("logits", logits, FLOATS)
    check_last_dim_contiguous(logits=logits)
    check(
        0 < vocab_size <= vocab < 2**24,
        f"vocab_size is {vocab_size}, logits has {vocab} columns",
        "vocab_size must be 1 to the width of logits, which must be below 2^24",
        "Pass the tokenizer's vocabulary size",
    )
    parameters = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seeds": (seeds, torch.int64),
        "steps": (steps, torch.int64),
    }
    for name, (tensor, dtype) in parameters.items():
        if tensor is not None:
            check_shape(name, tensor, (num_seqs,))
            check_dtype(name, tensor, (dtype,))
            check_last_dim_contiguous(**{name: tensor})
    check_same_device(logits=logits, **{name: tensor for name, (tensor, _) in parameters.items()})
    for name, needed in (("seeds", seeds), ("steps", steps)):
        check(
            temperature is None or needed is not None,
            f"temperature without {name}",
            f"temperature needs {name}",
            f"Pass {name} too",
        )
    if logits.device.type == "cpu":
        _check_ranges(temperature, top_k, top_p, min_p)


def _check_ranges(temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> None:
    """Check that every value lies where its filter is defined. Reads the tensors: only for those on the CPU."""
    for name, tensor, fits, rule in (
        ("temperature", temperature, lambda t: (t >= 0) & (t < float("inf")), "finite and at least 0"),
        ("top_k", top_k, lambda t: t >= 0, "at least 0; 0 is off"),
        ("top_p", top_p, lambda t: (t >= 0) & (t <= 1), "between 0 and 1; 1 is off"),
        ("min_p", min_p, lambda t: (t >= 0) & (t <= 1), "between 0 and 1; 0 is off"),
    ):
        if tensor is not None and not (good := fits(tensor)).all():
            check(False, f"{name} {tensor[~good][0].item()}", f"{name} must be {rule}", f"Change {name}")


def _tokens(logits: Tensor, **parameters: Tensor | int | None) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


@kernel(checks=_check, output=_tokens, definition=reference.sample)
def sample(
    out: Tensor,
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    *,
    vocab_size: int | None = None,
) -> list[Launch]:
    """Draw one token per sequence. A parameter that is None is off for every sequence and costs nothing.

    Args:
        logits: [num_seqs, vocab], float32, float16 or bfloat16.
        temperature: float32 [num_seqs], finite; 0 is greedy: the largest logit, the lowest token among equals.
        top_k: int32 [num_seqs], 0 for off; keeps every token that equals the k-th.
        top_p: float32 [num_seqs], 0 to 1; 1 for off.
        min_p: float32 [num_seqs], 0 to 1; 0 for off.
        seeds: int64 [num_seqs], needed with ``temperature``.
        steps: int64 [num_seqs], needed with ``temperature``: how many tokens the sequence has drawn before.
        vocab_size: tokens from here on are padding and never drawn; the width of ``logits`` by default.

    Returns:
        int32 [num_seqs]; -1 for a row with a NaN among its logits. On a GPU the parameters' values are not checked,
        because reading them would stall the stream. There a temperature below 0 or NaN is greedy; an infinite one may
        give any number; top_k below 0 and top_p above 1 or NaN are off; top_p below 0 is 0; a min_p that keeps no token
        gives token 0.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, a parameter lacks the one it needs, or (on the CPU
            only) a parameter is outside its range.
    """
    num_seqs, device = logits.shape[0], logits.device
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    block_chunks = triton.next_power_of_2(num_chunks)
    grid = (num_chunks, num_seqs)
    launches: list[Launch] = []
    maxima = floor = None
    if temperature is not None:
        maxima = scratch(num_seqs, num_chunks, dtype=torch.float32, device=device)
        limits = [(limit, weighted) for limit, weighted in ((top_k, False), (top_p, True)) if limit is not None]
        if limits:
            floor = scratch(num_seqs, dtype=torch.int32, device=device)
            search = search_memory(num_seqs, num_chunks, device)
            rest = (logits, vocab_size, maxima, temperature, floor, search, CHUNK)
            launches = [one for limit, weighted in limits for one in raise_floor(limit, weighted, *rest)]
        first = launch(_max_kernel, grid, logits, maxima, floor, logits.stride(0), vocab_size, CHUNK=CHUNK)
        launches = [first, *launches]
    scores = scratch(num_seqs, num_chunks, dtype=torch.float32, device=device)
    winners = scratch(num_seqs, num_chunks, dtype=torch.int32, device=device)
    choose = launch(
        _choose_kernel,
        grid,
        logits,
        maxima,
        temperature,
        min_p,
        floor,
        seeds,
        steps,
        scores,
        winners,
        logits.stride(0),
        vocab_size,
        CHUNK=CHUNK,
        BLOCK_CHUNKS=block_chunks,
    )
    last = launch(_last_kernel, (num_seqs,), scores, winners, out, num_chunks, BLOCK_CHUNKS=block_chunks)
    return [*launches, choose, last]
