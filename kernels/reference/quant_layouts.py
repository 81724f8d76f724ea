"""How each ggml type lies in memory once repacked: one table, read by the definitions, the kernels and the loader.

A tensor of ``rows`` x ``columns`` weights is a few planes, each row-major [rows, columns / elements_per_entry], so that
whole rows can be gathered, permuted and concatenated, and so that a thread can load 16 bytes of any of them at a time.

    weight = scale * value (+ minimum)
    value    table[code] if the type has a table, else code - zero
    code     low | high << low_bits, unsigned
    scale    d, or d * scales where the type has scales of its own inside a block of 256
    minimum  m, or -dmin * mins

Planes:

    values   float weights as they are (F32, F16, BF16)
    low      the low 2, 4 or 8 bits of the codes, in words of 32 bits (int32)
    high     the high 1 or 2 bits of the codes, in words of 32 bits (int32)
    d, m     float16, one per block; dmin likewise
    scales   int8 or uint8, one per group
    mins     uint8, one per group
    packed   uint8, one per group: scale in the low four bits, minimum in the high four (Q2_K)

Order inside a word: a word holds 32 / bits consecutive elements, and element i of them starts at bit

    bits * (i // 2) + 16 * (i % 2)

so that one mask yields two neighbours, each in its own half of the word (0x000f000f for four bits), as packed 16-bit
arithmetic needs them; or one code per byte (0x0f0f0f0f), as dot products of bytes need them. Shifts alone yield the
codes in natural order.

A word of the plane ``high`` serves several words of ``low``. Masked to one code per byte, the low word w shifted right
by low_bits * j is part w * 8 / low_bits + j; the high bits of part t, in the same bytes, start at bit high_bits * t. So
one shift and one mask bring the high bits of four codes to where their low bits are.

Bytes: equal to the file's for every type except Q4_K (+2.8%), Q5_K (+2.3%), Q3_K (+3.6%) and IQ4_XS (+1.5%), whose
6-bit scales are widened to a byte each.

Every product d * scale * value has at most 23 significant bits, so in float32 only the final addition rounds: any order
of evaluation, fused multiply-add included, gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Plane:
    """One plane: ``dtype`` by its NumPy name (or 'bfloat16'), one entry for ``elements`` columns."""

    name: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class QuantLayout:
    """How one ggml type is laid out.

    quant_block: columns that share d; the number of columns must be a multiple of it.
    group: elements that share a scale.
    low_bits, high_bits: bits of a code in the planes ``low`` and ``high``; low_bits 0 means float weights.
    zero: what is subtracted from a code.
    table: what a code stands for, if not itself.
    packed: a group's scale and minimum share a byte.

    A kernel is compiled for a layout, and its compiled form is remembered by the layout's repr: numbers that change
    the code must stand in it.
    """

    planes: tuple[Plane, ...] = field(repr=False)
    quant_block: int = 1
    group: int = 1
    low_bits: int = 0
    high_bits: int = 0
    zero: int = 0
    table: tuple[int, ...] | None = None
    packed: bool = False

    @property
    def is_float(self) -> bool:
        return self.low_bits == 0

    @property
    def has_signed_scales(self) -> bool:
        """Whether a group's own scale has a sign. No two layouts of one repr differ in it."""
        return any(plane.name == "scales" and plane.dtype == "int8" for plane in self.planes)


def _floats(dtype: str) -> QuantLayout:
    return QuantLayout((Plane("values", dtype, 1),))


def _quants(block: int, group: int, low: int, *rest: Plane, high: int = 0, zero: int = 0, table=None) -> QuantLayout:
    words = [Plane("low", "int32", 32 // low)] + ([Plane("high", "int32", 32 // high)] if high else [])
    packed = any(plane.name == "packed" for plane in rest)
    return QuantLayout((*words, *rest), block, group, low, high, zero, table, packed)


def _half(name: str, block: int) -> Plane:
    return Plane(name, "float16", block)


LAYOUTS: dict[str, QuantLayout] = {
    "F32": _floats("float32"),
    "F16": _floats("float16"),
    "BF16": _floats("bfloat16"),
    "Q4_0": _quants(32, 32, 4, _half("d", 32), zero=8),
    "Q4_1": _quants(32, 32, 4, _half("d", 32), _half("m", 32)),
    "Q5_0": _quants(32, 32, 4, _half("d", 32), high=1, zero=16),
    "Q5_1": _quants(32, 32, 4, _half("d", 32), _half("m", 32), high=1),
    "Q8_0": _quants(32, 32, 8, _half("d", 32), zero=128),
    "IQ4_NL": _quants(32, 32, 4, _half("d", 32), table=IQ4_TABLE),
    "Q2_K": _quants(256, 16, 2, _half("d", 256), _half("dmin", 256), Plane("packed", "uint8", 16)),
    "Q3_K": _quants(256, 16, 2, _half("d", 256), Plane("scales", "int8", 16), high=1, zero=4),
    "Q4_K": _quants(
        256, 32, 4, _half("d", 256), _half("dmin", 256), Plane("scales", "uint8", 32), Plane("mins", "uint8", 32)
    ),
    "Q5_K": _quants(
        256,
        32,
        4,
        _half("d", 256),
        _half("dmin", 256),
        Plane("scales", "uint8", 32),
        Plane("mins", "uint8", 32),
        high=1,
    ),
    "Q6_K": _quants(256, 16, 4, _half("d", 256), Plane("scales", "int8", 16), high=2, zero=32),
    "IQ4_XS": _quants(256, 32, 4, _half("d", 256), Plane("scales", "int8", 32), table=IQ4_TABLE),
}


def bit_offsets(bits: int) -> np.ndarray:
    """The first bit of each element of a word of 32, in the order of the elements: [32 // bits], int32."""
    i = np.arange(32 // bits, dtype=np.int32)
    return bits * (i // 2) + 16 * (i % 2)


def high_bit_offsets(low_bits: int, high_bits: int) -> np.ndarray:
    """``bit_offsets`` of the plane ``high``: [32 // high_bits], int32."""
    per_low_word = 32 // low_bits
    i = np.arange(32 // high_bits, dtype=np.int32)
    low = bit_offsets(low_bits)[i % per_low_word]
    part = i // per_low_word * (8 // low_bits) + low % 8 // low_bits
    return 8 * (low // 8) + high_bits * part
