"""Before the product of the wgmma regime: how it is cut up, and x in the order that it wants.

``_arrange_kernel`` writes x (times the norm's weight, if there is a norm) in float16 and in the order K of
``quantized_wgmma_codes.py``, and the sums S of its groups if the type has minima; zeros for the tokens that there are
not.

Each token's x is divided by a power of two that brings the largest finite number to at least 2^14 and below 2^15. The
product is multiplied by the token's unit: that power of two, and 1 / rms if there is a norm. So bfloat16's range fits
float16: bfloat16 numbers are exact down to 2^-31 of the largest, float16 ones down to 2^-28. Smaller ones are off by at
most 2^-39 of the largest, far less than float32 keeps of the sum.

A normed x that is not to be rounded to 16 bits is taken as two float16 numbers, x rounded and the rest of x, which are
multiplied as if they were two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .bound import Launch, launch
from .launch import configuration, overlaps
from .quantized_tiles import Input, Output
from .quantized_wgmma_codes import num_terms
from .weight import QuantLayout

MOST_COLUMNS = 128  # of a tile
SLICE_BYTES = 64 << 20  # of the scratch of a slice of the tokens, unless one tile needs more
BLOCK = 256  # columns that share d
SUMS_UNIT = tl.constexpr(64.0)  # of S, so that it fits float16 where x does


class Plan(NamedTuple):
    """How a product is cut up.

    slices: of the tokens, one after the other: each has launches of its own, and the same scratch.
    padded: tokens of a slice, with those that there are not.
    parts: 2 if x is taken as two float16 numbers, x rounded and the rest of x.
    tiles, n: of the padded tokens, tiles of n columns: their x, and with two parts the rest of it too.
    splits, blocks: of the columns, splits of so many blocks of 256, but for the last.
    rows: of the weight, of a program: 64 per warpgroup.
    flight: groups whose products run at a time.
    registers: the most per thread.
    """

    slices: int
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
        tokens = min(MOST_COLUMNS // parts, max(8, triton.next_power_of_2(num_tokens)))
        n = tokens * parts
        bits = layout.low_bits + layout.high_bits
        facts = {"rows": rows, "columns": columns, "tokens": n, "bits": bits, "terms": num_terms(layout)}
        chosen = configuration("wgmma", device, **facts)
        blocks = triton.cdiv(columns // BLOCK, chosen["SPLITS"])
        splits = triton.cdiv(columns // BLOCK, blocks)
        most = max(1, SLICE_BYTES // (n * (2 * columns + 4 * splits * rows * (splits > 1))))
        all_tiles = triton.cdiv(num_tokens, tokens)
        slices = triton.cdiv(all_tiles, most)
        tiles = triton.cdiv(all_tiles, slices)
        tile = (chosen[name] for name in ("ROWS", "FLIGHT", "REGISTERS"))
        return Plan(slices, tiles * tokens, parts, tiles, n, splits, blocks, *tile)

    def shapes(self, rows: int, columns: int, layout: QuantLayout) -> tuple[tuple[int, ...], ...]:
        """Of x arranged (16 bits), of its sums (16 bits), which not every type has, and of partial sums (float32)
        of each tile, which a single split does not have."""
        arranged = self.tiles * columns // layout.group * self.n, layout.group
        has_minima = any(plane.name in ("m", "dmin") for plane in layout.planes)
        sums = has_minima * self.tiles * columns // BLOCK * self.n, 2 * BLOCK // layout.group
        partials = (
            (self.splits > 1) * triton.cdiv(rows, self.rows) * self.tiles,
            self.splits,
            self.n // 8,
            self.rows * 8,
        )
        return arranged, sums, partials


def has_blocks(layout: QuantLayout, columns: int) -> bool:
    """Whether a weight is quantised and has whole blocks of 256 columns."""
    return not layout.is_float and columns > 0 and columns % BLOCK == 0


def scratch_bytes(
    rows: int, columns: int, num_tokens: int, parts: int, layout: QuantLayout, device: torch.device | None
) -> int:
    """x arranged, its units, its sums if the type has minima, and partial sums and counters if there are splits."""
    plan = Plan.of(rows, columns, num_tokens, parts, layout, device)
    arranged, sums, partials = plan.shapes(rows, columns, layout)
    sixteen_bits, floats = math.prod(arranged) + math.prod(sums), plan.padded + math.prod(partials) + partials[0]
    return 2 * sixteen_bits + 4 * floats


def num_parts(activations: Input, output: Output) -> int:
    """2 where a normed x is not to be rounded to 16 bits: two float16 numbers have 22."""
    return 2 if activations.norm is not None and output.out.dtype != activations.x.dtype else 1


def slices_of(activations: Input, output: Output, tokens: int) -> Iterator[tuple[Input, Output]]:
    """What goes in and out, so many tokens at a time; as they are, if that is all."""
    num_tokens = len(activations.x)
    if num_tokens <= tokens:
        yield activations, output
        return
    for start in range(0, num_tokens, tokens):
        now = slice(start, start + tokens)
        residual = None if output.residual is None else output.residual[now]
        yield activations._replace(x=activations.x[now]), output._replace(residual=residual, out=output.out[now])


# One kernel for any number of tokens, so that sums have one order.
@triton.jit(do_not_specialize=["num_arrived", "num_tokens", "n"])
def _arrange_kernel(
    activations,  # Input
    arranged_ptr,  # [tiles, columns / GROUP, n, GROUP] float16
    sums_ptr,  # [tiles, columns / 256, n, 2 * 256 / GROUP] float16, or None
    units_ptr,  # [padded tokens] float32
    arrived_ptr,  # [num_arrived] int32, or None
    num_arrived,
    num_tokens,
    columns,
    n,  # columns of a tile
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two >= columns
    ARRIVED: tl.constexpr,  # counters that a program makes zero
    RESIDENT: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # of the columns of all tiles
    tokens = n // PARTS
    token = place // n * tokens + place % tokens
    is_rest = place % n >= tokens
    offs = tl.arange(0, WIDTH)  # K, in the order of the arranged x
    k = offs % GROUP
    column = (offs - k) + ((k >> 1) & 3) * (GROUP // 4) + (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    own = offs < tl.where(token < num_tokens, columns, 0)
    if EARLY:
        cuda.gdc_launch_dependents()
    if EARLY and not RESIDENT:
        cuda.gdc_wait()
    if activations.norm is not None:
        norm = tl.load(activations.norm + column, mask=own, other=0.0).to(tl.float32)
    if EARLY and RESIDENT:
        cuda.gdc_wait()
    if arrived_ptr is not None:
        counter = tl.program_id(0) * ARRIVED + tl.arange(0, ARRIVED)
        tl.store(arrived_ptr + counter, 0, mask=counter < num_arrived)
    x = tl.load(activations.x + token * activations.stride + column, mask=own, other=0.0).to(tl.float32)
    unit = 1.0
    if activations.norm is not None:
        unit = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + activations.eps)
        x *= norm
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.max(tl.where(bits < 0x7F800000, bits, 0), axis=0) >> 23  # of the largest finite number, plus 127
    power = tl.minimum(14 + 127 - exponent, 126)
    x *= ((127 + power) << 23).to(tl.float32, bitcast=True)
    if not is_rest:
        tl.store(units_ptr + token, unit * ((127 - power) << 23).to(tl.float32, bitcast=True))
    rounded = x.to(tl.float16)
    if PARTS == 2:
        rest = (x - rounded.to(tl.float32)).to(rounded.dtype)
        rounded = tl.where(is_rest, rest, rounded)
    tile_ptr = arranged_ptr + place // n * n * columns + place % n * GROUP
    tl.store(tile_ptr + offs // GROUP * (n * GROUP) + k, rounded, mask=offs < columns)
    if sums_ptr is not None:
        PER_BLOCK: tl.constexpr = 256 // GROUP
        sums = tl.sum(tl.reshape(rounded.to(tl.float32), [WIDTH // GROUP, GROUP]), axis=1) / SUMS_UNIT
        high = sums.to(tl.float16)
        group = tl.arange(0, WIDTH // GROUP)
        block = place // n * (columns // 256) + group // PER_BLOCK
        sums_ptrs = sums_ptr + (block * n + place % n) * (2 * PER_BLOCK) + group % PER_BLOCK
        tl.store(sums_ptrs, high, mask=group < columns // GROUP)
        tl.store(sums_ptrs + PER_BLOCK, sums - high.to(tl.float32), mask=group < columns // GROUP)


def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch that starts while the one in front still runs, where that can be."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(device) else {"EARLY": False}


def launch_arrange(
    activations: Input,
    arranged: torch.Tensor,
    sums: torch.Tensor | None,
    units: torch.Tensor,
    arrived: torch.Tensor | None,
    plan: Plan,
    resident: bool,
) -> Launch:
    num_tokens, columns = activations.x.shape
    num_programs, num_arrived = plan.padded * plan.parts, 0 if arrived is None else len(arrived)
    return launch(
        _arrange_kernel,
        (num_programs,),
        activations,
        arranged,
        sums,
        units,
        arrived,
        num_arrived,
        num_tokens,
        columns,
        plan.n,
        PARTS=plan.parts,
        GROUP=arranged.shape[-1],
        WIDTH=triton.next_power_of_2(columns),
        ARRIVED=triton.next_power_of_2(triton.cdiv(num_arrived, 8 * plan.tiles)),  # as many for any number of tokens
        RESIDENT=resident,
        **configuration("norm", arranged.device, hidden=columns),
        **early(arranged.device),
    )
