"""Before and after the product of the wgmma regime: x in the order that it wants, and its parts summed.

    _arrange_kernel  x (normed, if there is a norm) in float16 and in the order K of ``quantized_wgmma_codes.py``, and
                     the sums S of its groups if the type has minima; zeros for the tokens that there are not.
    _gather_kernel   the splits summed in order, joined by bias and residual, or silu(gate) * up; one rounding.

Each token's x is divided by a power of two, its unit, that brings the largest finite number to at least 2^14 and below
2^15. The product is multiplied by the unit again. So bfloat16's range fits float16: bfloat16 numbers are exact down to
2^-31 of the largest, float16 ones down to 2^-28. Smaller ones are off by at most 2^-39 of the largest, far less than
float32 keeps of the sum.

A normed x that is not to be rounded to 16 bits is taken as two float16 numbers, x rounded and the rest of x, which are
multiplied as if they were two tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .bound import Launch, launch
from .launch import configuration, overlaps
from .quantized_tiles import Input, Output, store_tile, tile_rows
from .weight import QuantLayout

LEAST_TOKENS, MOST_TOKENS = 3, 64
BLOCK = 256  # columns that share d
SUMS_UNIT = tl.constexpr(64.0)  # of S, so that it fits float16 where x does


class Plan(NamedTuple):
    """How a product is cut up.

    padded: tokens, with those that there are not.
    parts: 2 if x is taken as two float16 numbers, x rounded and the rest of x.
    tiles, n: of the padded tokens of all parts, tiles of n.
    splits, blocks: of the columns, splits of so many blocks of 256, but for the last.
    rows: of the weight, of a program: 64 per warpgroup.
    flight: groups whose products run at a time.
    registers: the most per thread.
    """

    padded: int
    parts: int
    tiles: int
    n: int
    splits: int
    blocks: int
    rows: int
    flight: int
    registers: int

    @staticmethod
    def of(
        rows: int, columns: int, num_tokens: int, parts: int, layout: QuantLayout, device: torch.device | None
    ) -> Plan:
        padded = max(8, triton.next_power_of_2(num_tokens))
        n = min(MOST_TOKENS, padded * parts)
        bits = layout.low_bits + layout.high_bits
        chosen = configuration("wgmma", device, rows=rows, columns=columns, tokens=n, bits=bits)
        blocks = triton.cdiv(columns // BLOCK, chosen["SPLITS"])
        splits = triton.cdiv(columns // BLOCK, blocks)
        tiles = padded * parts // n
        return Plan(
            padded, parts, tiles, n, splits, blocks, *(chosen[name] for name in ("ROWS", "FLIGHT", "REGISTERS"))
        )

    def shapes(self, rows: int, columns: int, layout: QuantLayout) -> tuple[tuple[int, ...], ...]:
        """Of x arranged (16 bits), of its sums (16 bits), which not every type has, and of partial sums (float32)."""
        arranged = self.tiles * columns // layout.group * self.n, layout.group
        has_minima = any(plane.name in ("m", "dmin") for plane in layout.planes)
        sums = has_minima * self.tiles * columns // BLOCK * self.n, 2 * BLOCK // layout.group
        return arranged, sums, (self.splits * self.parts, self.padded, rows)


def has_blocks(layout: QuantLayout, columns: int) -> bool:
    """Whether a weight is quantised and has whole blocks of 256 columns."""
    return not layout.is_float and columns > 0 and columns % BLOCK == 0


def scratch_bytes(
    rows: int, columns: int, num_tokens: int, parts: int, layout: QuantLayout, device: torch.device | None
) -> int:
    """x arranged, its units, its sums if the type has minima, and partial sums of each split."""
    plan = Plan.of(rows, columns, num_tokens, parts, layout, device)
    arranged, sums, partials = map(math.prod, plan.shapes(rows, columns, layout))
    return 2 * arranged + 2 * sums + 4 * plan.padded + 4 * partials


def num_parts(activations: Input, output: Output) -> int:
    """2 where a normed x is not to be rounded to 16 bits: two float16 numbers have 22."""
    return 2 if activations.norm is not None and output.out.dtype != activations.x.dtype else 1


@triton.jit
def _arrange_kernel(
    activations,  # Input
    arranged_ptr,  # [tiles, columns / GROUP, N, GROUP] float16
    sums_ptr,  # [tiles, columns / 256, N, 2 * 256 / GROUP] float16, or None
    units_ptr,  # [padded tokens] float32
    num_tokens,
    columns,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two >= columns
    EARLY: tl.constexpr,
):
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    padded = tl.num_programs(0) // PARTS
    token = place % padded
    tile_ptr = arranged_ptr + place // N * N * columns + place % N * GROUP
    offs = tl.arange(0, WIDTH)  # K, in the order of the arranged x
    k = offs % GROUP
    column = (offs - k) + ((k >> 1) & 3) * (GROUP // 4) + (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    own = offs < tl.where(token < num_tokens, columns, 0)
    x = tl.load(activations.x + token * activations.stride + column, mask=own, other=0.0).to(tl.float32)
    if activations.norm is not None:
        root = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + activations.eps)
        x = x * root * tl.load(activations.norm + column, mask=own, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.max(tl.where(bits < 0x7F800000, bits, 0), axis=0) >> 23  # of the largest finite number, plus 127
    power = tl.minimum(14 + 127 - exponent, 126)
    x *= ((127 + power) << 23).to(tl.float32, bitcast=True)
    if place < padded:
        tl.store(units_ptr + token, ((127 - power) << 23).to(tl.float32, bitcast=True))
    rounded = x.to(tl.float16)
    if PARTS == 2:
        rest = (x - rounded.to(tl.float32)).to(rounded.dtype)
        rounded = tl.where(place < padded, rounded, rest)
    tl.store(tile_ptr + offs // GROUP * (N * GROUP) + k, rounded, mask=offs < columns)
    if sums_ptr is not None:
        PER_BLOCK: tl.constexpr = 256 // GROUP
        sums = tl.sum(tl.reshape(rounded.to(tl.float32), [WIDTH // GROUP, GROUP]), axis=1) / SUMS_UNIT
        high = sums.to(tl.float16)
        group = tl.arange(0, WIDTH // GROUP)
        block = place // N * (columns // 256) + group // PER_BLOCK
        sums_ptrs = sums_ptr + (block * N + place % N) * (2 * PER_BLOCK) + group % PER_BLOCK
        tl.store(sums_ptrs, high, mask=group < columns // GROUP)
        tl.store(sums_ptrs + PER_BLOCK, sums - high.to(tl.float32), mask=group < columns // GROUP)


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    partials_ptr,  # [SPLITS, padded tokens, rows] float32, splits and parts of x
    units_ptr,  # [padded tokens] float32
    output,  # Output
    rows,
    padded,
    SPLITS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    offs_n, mask_n = tile_rows(tl.program_id(0), rows, BLOCK_N, SWIGLU)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        offs = (split * padded + token)[:, None] * rows + offs_n[None, :]
        total += tl.load(partials_ptr + offs, mask=mask_n[None, :], other=0.0)
    total *= tl.load(units_ptr + token)[:, None]
    store_tile(total, output, rows, token, token >= 0, offs_n, mask_n, SWIGLU)


def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch that starts while the one in front still runs, where that can be."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(device) else {"EARLY": False}


def launch_arrange(
    activations: Input, arranged: torch.Tensor, sums: torch.Tensor | None, units: torch.Tensor, plan: Plan
) -> Launch:
    num_tokens, columns = activations.x.shape
    return launch(
        _arrange_kernel,
        (plan.padded * plan.parts,),
        activations,
        arranged,
        sums,
        units,
        num_tokens,
        columns,
        PARTS=plan.parts,
        N=plan.n,
        GROUP=arranged.shape[-1],
        WIDTH=triton.next_power_of_2(columns),
        **configuration("norm", arranged.device, hidden=columns),
        **early(arranged.device),
    )


def launch_gather(partials: torch.Tensor, units: torch.Tensor, output: Output, num_tokens: int, swiglu: bool) -> Launch:
    splits, padded, rows = partials.shape
    block = 512
    return launch(
        _gather_kernel,
        (triton.cdiv(rows, block), num_tokens),
        partials,
        units,
        output,
        rows,
        padded,
        SPLITS=splits,
        SWIGLU=swiglu,
        BLOCK_N=block,
        num_warps=4,
        **early(partials.device),
    )
