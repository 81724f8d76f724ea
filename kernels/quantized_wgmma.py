"""The wgmma regime of ``quantized_matmul``: 3 to 64 tokens in 16 bits on Hopper, codes multiplied on tensor cores.

    out[t, n] = sum over groups g of scale[n, g] * I[t, n, g] + minimum[n, g] * S[t, g]
    I[t, n, g] = sum over the columns k of g of value[n, k] * x[t, k]        S[t, g] = sum of x[t, k]

The weight is wgmma's operand A, from registers (``quantized_wgmma_codes.py``): values are whole numbers, exact in 16
bits, so only products leave the registers. x is operand B, from shared memory. A group's products go to an accumulator
of their own, and the group's scale multiplies that accumulator in float32. S times the minima is one more product per
block of 256 columns.

Three launches: x is arranged for N tokens, 8, 16, 32 or 64 (``quantized_wgmma_ends.py``); a program of the product
owns ROWS rows of the weight, a tile of N tokens and a split of the blocks of 256 columns; partial sums are gathered.
Each starts while the one in front still runs. Where the weight is known to be older than the kernels still running
(``resident``), its first parts of a block are requested before the program waits for them.

Layouts: arranged x [tiles, columns / group, N, group]; sums [tiles, blocks, N, 2 * groups of a block] bfloat16 bits, S
rounded and then the rest of S; partial sums [splits, tiles, N, rows] float32.

Numerics: x is in its own 16 bits, after the norm if there is one, or in two bfloat16 numbers where a normed x is not to
be rounded. S has the 16 bits of two bfloat16 numbers. The rest is float32, in a fixed order. The weight is not rounded.
Moves the planes once, x once per ROWS rows (from L2), and 8 x splits x N x rows bytes of partial sums.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda

from .bound import Launch, launch, scratch
from .gpu import capability
from .quantized_tiles import Input, Output, planes_of
from .quantized_wgmma_codes import load_spread, low_lanes, low_words, unpack
from .quantized_wgmma_ends import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Plan,
    early,
    has_blocks,
    launch_arrange,
    launch_gather,
    num_parts,
)
from .quantized_wgmma_scales import load_minima, load_scales, scale_of, start_minima
from .weight import Weight

ROWS = gl.constexpr(64)  # of a program: what one warpgroup multiplies

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


@gluon.constexpr_function
def _swizzled(words: int) -> gl.SwizzledSharedLayout:
    """Rows of ``words`` words, so that a quad's words of eight rows lie in different banks."""
    chunks = words // 4
    return gl.SwizzledSharedLayout(vec=4, per_phase=max(1, 8 // chunks), max_phase=min(8, chunks), order=[1, 0])


@gluon.jit
def _copy_words(
    shared,  # [STAGES * HALVES, ROWS, words of half a block]
    plane_ptr,  # [rows, words of a row] int32
    row0,
    rows,
    columns,
    part,  # of the columns: HALVES halves of a block
    stage,
    is_there,  # else nothing is copied
    HALVES: gl.constexpr,
    BITS: gl.constexpr,
):
    """Starts to copy words of ROWS rows. Rows past the end are read as the last one."""
    WORDS: gl.constexpr = shared.shape[2]
    COPIED: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [4, 1], [1, 0])
    row = gl.minimum(row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPIED)), rows - 1)
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIED))
    ptrs = plane_ptr + row[:, None] * (columns * BITS // 32) + (part * (HALVES * WORDS) + word)[None, :]
    mask = (row >= 0)[:, None] & (word >= 0)[None, :] & is_there
    for half in gl.static_range(HALVES):
        async_copy.async_copy_global_to_shared(shared.index(stage * HALVES + half), ptrs + half * WORDS, mask=mask)


@gluon.jit
def _copy_rows(
    shared,  # [STAGES, HEIGHT, WIDTH], 16 bits
    source_ptr,  # [parts, HEIGHT, WIDTH]
    part,
    stage,
    is_there,  # else nothing is copied
    PER_THREAD: gl.constexpr,
):
    """Starts to copy a part of the arranged x or of its sums."""
    HEIGHT: gl.constexpr = shared.shape[1]
    WIDTH: gl.constexpr = shared.shape[2]
    LANES: gl.constexpr = WIDTH // PER_THREAD
    COPIED: gl.constexpr = gl.BlockedLayout([1, PER_THREAD], [32 // LANES, LANES], [4, 1], [1, 0])
    row = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, COPIED))[:, None]
    place = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))[None, :]
    ptrs = source_ptr + part * (HEIGHT * WIDTH) + row * WIDTH + place
    mask = (row >= 0) & (place >= 0) & is_there
    async_copy.async_copy_global_to_shared(shared.index(stage), ptrs, mask=mask)


@gluon.jit(do_not_specialize=["rows"])
def _wgmma_kernel(
    x_ptr,  # [TILES, columns / group, N, group], arranged
    sums_ptr,  # [TILES, columns / 256, N, 2 * 256 / group] int16, the bits of bfloat16; or None
    planes,  # Planes
    partials_ptr,  # [splits, TILES, N, rows] float32
    rows,
    columns,
    blocks_per_split,
    LAYOUT: gl.constexpr,
    TILES: gl.constexpr,
    N: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    FLIGHT: gl.constexpr,
    RESIDENT: gl.constexpr,
    EARLY: gl.constexpr,
):
    GROUP: gl.constexpr = LAYOUT.group
    NUM_GROUPS: gl.constexpr = 256 // GROUP
    SUMS: gl.constexpr = 1 + (STAGES + PARTS - 2) // PARTS  # blocks whose sums are there
    PART: gl.constexpr = NUM_GROUPS // PARTS  # groups of a part
    HALVES: gl.constexpr = 2 // PARTS  # of a block, that a part has: their words are unpacked together
    LOW: gl.constexpr = 4 * LAYOUT.low_bits  # words of a half
    HIGH: gl.constexpr = 4 * LAYOUT.high_bits
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    HAS_MINIMA: gl.constexpr = planes.m is not None
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * GROUP, element_bitwidth=16, rank=2)
    SUMS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=4 * NUM_GROUPS, element_bitwidth=16, rank=2)
    num_blocks = columns // 256
    tile = gl.program_id(0) % TILES  # neighbours share the rows of the weight, so L2 serves all but one
    x_ptr += tile.to(gl.int64) * (columns * N)
    x_shared = gl.allocate_shared_memory(DTYPE, [STAGES, PART * N, GROUP], X_LAYOUT)
    low_shared = gl.allocate_shared_memory(gl.int32, [STAGES * HALVES, ROWS, LOW], _swizzled(LOW))
    high_shared, sums_shared = low_shared, x_shared
    if HIGH > 0:
        high_shared = gl.allocate_shared_memory(gl.int32, [STAGES * HALVES, ROWS, HIGH], _swizzled(HIGH))
    if HAS_MINIMA:
        sums_ptr = sums_ptr.to(gl.pointer_type(gl.bfloat16)) + tile * (columns * N * 2 // GROUP)
        sums_shared = gl.allocate_shared_memory(gl.bfloat16, [SUMS, N, 2 * NUM_GROUPS], SUMS_LAYOUT)
    first = gl.program_id(1) * blocks_per_split
    last = gl.minimum(first + blocks_per_split, num_blocks)
    row0 = (gl.program_id(0) // TILES).to(gl.int64) * ROWS
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
    row_read = gl.minimum(row, rows - 1)

    if EARLY and not RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for ahead in gl.static_range(STAGES - 1):
        part = PARTS * first + ahead
        there = part < PARTS * last
        _copy_words(low_shared, planes.low, row0, rows, columns, part, ahead, there, HALVES, LAYOUT.low_bits)
        if HIGH > 0:
            _copy_words(high_shared, planes.high, row0, rows, columns, part, ahead, there, HALVES, LAYOUT.high_bits)
    scales = load_scales(planes, row_read, first, num_blocks, LAYOUT)
    minima = scales
    if HAS_MINIMA:
        minima = load_minima(planes, row0, rows, row_read, first, num_blocks, ROWS, LAYOUT)
    if EARLY and RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for ahead in gl.static_range(STAGES - 1):
        part = PARTS * first + ahead
        _copy_rows(x_shared, x_ptr, part, ahead, part < PARTS * last, 8)
        if HAS_MINIMA and ahead % PARTS == 0:
            _copy_rows(sums_shared, sums_ptr, part // PARTS, ahead // PARTS, part < PARTS * last, 2)
        async_copy.commit_group()

    total = gl.zeros([ROWS, N], gl.float32, layout=ACC)
    for block in range(first, last):
        scales_now, minima_now = scales, minima
        following = gl.minimum(block + 1, last - 1)
        scales = load_scales(planes, row_read, following, num_blocks, LAYOUT)
        minima = scales
        if HAS_MINIMA:
            minima = load_minima(planes, row0, rows, row_read, following, num_blocks, ROWS, LAYOUT)
        for own in gl.static_range(PARTS):
            part = PARTS * block + own
            stage = (part - PARTS * first) % STAGES
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()  # by each thread for what it copied, before all meet
            _barrier()
            later, later_stage = part + STAGES - 1, (stage + STAGES - 1) % STAGES
            there = later < PARTS * last
            _copy_words(low_shared, planes.low, row0, rows, columns, later, later_stage, there, HALVES, LAYOUT.low_bits)
            if HIGH > 0:
                _copy_words(
                    high_shared, planes.high, row0, rows, columns, later, later_stage, there, HALVES, LAYOUT.high_bits
                )
            _copy_rows(x_shared, x_ptr, later, later_stage, there, 8)
            if HAS_MINIMA and (own + STAGES - 1) % PARTS == 0:
                block_later = later // PARTS
                _copy_rows(sums_shared, sums_ptr, block_later, (block_later - first) % SUMS, there, 2)
            async_copy.commit_group()

            # FLIGHT products run at a time, while the next group is unpacked and the oldest product is scaled.
            if HAS_MINIMA and own == 0:
                sums = sums_shared.index((block - first) % SUMS).permute((1, 0))
                products, factors = start_minima(minima_now, sums, ACC, LAYOUT)
            else:
                products, factors = (), ()
            x_part = x_shared.index(stage)
            for group in gl.static_range(PART):
                if group % (NUM_GROUPS // 2) == 0:
                    words = stage * HALVES + 2 * group // NUM_GROUPS
                    low = load_spread(low_shared.index(words), ROWS, low_words(LAYOUT), low_lanes(LAYOUT))
                    high = low
                    if HIGH > 0:
                        high = load_spread(high_shared.index(words), ROWS, 1, 4)
                a = unpack(low, high, group % (NUM_GROUPS // 2), DTYPE, LAYOUT)
                a = gl.convert_layout(a, A, assert_trivial=True)
                if len(products) >= FLIGHT:
                    oldest = warpgroup_mma_wait(FLIGHT - 1, deps=(products[len(products) - FLIGHT],))
                    total += oldest * factors[len(products) - FLIGHT][:, None]
                x = x_part.slice(group * N, N, dim=0).permute((1, 0))
                unused = gl.zeros([ROWS, N], gl.float32, layout=ACC)
                products += (warpgroup_mma(a, x, unused, use_acc=False, is_async=True),)
                factors += (scale_of(scales_now, own * PART + group, LAYOUT),)
            for left in gl.static_range(FLIGHT):
                oldest = warpgroup_mma_wait(FLIGHT - 1 - left, deps=(products[len(products) - FLIGHT + left],))
                total += oldest * factors[len(products) - FLIGHT + left][:, None]
    async_copy.wait_group(0)
    token = (gl.program_id(1) * TILES + tile) * N + gl.arange(0, N, layout=gl.SliceLayout(0, ACC))
    gl.store(partials_ptr + token[None, :].to(gl.int64) * rows + row[:, None], total, mask=(row < rows)[:, None])


def serves(activations: Input, weight: Weight) -> bool:
    """Whether this regime can compute the product: on compute capability 9.x, where alone wgmma exists."""
    x = activations.x
    return (
        capability(weight.device)[0] == 9
        and has_blocks(weight.layout, weight.shape[1])
        and x.dtype in (torch.bfloat16, torch.float16)
        and LEAST_TOKENS <= x.shape[0] <= MOST_TOKENS
        and all(plane.data_ptr() % 16 == 0 for plane in weight.planes)  # which are read in words
    )


def launch_wgmma(activations: Input, weight: Weight, output: Output, swiglu: bool, resident: bool) -> list[Launch]:
    (rows, columns), layout, device = weight.shape, weight.layout, weight.device
    num_tokens, parts = len(activations.x), num_parts(activations, output)
    plan = Plan.of(rows, columns, num_tokens, parts, layout, device)
    dtype = activations.x.dtype if parts == 1 else torch.bfloat16
    arranged_shape, sums_shape, partials_shape = plan.shapes(rows, columns, layout)
    arranged = scratch(*arranged_shape, dtype=dtype, device=device)
    sums = scratch(*sums_shape, dtype=torch.int16, device=device) if sums_shape[0] else None
    partials = scratch(*partials_shape, dtype=torch.float32, device=device)
    planes = planes_of(weight)
    return [
        launch_arrange(activations, arranged, sums, plan),
        launch(
            _wgmma_kernel,
            (plan.tiles * triton.cdiv(rows, ROWS), plan.splits),
            arranged,
            sums,
            planes,
            partials,
            rows,
            columns,
            plan.blocks,
            LAYOUT=layout,
            TILES=plan.tiles,
            N=plan.n,
            PARTS=plan.parts_of_block,
            STAGES=plan.stages,
            FLIGHT=plan.flight,
            RESIDENT=resident,
            num_warps=4,
            **early(device),
        ),
        launch_gather(partials, output, num_tokens, swiglu),
    ]
