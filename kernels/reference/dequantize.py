"""Dequantisation: weight = scale * value (+ minimum), with the layout of each type in ``quant_layouts``.

A weight is anything with ``ggml_type``, ``planes`` (NumPy arrays, in the order of the layout) and ``shape``.
"""

from __future__ import annotations

import numpy as np

from .quant_layouts import LAYOUTS, bit_offsets, high_bit_offsets

ROWS_BYTES = 1 << 20  # float32 rows made at a time, so that intermediate results stay in the cache


def unpack(words: np.ndarray, bits: int, offsets: np.ndarray) -> np.ndarray:
    """Codes of ``bits`` bits from words of 32: [rows, num_words] int32 -> [rows, num_words * 32 / bits] int32."""
    codes = (words[:, :, None] >> offsets) & np.int32((1 << bits) - 1)
    return codes.reshape(len(words), -1)


def dequantize(weight, dtype=None) -> np.ndarray:
    """The weights as plain numbers: [rows, columns], made in float32, then converted to ``dtype`` if there is one."""
    dtype = dtype or np.float32
    rows, columns = weight.shape
    layout = LAYOUTS[weight.ggml_type]
    if layout.is_float:
        return weight.planes[0].astype(dtype, copy=False)
    out = np.empty((rows, columns), dtype)
    step = max(1, ROWS_BYTES // (4 * max(1, columns)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        out[part] = _dequantize_rows(
            layout, {p.name: plane[part] for p, plane in zip(layout.planes, weight.planes, strict=True)}
        )
    return out


def _dequantize_rows(layout, planes: dict[str, np.ndarray]) -> np.ndarray:
    code = unpack(planes["low"], layout.low_bits, bit_offsets(layout.low_bits))
    if layout.high_bits:
        offsets = high_bit_offsets(layout.low_bits, layout.high_bits)
        code |= unpack(planes["high"], layout.high_bits, offsets) << layout.low_bits
    value = (code - np.int32(layout.zero)).astype(np.float32)
    if layout.table is not None:
        value = np.array(layout.table, np.float32)[code]

    rows, columns = code.shape
    groups = columns // layout.group
    scale = planes["d"].astype(np.float32)[:, :, None]  # [rows, blocks, 1]
    minimum = None
    with np.errstate(invalid="ignore", over="ignore"):  # a file may hold infinities and NaN: they pass through
        if "packed" in planes:
            packed = planes["packed"].reshape(rows, -1, layout.quant_block // layout.group)
            scale = scale * (packed & 15)
            minimum = -(planes["dmin"].astype(np.float32)[:, :, None] * (packed >> 4))
        elif "scales" in planes:
            scale = scale * planes["scales"].reshape(rows, -1, layout.quant_block // layout.group)
        if "mins" in planes:
            mins = planes["mins"].reshape(rows, -1, layout.quant_block // layout.group)
            minimum = -(planes["dmin"].astype(np.float32)[:, :, None] * mins)
        if "m" in planes:
            minimum = planes["m"].astype(np.float32)
        out = value.reshape(rows, groups, layout.group)
        out *= scale.reshape(rows, groups, 1)
        if minimum is not None:
            out += minimum.reshape(rows, groups, 1)
    return out.reshape(rows, columns)
