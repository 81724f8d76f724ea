"""The wgmma regime of ``quantized_matmul``: tokens in 16 bits on Hopper, codes multiplied on tensor cores.

    out[t, n] = sum over groups g of scale[n, g] * I[t, n, g] + minimum[n, g] * S[t, g]
    I[t, n, g] = sum over the columns k of g of value[n, k] * x[t, k]        S[t, g] = sum of x[t, k]

The weight is wgmma's operand A, from registers (``quantized_wgmma_codes.py``), and x is operand B, from shared memory.
Where a group's scale is d times a whole number, A is that number times the value, exactly. So all products of a block
of 256 columns are summed in one accumulator, and d multiplies that once. Where it is a float16 number, A is the value,
and each group's sum is multiplied by its scale in float32. S times the minima is one more product per block.

Two launches: x is arranged in tiles of 8 to 128 tokens (``quantized_wgmma_ends.py``). Then a program of the
product owns ROWS rows of the weight, a tile of tokens and a split of the blocks of 256 columns. The last program of the
splits adds their sums and writes the result (``quantized_wgmma_output.py``). Each launch starts while the one in front
still runs. Where the weight is known to be older than the kernels still running (``resident``), the words of its first
block are requested before the program waits for them.

A program goes through its blocks by halves. The words of two halves are under way to shared memory at a time, by
asynchronous copies of each thread, and x of one, by the copy engine (TMA).

Layouts: arranged x [tiles, columns / group, N, group] and sums [tiles, blocks, N, 2 * groups of a block], S rounded and
then the rest of S, float16. N is the tokens of a tile, or twice as many where x is two float16 numbers.

Numerics: x is a float16 number times a power of two that each token has for its own (``quantized_wgmma_ends.py``), or
two float16 numbers where a normed x is not to be rounded. S is two float16 numbers. The rest is float32, in a fixed
order. The weight is not rounded.

Bits: those of out[t, n] follow from token t of x, row n of the weight and SPLITS. SPLITS follows from the weight alone.
So this regime is batch-invariant, with one token or thousands, in a graph or not. What may be tuned without changing a
bit, by the number of tokens as well:

    N, tiles    wgmma sums the products of each element by itself, so a column does not know how many there are. The
                launch before the product has a program per token, and one compiled form for any number.
    ROWS        an element's sums are in one thread, whichever rows are in other warps.
    FLIGHT      how many groups' products run at a time. They are added in the order of the groups.
    REGISTERS   which sums are fused multiply-adds is decided before registers are allocated.

What must not depend on the number of tokens: SPLITS, the order in which ``add_splits`` adds them and both parts of x,
blocks of 256 columns in ascending order, minima first and then groups in ascending order within them, and how a token's
unit and the factors are computed.

Moves the planes once, x once per ROWS rows (from L2), and with several splits 8 x splits x N x rows bytes of sums.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from .bound import Launch, launch, scratch
from .gpu import capability
from .quantized_tiles import Input, Output, planes_of
from .quantized_wgmma_codes import load_spread, low_lanes, low_words, num_terms, unit_of, unpack
from .quantized_wgmma_ends import (
    Plan,
    early,
    has_blocks,
    launch_arrange,
    num_parts,
    slices_of,
)
from .quantized_wgmma_output import Partials, add_parts, add_splits, leave, rows_at, write
from .quantized_wgmma_scales import factor_of, load_factor, load_minima, load_scales, scale_word, start_minima
from .weight import Weight

MOST_WEIGHTS = 2**36  # whose scales and minima are counted in 32 bits
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


@gluon.constexpr_function
def _words_layout(words: int) -> gl.SwizzledSharedLayout:
    """Rows of ``words`` words, so that a quad's words of eight rows lie in different banks."""
    chunks = words // 4
    return gl.SwizzledSharedLayout(vec=4, per_phase=max(1, 8 // chunks), max_phase=min(8, chunks), order=[1, 0])


@gluon.constexpr_function
def _x_layout(width: int) -> gl.NVMMASharedLayout:
    """Rows of 16, 32 or 64 numbers of 16 bits, as wgmma reads them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * width, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def _sums_layout(rows: int, columns: int) -> gl.NVMMADistributedLayout:
    """[rows, columns], 16 rows in each warp, as wgmma leaves its sums."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[rows // 16, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _allocate_x(
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
):
    return gl.allocate_shared_memory(gl.float16, [HEIGHT, WIDTH], _x_layout(WIDTH))


@gluon.jit
def _allocate_words(
    ROWS: gl.constexpr,
    WORDS: gl.constexpr,
):
    return gl.allocate_shared_memory(gl.int32, [ROWS, WORDS], _words_layout(WORDS))


@gluon.jit
def _allocate_barrier():
    """A barrier that a copy of the copy engine completes, phase after phase."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def _add(
    total,  # [ROWS, N]
    product,  # [ROWS, N]
    factor,  # [ROWS]
):
    """total + product * factor, computed here: else the compiler moves all sums behind the last product."""
    total += product * factor[:, None]
    return gl.inline_asm_elementwise("", "=f,0", [total], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _copy_words(
    shared,  # [ROWS, words of half a block]
    plane_ptr,  # [rows, num_blocks, 2, words of half a block] int32
    row_tile,
    rows,
    num_blocks,
    half,  # of the columns
    is_there,  # else nothing is copied
    SWIGLU: gl.constexpr,
):
    """Starts to copy words of ROWS rows."""
    ROWS: gl.constexpr = shared.shape[0]
    WORDS: gl.constexpr = shared.shape[1]
    COPIED: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [ROWS // 16, 1], [1, 0])
    place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPIED))
    row = rows_at(place, row_tile, rows, ROWS, SWIGLU).to(gl.int64)
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIED))
    ptrs = plane_ptr + row[:, None] * (num_blocks * 2 * WORDS) + (half * WORDS + word)[None, :]
    mask = (row >= 0)[:, None] & (word >= 0)[None, :] & is_there
    async_copy.async_copy_global_to_shared(shared, ptrs, mask=mask)


@gluon.jit
def _copy_x(
    shared,  # [groups of half a block * N, group]
    x_box,
    half,  # of the columns of all tiles
    full,  # barrier
    is_there,
):
    HEIGHT: gl.constexpr = shared.shape[0]
    BOX: gl.constexpr = x_box.block_shape[0]
    for i in gl.static_range(HEIGHT // BOX):
        place = shared.slice(i * BOX, BOX, dim=0)
        tma.async_copy_global_to_shared(x_box, [half * HEIGHT + i * BOX, 0], full, place, pred=is_there)


@gluon.jit(do_not_specialize=["rows", "num_blocks", "blocks_per_split", "num_tokens"])
def _wgmma_kernel(
    x_box,  # of x arranged, [tiles * columns / group * N, group] float16
    sums_box,  # of its sums, [tiles * columns / 256 * N, 2 * 256 / group] float16; or None
    units_ptr,  # [tiles * N / PARTS] float32
    planes,  # Planes
    partials,  # Partials
    output,  # Output
    rows,
    num_blocks,
    blocks_per_split,
    num_tokens,
    tiles,  # of tokens
    LAYOUT: gl.constexpr,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    PARTS: gl.constexpr,
    SWIGLU: gl.constexpr,
    FLIGHT: gl.constexpr,
    RESIDENT: gl.constexpr,
    EARLY: gl.constexpr,
):
    GROUP: gl.constexpr = LAYOUT.group
    HALF: gl.constexpr = 128 // GROUP  # groups of half a block
    LOW: gl.constexpr = 4 * LAYOUT.low_bits  # words of a half
    HIGH: gl.constexpr = 4 * LAYOUT.high_bits
    TERMS: gl.constexpr = num_terms(LAYOUT)
    HAS_MINIMA: gl.constexpr = planes.m is not None
    ACC: gl.constexpr = _sums_layout(ROWS, N)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    X_BYTES: gl.constexpr = 128 * N * 2
    SUMS_BYTES: gl.constexpr = N * 4 * HALF * 2
    tile = gl.program_id(0) % tiles  # neighbours share the rows of the weight, so L2 serves all but one
    row_tile = gl.program_id(0) // tiles
    first = gl.program_id(1) * blocks_per_split
    last = gl.minimum(first + blocks_per_split, num_blocks)
    row = rows_at(gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC)), row_tile, rows, ROWS, SWIGLU)

    # Each half of a block has its own, so that the compiler sees which copies and reads are of other memory.
    x_shared = (_allocate_x(HALF * N, GROUP), _allocate_x(HALF * N, GROUP))
    low_shared = (_allocate_words(ROWS, LOW), _allocate_words(ROWS, LOW))
    high_shared = low_shared
    if HIGH > 0:
        high_shared = (_allocate_words(ROWS, HIGH), _allocate_words(ROWS, HIGH))
    full = (_allocate_barrier(), _allocate_barrier())
    if HAS_MINIMA:
        sums_shared = _allocate_x(N, 4 * HALF)
        sums_full = _allocate_barrier()

    if EARLY and not RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for half in gl.static_range(2):
        _copy_words(low_shared[half], planes.low, row_tile, rows, num_blocks, 2 * first + half, True, SWIGLU)
        if HIGH > 0:
            _copy_words(high_shared[half], planes.high, row_tile, rows, num_blocks, 2 * first + half, True, SWIGLU)
        async_copy.commit_group()
    scales = load_scales(planes, row, first, num_blocks, LAYOUT)
    minima, dmin = row, row
    if HAS_MINIMA:
        minima = load_minima(planes, row_tile, rows, first, num_blocks, ROWS, SWIGLU, LAYOUT)
        dmin = load_factor(planes.m, row, first, num_blocks, LAYOUT)
    if EARLY and RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    mbarrier.expect(full[0], X_BYTES)
    _copy_x(x_shared[0], x_box, 2 * (tile * num_blocks + first), full[0], True)
    if HAS_MINIMA:
        mbarrier.expect(sums_full, SUMS_BYTES)
        tma.async_copy_global_to_shared(sums_box, [(tile * num_blocks + first) * N, 0], sums_full, sums_shared)

    total = gl.zeros([ROWS, N], gl.float32, layout=ACC)
    acc = gl.zeros([ROWS, N], gl.float32, layout=ACC)
    for block in range(first, last):
        phase = (block - first) & 1
        scales_now = scales
        d = load_factor(planes.d, row, block, num_blocks, LAYOUT)
        for half in gl.static_range(2):
            # Words of two halves are copied in advance, x of one. Words leave shared memory first.
            later = 2 * block + half + 1
            there = later + 1 < 2 * last
            mbarrier.expect(full[1 - half], X_BYTES, pred=later < 2 * last)
            if HAS_MINIMA and half == 1:
                mbarrier.expect(sums_full, SUMS_BYTES, pred=later < 2 * last)
            mbarrier.wait(full[half], phase)
            if HAS_MINIMA and half == 0:
                mbarrier.wait(sums_full, phase)
            async_copy.wait_group(1)
            _barrier()
            low = load_spread(low_shared[half], ROWS, low_words(LAYOUT), low_lanes(LAYOUT))
            high = low
            if HIGH > 0:
                high = load_spread(high_shared[half], ROWS, 1, 4)
            _copy_x(x_shared[1 - half], x_box, 2 * tile * num_blocks + later, full[1 - half], later < 2 * last)
            if HAS_MINIMA and half == 1:
                sums_row = (tile * num_blocks + block + 1) * N
                tma.async_copy_global_to_shared(sums_box, [sums_row, 0], sums_full, sums_shared, pred=later < 2 * last)
            _barrier()
            _copy_words(low_shared[half], planes.low, row_tile, rows, num_blocks, later + 1, there, SWIGLU)
            if HIGH > 0:
                _copy_words(high_shared[half], planes.high, row_tile, rows, num_blocks, later + 1, there, SWIGLU)
            async_copy.commit_group()
            if HAS_MINIMA and half == 0:
                products, factors = start_minima(minima, dmin, sums_shared.permute((1, 0)), acc, ACC, LAYOUT)
            else:
                products, factors = (), ()
            if half == 1:
                following = gl.minimum(block + 1, last - 1)
                scales = load_scales(planes, row, following, num_blocks, LAYOUT)
                if HAS_MINIMA:
                    minima = load_minima(planes, row_tile, rows, following, num_blocks, ROWS, SWIGLU, LAYOUT)
                    dmin = load_factor(planes.m, row, following, num_blocks, LAYOUT)
            for group in gl.static_range(HALF):
                word = scale_word(scales_now, half * HALF + group, LAYOUT) if TERMS > 0 else row
                terms = unpack(low, high, word, group, LAYOUT)
                x = x_shared[half].slice(group * N, N, dim=0).permute((1, 0))
                if TERMS == 0:
                    if len(products) >= FLIGHT:
                        acc = warpgroup_mma_wait(FLIGHT - 1, deps=(products[len(products) - FLIGHT],))
                        total = _add(total, acc, factors[len(products) - FLIGHT])
                    a = gl.convert_layout(terms[0], A, assert_trivial=True)
                    products += (warpgroup_mma(a, x, acc, use_acc=False, is_async=True),)
                    factors += (factor_of(scales_now, half * HALF + group, LAYOUT),)
                else:
                    if HAS_MINIMA and half == 0 and group == 0:
                        acc = warpgroup_mma_wait(0, deps=(products[0],))
                        total = _add(total, acc, factors[0])
                    elif group > 0:
                        acc = warpgroup_mma_wait(TERMS * (FLIGHT - 1), deps=(acc,))
                    for term in gl.static_range(TERMS):
                        a = gl.convert_layout(terms[term], A, assert_trivial=True)
                        if half + group + term == 0:
                            acc = warpgroup_mma(a, x, acc, use_acc=False, is_async=True)
                        else:
                            acc = warpgroup_mma(a, x, acc, is_async=True)
            if TERMS == 0:
                for left in gl.static_range(FLIGHT):
                    acc = warpgroup_mma_wait(FLIGHT - 1 - left, deps=(products[len(products) - FLIGHT + left],))
                    total = _add(total, acc, factors[len(products) - FLIGHT + left])
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
        if TERMS > 0:
            total = _add(total, acc, d.to(gl.float32) * unit_of(LAYOUT))
    TOKENS: gl.constexpr = N // PARTS
    if partials.sums is None:
        write(add_parts(total, PARTS), units_ptr, output, row_tile, tile * TOKENS, rows, num_tokens, SWIGLU)
    elif leave(total, partials):
        AT_ONCE: gl.constexpr = min(16, TOKENS)
        SUMS: gl.constexpr = _sums_layout(ROWS, AT_ONCE)
        for token in range(tile * TOKENS, gl.minimum(tile * TOKENS + TOKENS, num_tokens), AT_ONCE):
            added = add_splits(partials, token - tile * TOKENS, SUMS, ROWS, AT_ONCE, N, PARTS)
            write(added, units_ptr, output, row_tile, token, rows, num_tokens, SWIGLU)


def serves(activations: Input, weight: Weight) -> bool:
    """Whether this regime can compute the product: on compute capability 9.x, where alone wgmma exists."""
    x = activations.x
    return (
        capability(weight.device)[0] == 9
        and has_blocks(weight.layout, weight.shape[1])
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(plane.data_ptr() % 16 == 0 for plane in weight.planes)  # which are read in words
        and weight.shape[0] * weight.shape[1] < MOST_WEIGHTS
    )


def _boxes(tensor: torch.Tensor, height: int) -> TensorDescriptor:
    """``tensor`` [rows, width] float16 as the copy engine takes it, in boxes of ``height`` rows."""
    width = tensor.shape[1]
    return TensorDescriptor.from_tensor(tensor, [height, width], _x_layout(width))


def launch_wgmma(activations: Input, weight: Weight, output: Output, swiglu: bool, resident: bool) -> list[Launch]:
    (rows, columns), layout, device = weight.shape, weight.layout, weight.device
    num_tokens, parts = len(activations.x), num_parts(activations, output)
    plan = Plan.of(rows, columns, num_tokens, parts, layout, device)
    row_tiles = triton.cdiv(rows, plan.rows)
    arranged_shape, sums_shape, partials_shape = plan.shapes(rows, columns, layout)
    arranged = scratch(*arranged_shape, dtype=torch.float16, device=device)
    sums = scratch(*sums_shape, dtype=torch.float16, device=device) if sums_shape[0] else None
    units = scratch(plan.padded, dtype=torch.float32, device=device)
    partials = Partials(None, None)
    if plan.splits > 1:
        partials = Partials(
            scratch(*partials_shape, dtype=torch.float32, device=device),
            scratch(partials_shape[0], dtype=torch.int32, device=device),
        )
    planes, launches = planes_of(weight), []
    for now, output_now in slices_of(activations, output, plan.padded):
        launches += [
            launch_arrange(now, arranged, sums, units, partials.arrived, plan, resident),
            launch(
                _wgmma_kernel,
                (plan.tiles * row_tiles, plan.splits),
                _boxes(arranged, min(256, 128 // layout.group * plan.n)),
                None if sums is None else _boxes(sums, plan.n),
                units,
                planes,
                partials,
                output_now,
                rows,
                columns // 256,
                plan.blocks,
                len(now.x),
                plan.tiles,
                LAYOUT=layout,
                ROWS=plan.rows,
                N=plan.n,
                PARTS=plan.parts,
                SWIGLU=swiglu,
                FLIGHT=plan.flight,
                RESIDENT=resident,
                num_warps=plan.rows // 16,
                maxnreg=plan.registers,
                **early(device),
            ),
        ]
    return launches
