"""The wgmma regime of ``quantized_matmul``: 3 to 64 tokens in 16 bits on Hopper, codes multiplied on tensor cores.

    out[t, n] = sum over groups g of d[n, g] * scales[n, g] * I[t, n, g] - dmin[n, g] * mins[n, g] * S[t, g]
    I[t, n, g] = sum over the columns k of g of code[n, k] * x[t, k]        S[t, g] = sum of x[t, k]

The weight is wgmma's operand A, from registers: codes are whole numbers, exact in 16 bits, so only products leave the
registers. x is operand B, from shared memory. A group's products go to an accumulator of their own, and the group's
scale multiplies that accumulator in float32. S times the minima is one more wgmma per block of 256 columns.

Three launches:

    _arrange_kernel  x (normed, if there is a norm) in the order of the columns below, and S, for N tokens: 8, 16, 32 or
                     64, with zeros for those that there are not.
    _wgmma_kernel    a program owns 64 rows of the weight, N tokens and a split of the blocks; float32 partial sums.
    _gather_kernel   the splits summed in order, joined by bias and residual, or silu(gate) * up; one rounding.

Order of columns: of a row of A, lane q (0 to 3) of a quad holds K = 16 s + 8 h + 2 q + p, for steps s of 16, halves
h and p. A lane is to hold a whole word of codes, which are eight neighbours. So K stands for another column:

    K       16 s + 8 h + 2 q + p      lane     q = 0         q = 1          q = 2          q = 3
    column   8 q + 4 s + 2 h + p      columns  0 1 ... 7     8 9 ... 15     16 17 ... 23   24 25 ... 31

Inside a word, pair j = 2 s + h lies at bit 4 j of either half, so ``(word >> 4 j) & 0x000f000f`` is one register of A.
Joined with the bits of a power of two whose last bit is worth 1 (128 in bfloat16, 1024 in float16), it is a pair of
numbers, and the power of two is subtracted exactly.

Layouts: arranged x [columns / 32, N, 32]; sums [blocks, N, 16] bfloat16 bits, S of eight groups rounded and then the
rest; partial sums [splits, N, rows] float32.

Numerics: x is in its own 16 bits, after the norm if there is one; S has the 16 bits of two bfloat16 numbers; the rest
is float32, in a fixed order. The weight is not rounded.
Moves the planes once, x once per 64 rows (from L2), and 8 x splits x N x rows bytes of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .bound import Launch, launch, scratch
from .launch import configuration
from .quantized_tiles import Input, Output, planes_of, store_tile, tile_rows
from .weight import Weight

ROWS = 64  # of a program: what one warpgroup multiplies
SERVED = ("Q4_K",)
LEAST_TOKENS, MOST_TOKENS = 3, 64

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


def _unpack_assembly(ones: int, kind: str) -> str:
    """One word -> eight numbers: pairs 0 to 3, each the code in the lower half, then that in the upper half."""
    lines = ["{ .reg .b32 o, a0, a1, a2, a3;", f"mov.b32 o, {ones:#010x};", "mov.b32 a0, $8;"]
    lines += [f"shr.u32 a{j}, $8, {4 * j};" for j in (1, 2, 3)]
    for j in range(4):
        lines += [f"lop3.b32 a{j}, a{j}, 0x000f000f, o, 0xEA;", f"sub.{kind} a{j}, a{j}, o;"]
        lines += [f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, a{j};"]
    return "\n".join([*lines, "}"])


UNPACK_BFLOAT16 = gl.constexpr(_unpack_assembly(0x43004300, "bf16x2"))
UNPACK_FLOAT16 = gl.constexpr(_unpack_assembly(0x64006400, "f16x2"))
EIGHT_BFLOAT16 = gl.constexpr((gl.bfloat16,) * 8)
EIGHT_FLOAT16 = gl.constexpr((gl.float16,) * 8)
EIGHT_HALVES = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")


@triton.jit
def _bfloat16_bits(
    x,  # float32
):
    """``x`` rounded to bfloat16, as the bits of a float32; what is not finite stays as it is."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, bits + 0x8000, bits) & -65536


@triton.jit
def _arrange_kernel(
    activations,  # Input
    arranged_ptr,  # [columns / 32, N, 32], dtype of x
    sums_ptr,  # [columns / 256, N, 16] int16, the bits of bfloat16
    num_tokens,
    columns,
    N: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= columns
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)  # K, in the order of the arranged x
    place = offs % 32
    column = (offs - place) + ((place >> 1) & 3) * 8 + (place >> 4) * 4 + ((place >> 3) & 1) * 2 + (place & 1)
    mask = offs < columns
    own = offs < tl.where(token < num_tokens, columns, 0)
    x = tl.load(activations.x + token * activations.stride + column, mask=own, other=0.0)
    if activations.norm is not None:
        wide = x.to(tl.float32)
        root = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / columns + activations.eps)
        norm = tl.load(activations.norm + column, mask=own, other=0.0).to(tl.float32)
        x = (wide * root * norm).to(x.dtype)
    tl.store(arranged_ptr + (offs // 32 * N + token) * 32 + place, x, mask=mask)
    sums = tl.sum(tl.reshape(x.to(tl.float32), [BLOCK // 32, 32]), axis=1)
    high = _bfloat16_bits(sums)
    low = _bfloat16_bits(sums - high.to(tl.float32, bitcast=True))
    group = tl.arange(0, BLOCK // 32)
    sums_ptrs = sums_ptr + (group // 8 * N + token) * 16 + group % 8
    tl.store(sums_ptrs, (high >> 16).to(tl.int16), mask=group < columns // 32)
    tl.store(sums_ptrs + 8, (low >> 16).to(tl.int16), mask=group < columns // 32)


@gluon.jit
def _unpack(
    words,  # [64, 4] int32, a word per lane of a quad
    dtype: gl.constexpr,
):
    """Codes of 32 columns, whole numbers: [64, 32] in the order K."""
    if dtype == gl.bfloat16:
        a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
            UNPACK_BFLOAT16, EIGHT_HALVES, [words], dtype=EIGHT_BFLOAT16, is_pure=True, pack=1
        )
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
            UNPACK_FLOAT16, EIGHT_HALVES, [words], dtype=EIGHT_FLOAT16, is_pure=True, pack=1
        )
    first = gl.join(gl.join(a0, a1), gl.join(b0, b1))  # step 0: [64, q, p, h]
    second = gl.join(gl.join(c0, c1), gl.join(d0, d1))
    return gl.join(first, second).permute(0, 4, 3, 1, 2).reshape([64, 32])


@gluon.jit
def _split8(
    tile,  # [64, 4, 8]
):
    """Its eight parts, in order: [64, 4] each."""
    even, odd = gl.split(tile.reshape([64, 4, 2, 2, 2]))
    even0, even1 = gl.split(even)
    odd0, odd1 = gl.split(odd)
    part0, part4 = gl.split(even0)
    part2, part6 = gl.split(even1)
    part1, part5 = gl.split(odd0)
    part3, part7 = gl.split(odd1)
    return part0, part1, part2, part3, part4, part5, part6, part7


@gluon.jit
def _copy_block(
    x_shared,  # [2 * 8, N, 32]
    sums_shared,  # [2, N, 16]
    x_ptr,
    sums_ptr,
    block,
    stage,
    N: gl.constexpr,
):
    """Starts to copy a block's x and sums to shared memory."""
    WIDTH: gl.constexpr = N // 4 if N < 32 else 8  # 128 threads copy 32 N elements, 16 bytes each at most
    X: gl.constexpr = gl.BlockedLayout([1, WIDTH], [WIDTH, 32 // WIDTH], [4, 1], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, N, layout=gl.SliceLayout(1, X))[:, None]
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, X))[None, :]
    x_ptrs = x_ptr + block * (8 * N * 32) + token * 32 + place
    for group in gl.static_range(8):
        async_copy.async_copy_global_to_shared(x_shared.index(stage * 8 + group), x_ptrs + group * (N * 32))
    token = gl.arange(0, N, layout=gl.SliceLayout(1, SUMS))[:, None]
    place = gl.arange(0, 16, layout=gl.SliceLayout(0, SUMS))[None, :]
    sums_ptrs = sums_ptr + block * (N * 16) + token * 16 + place
    async_copy.async_copy_global_to_shared(sums_shared.index(stage), sums_ptrs)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows"])
def _wgmma_kernel(
    x_ptr,  # [columns / 32, N, 32], arranged
    sums_ptr,  # [columns / 256, N, 16] int16, the bits of bfloat16
    low_ptr,  # [rows, columns / 8] int32
    d_ptr,  # [rows, columns / 256] float16
    scales_ptr,  # [rows, columns / 32] uint8
    dmin_ptr,  # [rows, columns / 256] float16
    mins_ptr,  # [rows, columns / 32] uint8
    partials_ptr,  # [splits, N, rows] float32
    rows,
    columns,
    blocks_per_split,
    N: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    # Words of a block, [64, 32]: as loaded, 16 bytes per lane; and as multiplied, word 4 g + q in lane q.
    LOADED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
    MULTIPLIED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
    MINS: gl.constexpr = gl.DistributedLinearLayout(  # minima of two groups in one uint16, [64, 4]
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
    x_shared = gl.allocate_shared_memory(
        DTYPE, [16, N, 32], gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    )
    sums_shared = gl.allocate_shared_memory(
        gl.bfloat16, [2, N, 16], gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    )
    sums_ptr = sums_ptr.to(gl.pointer_type(gl.bfloat16))
    num_blocks = columns // 256
    first = gl.program_id(1) * blocks_per_split
    last = gl.minimum(first + blocks_per_split, num_blocks)

    # Rows past the end are read as the last one, and not stored.
    row0 = gl.program_id(0).to(gl.int64) * 64
    row_words = gl.minimum(row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LOADED)), rows - 1)
    row_acc = gl.minimum(row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)), rows - 1)
    row_mins = gl.minimum(row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, MINS)), rows - 1)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, LOADED))
    pair = gl.arange(0, 4, layout=gl.SliceLayout(0, MINS))
    low_ptrs = low_ptr + row_words[:, None] * (columns // 8) + word[None, :]
    scales_ptrs = scales_ptr.to(gl.pointer_type(gl.int32)) + row_acc * (columns // 128)  # of four groups each
    mins_ptrs = mins_ptr.to(gl.pointer_type(gl.uint16)) + row_mins[:, None] * (columns // 64) + pair[None, :]
    d_ptrs = d_ptr + row_acc * num_blocks
    dmin_ptrs = dmin_ptr + row_acc * num_blocks

    total = gl.zeros([64, N], gl.float32, layout=ACC)
    _copy_block(x_shared, sums_shared, x_ptr, sums_ptr, first, 0, N)
    words = gl.load(low_ptrs + first * 32)
    scales0 = gl.load(scales_ptrs + first * 2)
    scales1 = gl.load(scales_ptrs + first * 2 + 1)
    d = gl.load(d_ptrs + first)
    dmin = gl.load(dmin_ptrs + first)
    mins = gl.load(mins_ptrs + first * 4)
    for block in range(first, last):
        stage = (block - first) % 2
        async_copy.wait_group(0)
        fence_async_shared()  # by each thread for what it copied, before all meet
        _barrier()
        following = gl.minimum(block + 1, last - 1)
        _copy_block(x_shared, sums_shared, x_ptr, sums_ptr, following, 1 - stage, N)
        tiles = _split8(gl.convert_layout(words, MULTIPLIED).reshape([64, 8, 4]).permute(0, 2, 1))
        scales0_now, scales1_now, d_now, mins_now = scales0, scales1, d.to(gl.float32), mins
        factor = -dmin.to(gl.float32)
        words = gl.load(low_ptrs + following * 32)
        scales0 = gl.load(scales_ptrs + following * 2)
        scales1 = gl.load(scales_ptrs + following * 2 + 1)
        d = gl.load(d_ptrs + following)
        dmin = gl.load(dmin_ptrs + following)
        mins = gl.load(mins_ptrs + following * 4)

        # Minima: those of eight groups, for S rounded, and the same again, for the rest of S.
        even = (mins_now.to(gl.int32) & 255).to(gl.float32).to(gl.bfloat16)
        odd = (mins_now.to(gl.int32) >> 8).to(gl.float32).to(gl.bfloat16)
        eight = gl.join(even, odd)
        a = gl.join(eight, eight).permute(0, 3, 1, 2).reshape([64, 16])
        a = gl.convert_layout(a, A, assert_trivial=True)
        unused = gl.zeros([64, N], gl.float32, layout=ACC)
        sums = sums_shared.index(stage).permute((1, 0))
        running = warpgroup_mma(a, sums, unused, use_acc=False, is_async=True)
        # One product runs while the one before it is scaled; factor belongs to the running one. Of 64 tokens, two
        # accumulators and the total take more registers than there are, so a product ends before the next one starts.
        for group in gl.static_range(8):
            a = gl.convert_layout(_unpack(tiles[group], DTYPE), A, assert_trivial=True)
            x = x_shared.index(stage * 8 + group).permute((1, 0))
            if N == 64:
                unused = warpgroup_mma_wait(0, deps=(running,))
                total += unused * factor[:, None]
                running = warpgroup_mma(a, x, unused, use_acc=False, is_async=True)
            else:
                started = warpgroup_mma(a, x, unused, use_acc=False, is_async=True)
                unused = warpgroup_mma_wait(1, deps=(running,))
                total += unused * factor[:, None]
                running = started
            byte = ((scales0_now if group < 4 else scales1_now) >> (8 * (group % 4))) & 255
            factor = d_now * ((byte | 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0)
        total += warpgroup_mma_wait(0, deps=(running,)) * factor[:, None]
    async_copy.wait_group(0)
    token = gl.program_id(1) * N + gl.arange(0, N, layout=gl.SliceLayout(0, ACC))
    row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    gl.store(partials_ptr + token[None, :].to(gl.int64) * rows + row[:, None], total, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    partials_ptr,  # [splits, N, rows] float32
    output,  # Output
    rows,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    offs_n, mask_n = tile_rows(tl.program_id(0), rows, BLOCK_N, SWIGLU)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        offs = (split * N + token)[:, None] * rows + offs_n[None, :]
        total += tl.load(partials_ptr + offs, mask=mask_n[None, :], other=0.0)
    store_tile(total, output, rows, token, token >= 0, offs_n, mask_n, SWIGLU)


def serves(activations: Input, weight: Weight, output: Output) -> bool:
    """Whether this regime can compute the product: on compute capability 9.x, where alone wgmma exists."""
    device, x = weight.device, activations.x
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
        and weight.ggml_type in SERVED
        and weight.shape[1] > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and LEAST_TOKENS <= x.shape[0] <= MOST_TOKENS
        and all(plane.data_ptr() % 16 == 0 for plane in weight.planes)  # which are read in words
        and (activations.norm is None or output.out.dtype == x.dtype)  # else the normed x is not to be rounded
    )


def padded_tokens(num_tokens: int) -> int:
    """N: what a program multiplies."""
    return max(8, triton.next_power_of_2(num_tokens))


def num_splits(rows: int, columns: int, num_tokens: int, device: torch.device | None) -> tuple[int, int]:
    """(splits of the columns, blocks of 256 columns in each but the last)."""
    wanted = configuration("wgmma", device, rows=rows, columns=columns, tokens=num_tokens)["SPLITS"]
    blocks = triton.cdiv(columns // 256, wanted)
    return triton.cdiv(columns // 256, blocks), blocks


def scratch_bytes(rows: int, columns: int, num_tokens: int, device: torch.device | None) -> int:
    """2 N columns (1 + 1/16) + 4 splits N rows: x arranged, its sums, and partial sums."""
    n, (splits, _) = padded_tokens(num_tokens), num_splits(rows, columns, num_tokens, device)
    return 2 * n * (columns + columns // 16) + 4 * splits * n * rows


def launch_wgmma(activations: Input, weight: Weight, output: Output, swiglu: bool) -> list[Launch]:
    (rows, columns), (num_tokens, _), device = weight.shape, activations.x.shape, weight.device
    n, planes = padded_tokens(num_tokens), planes_of(weight)
    splits, blocks = num_splits(rows, columns, num_tokens, device)
    arranged = scratch(columns // 32, n, 32, dtype=activations.x.dtype, device=device)
    sums = scratch(columns // 256, n, 16, dtype=torch.int16, device=device)
    partials = scratch(splits, n, rows, dtype=torch.float32, device=device)
    return [
        _launch_arrange(activations, arranged, sums),
        launch(
            _wgmma_kernel,
            (triton.cdiv(rows, ROWS), splits),
            arranged,
            sums,
            planes.low,
            planes.d,
            planes.scales,
            planes.m,
            planes.mins,
            partials,
            rows,
            columns,
            blocks,
            N=n,
            num_warps=4,
        ),
        _launch_gather(partials, output, num_tokens, swiglu),
    ]


def _launch_arrange(activations: Input, arranged: torch.Tensor, sums: torch.Tensor) -> Launch:
    (num_tokens, columns), n = activations.x.shape, arranged.shape[1]
    return launch(
        _arrange_kernel,
        (n,),
        activations,
        arranged,
        sums,
        num_tokens,
        columns,
        N=n,
        BLOCK=triton.next_power_of_2(columns),
        **configuration("norm", arranged.device, hidden=columns),
    )


def _launch_gather(partials: torch.Tensor, output: Output, num_tokens: int, swiglu: bool) -> Launch:
    splits, n, rows = partials.shape
    block = 512
    return launch(
        _gather_kernel,
        (triton.cdiv(rows, block), num_tokens),
        partials,
        output,
        rows,
        SPLITS=splits,
        N=n,
        SWIGLU=swiglu,
        BLOCK_N=block,
        num_warps=4,
    )
