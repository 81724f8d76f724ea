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
(``resident``), its first STAGES - 1 blocks are requested before the program waits for them.

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

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


@gluon.constexpr_function
def _swizzled(words: int) -> gl.SwizzledSharedLayout:
    """Rows of ``words`` words, so that a quad's words of eight rows lie in different banks."""
    chunks = words // 4
    return gl.SwizzledSharedLayout(vec=4, per_phase=max(1, 8 // chunks), max_phase=min(8, chunks), order=[1, 0])


@gluon.jit
def _copy_words(
    shared,  # two of [STAGES, ROWS, words of 128 columns]
    plane_ptr,  # [rows, words of a row] int32
    row0,
    rows,
    columns,
    block,
    stage,
    is_there,  # else nothing is copied
    BITS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Starts to copy a block's words of ROWS rows. Rows past the end are read as the last one."""
    WORDS: gl.constexpr = 4 * BITS
    COPIED: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [ROWS // 16, 1], [1, 0])
    row = gl.minimum(row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPIED)), rows - 1)
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIED))
    ptrs = plane_ptr + row[:, None] * (columns * BITS // 32) + (block * (2 * WORDS) + word)[None, :]
    mask = (row >= 0)[:, None] & (word >= 0)[None, :] & is_there
    for half in gl.static_range(2):
        async_copy.async_copy_global_to_shared(shared[half].index(stage), ptrs + half * WORDS, mask=mask)


@gluon.jit
def _copy_rows(
    shared,  # [STAGES, HEIGHT, WIDTH], 16 bits
    source_ptr,  # [blocks, HEIGHT, WIDTH]
    block,
    stage,
    is_there,  # else nothing is copied
    PER_THREAD: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Starts to copy what belongs to a block of the arranged x or of its sums."""
    HEIGHT: gl.constexpr = shared.shape[1]
    WIDTH: gl.constexpr = shared.shape[2]
    LANES: gl.constexpr = WIDTH // PER_THREAD
    COPIED: gl.constexpr = gl.BlockedLayout([1, PER_THREAD], [32 // LANES, LANES], [NUM_WARPS, 1], [1, 0])
    row = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, COPIED))[:, None]
    place = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))[None, :]
    ptrs = source_ptr + block * (HEIGHT * WIDTH) + row * WIDTH + place
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
    SIGNED: gl.constexpr,  # whether a group's own scales are
    TILES: gl.constexpr,
    N: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    RESIDENT: gl.constexpr,
    EARLY: gl.constexpr,
):
    GROUP: gl.constexpr = LAYOUT.group
    NUM_GROUPS: gl.constexpr = 256 // GROUP
    NUM_WARPS: gl.constexpr = ROWS // 16
    LOW: gl.constexpr = 4 * LAYOUT.low_bits  # words of 128 columns
    HIGH: gl.constexpr = 4 * LAYOUT.high_bits
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    HAS_MINIMA: gl.constexpr = planes.m is not None
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * GROUP, element_bitwidth=16, rank=2)
    SUMS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=4 * NUM_GROUPS, element_bitwidth=16, rank=2)
    num_blocks = columns // 256
    tile = gl.program_id(0) % TILES  # neighbours share the rows of the weight, so L2 serves all but one
    x_ptr += tile.to(gl.int64) * (columns * N)
    # One allocation per half of a block: of one allocation, the compiler lets copies wait for each other.
    x_shared = gl.allocate_shared_memory(DTYPE, [STAGES, NUM_GROUPS * N, GROUP], X_LAYOUT)
    low_first = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, LOW], _swizzled(LOW))
    low_second = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, LOW], _swizzled(LOW))
    low_shared = (low_first, low_second)
    high_shared = low_shared
    sums_shared = x_shared
    if HIGH > 0:
        high_first = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, HIGH], _swizzled(HIGH))
        high_second = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, HIGH], _swizzled(HIGH))
        high_shared = (high_first, high_second)
    if HAS_MINIMA:
        sums_ptr = sums_ptr.to(gl.pointer_type(gl.bfloat16)) + tile * (columns * N * 2 // GROUP)
        sums_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 2 * NUM_GROUPS], SUMS_LAYOUT)
    first = gl.program_id(1) * blocks_per_split
    last = gl.minimum(first + blocks_per_split, num_blocks)
    row0 = (gl.program_id(0) // TILES).to(gl.int64) * ROWS
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
    row_read = gl.minimum(row, rows - 1)

    if EARLY and not RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for ahead in gl.static_range(STAGES - 1):
        there = first + ahead < last
        _copy_words(low_shared, planes.low, row0, rows, columns, first + ahead, ahead, there, LAYOUT.low_bits, ROWS)
        if HIGH > 0:
            _copy_words(
                high_shared, planes.high, row0, rows, columns, first + ahead, ahead, there, LAYOUT.high_bits, ROWS
            )
    scales = load_scales(planes, row_read, first, num_blocks, LAYOUT)
    minima = scales
    if HAS_MINIMA:
        minima = load_minima(planes, row0, rows, row_read, first, num_blocks, ROWS, LAYOUT)
    if EARLY and RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for ahead in gl.static_range(STAGES - 1):
        there = first + ahead < last
        _copy_rows(x_shared, x_ptr, first + ahead, ahead, there, 8, NUM_WARPS)
        if HAS_MINIMA:
            _copy_rows(sums_shared, sums_ptr, first + ahead, ahead, there, 2, NUM_WARPS)
        async_copy.commit_group()

    total = gl.zeros([ROWS, N], gl.float32, layout=ACC)
    for block in range(first, last):
        stage = (block - first) % STAGES
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()  # by each thread for what it copied, before all meet
        _barrier()
        later, later_stage = block + STAGES - 1, (stage + STAGES - 1) % STAGES
        there = later < last
        _copy_words(low_shared, planes.low, row0, rows, columns, later, later_stage, there, LAYOUT.low_bits, ROWS)
        if HIGH > 0:
            _copy_words(
                high_shared, planes.high, row0, rows, columns, later, later_stage, there, LAYOUT.high_bits, ROWS
            )
        _copy_rows(x_shared, x_ptr, later, later_stage, there, 8, NUM_WARPS)
        if HAS_MINIMA:
            _copy_rows(sums_shared, sums_ptr, later, later_stage, there, 2, NUM_WARPS)
        async_copy.commit_group()

        scales_now, minima_now = scales, minima
        following = gl.minimum(block + 1, last - 1)
        scales = load_scales(planes, row_read, following, num_blocks, LAYOUT)
        minima = scales
        unused = gl.zeros([ROWS, N], gl.float32, layout=ACC)
        running, factor = unused, gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, ACC))
        if HAS_MINIMA:
            minima = load_minima(planes, row0, rows, row_read, following, num_blocks, ROWS, LAYOUT)
            running, factor = start_minima(minima_now, sums_shared.index(stage).permute((1, 0)), ACC, LAYOUT)
        # One product runs while the one before it is scaled; factor belongs to the running one. Of 64 tokens, two
        # accumulators and the total take more registers than there are, so a product ends before the next one starts.
        x_block = x_shared.index(stage)
        for group in gl.static_range(NUM_GROUPS):
            if group % (NUM_GROUPS // 2) == 0:
                words = low_shared[2 * group // NUM_GROUPS].index(stage)
                low = load_spread(words, ROWS, low_words(LAYOUT), low_lanes(LAYOUT))
                high = low
                if HIGH > 0:
                    high = load_spread(high_shared[2 * group // NUM_GROUPS].index(stage), ROWS, 1, 4)
            a = gl.convert_layout(unpack(low, high, group % (NUM_GROUPS // 2), DTYPE, LAYOUT), A, assert_trivial=True)
            x = x_block.slice(group * N, N, dim=0).permute((1, 0))
            if N == 64:
                if HAS_MINIMA or group > 0:
                    unused = warpgroup_mma_wait(0, deps=(running,))
                    total += unused * factor[:, None]
                running = warpgroup_mma(a, x, unused, use_acc=False, is_async=True)
            else:
                started = warpgroup_mma(a, x, unused, use_acc=False, is_async=True)
                if HAS_MINIMA or group > 0:
                    unused = warpgroup_mma_wait(1, deps=(running,))
                    total += unused * factor[:, None]
                running = started
            factor = scale_of(scales_now, group, LAYOUT, SIGNED)
        total += warpgroup_mma_wait(0, deps=(running,)) * factor[:, None]
    async_copy.wait_group(0)
    token = (gl.program_id(1) * TILES + tile) * N + gl.arange(0, N, layout=gl.SliceLayout(0, ACC))
    gl.store(partials_ptr + token[None, :].to(gl.int64) * rows + row[:, None], total, mask=(row < rows)[:, None])


def serves(activations: Input, weight: Weight) -> bool:
    """Whether this regime can compute the product: on compute capability 9.x, where alone wgmma exists."""
    device, x = weight.device, activations.x
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
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
            (plan.tiles * triton.cdiv(rows, plan.rows_per_program), plan.splits),
            arranged,
            sums,
            planes,
            partials,
            rows,
            columns,
            plan.blocks,
            LAYOUT=layout,
            SIGNED=planes.scales is not None and planes.scales.dtype == torch.int8,
            TILES=plan.tiles,
            N=plan.n,
            ROWS=plan.rows_per_program,
            STAGES=plan.stages,
            RESIDENT=resident,
            num_warps=plan.rows_per_program // 16,
            **early(device),
        ),
        launch_gather(partials, output, num_tokens, swiglu),
    ]
