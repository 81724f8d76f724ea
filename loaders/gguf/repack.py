"""Lossless repacking of ggml blocks into the planes of ``rooflama.kernels.LAYOUTS``.

A file stores a tensor as rows of blocks of 18 to 210 bytes, each with its scales beside its codes. Repacking brings the
codes into natural order, one byte each, and packs them into words; it gathers the scales and widens 6-bit scales to a
byte. No number is rounded: dequantising the planes gives the bits of ``gguf.quants.dequantize``.

The work is split into runs of rows that fit the cache, on a few threads (NumPy releases the interpreter lock).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from rooflama.kernels import LAYOUTS, KernelInputError, Weight
from rooflama.kernels.reference.quant_layouts import QuantLayout

from .types import TYPE_SIZES, row_nbytes

RUN_WEIGHTS = 1 << 18  # weights that a thread repacks at a time


def repack(raw: np.ndarray, ggml_type: str, columns: int) -> Weight:
    """Repack a tensor into planes on the CPU.

    Args:
        raw: uint8 [rows, bytes_per_row], as in the file; may be memory-mapped, is only read.
        ggml_type: a key of ``LAYOUTS``.
        columns: weights per row.

    Raises:
        KernelInputError: the type has no layout, or the bytes do not hold ``columns`` weights per row.
    """
    return repack_stack([raw], ggml_type, columns)


def repack_stack(raws: Sequence[np.ndarray], ggml_type: str, columns: int) -> Weight:
    """Repack tensors of one type and width into one matrix, each below the one before. Otherwise like ``repack``."""
    layout = LAYOUTS.get(ggml_type)
    if layout is None:
        raise KernelInputError(
            f"ggml type {ggml_type!r}", rule=f"repacked types are {', '.join(LAYOUTS)}", remedy="Dequantise it instead"
        )
    block, block_nbytes = TYPE_SIZES[ggml_type]
    for raw in raws:
        if columns % block or raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] != row_nbytes(ggml_type, columns):
            raise KernelInputError(
                f"{raw.dtype} bytes of shape {list(raw.shape)} for {columns} columns of {ggml_type}",
                rule=f"{block} weights of {ggml_type} take {block_nbytes} bytes, rows hold whole blocks",
                remedy="Check the tensor's shape and type in the file",
            )
    shape = (sum(map(len, raws)), columns)
    if layout.is_float:
        return Weight.make(ggml_type, (_float_rows(raws, ggml_type),), shape)

    planes = {p.name: np.empty((shape[0], columns // p.elements), p.dtype) for p in layout.planes}
    step = max(1, RUN_WEIGHTS // max(1, columns))
    runs: list[tuple[np.ndarray, int]] = []  # some rows of a tensor, and the first row of the stack that they become
    above = 0
    for raw in raws:
        runs += [(raw[start : start + step], above + start) for start in range(0, len(raw) if columns else 0, step)]
        above += len(raw)

    def fill(run: tuple[np.ndarray, int]) -> None:
        rows, start = run
        for name, part in _repack_rows(rows, ggml_type, layout).items():
            planes[name][start : start + len(rows)] = part.reshape(-1, planes[name].shape[1])

    list(_threads().map(fill, runs))
    return Weight.make(ggml_type, (torch.from_numpy(planes[p.name]) for p in layout.planes), shape)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Kept, since starting eight threads takes longer than a matrix of a small model."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of them


def _float_rows(raws: Sequence[np.ndarray], ggml_type: str) -> torch.Tensor:
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}[ggml_type]
    rows = torch.from_numpy(np.concatenate([np.asarray(raw) for raw in raws]).view(dtype))
    return rows.view(torch.bfloat16) if ggml_type == "BF16" else rows


def _repack_rows(raw: np.ndarray, ggml_type: str, layout: QuantLayout) -> dict[str, np.ndarray]:
    blocks = np.ascontiguousarray(raw).reshape(-1, TYPE_SIZES[ggml_type][1])
    codes = _READERS[ggml_type](blocks)
    if layout.high_bits:
        high = pack_high(codes.pop("codes_high"), layout.low_bits, layout.high_bits)
        return {"low": pack(codes.pop("codes"), layout.low_bits), "high": high, **codes}
    return {"low": pack(codes.pop("codes"), layout.low_bits), **codes}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes in natural order, one byte each, into 32-bit words: uint8 [n, size] -> int32 [n, size * bits / 32].

    A 64-bit number holds eight codes. A mask selects every second one, at bits 0, 16, 32 and 48; one multiplication
    brings these four side by side from bit 48 on.
    """
    lanes = np.ascontiguousarray(codes).view("<u8")
    if bits == 8:  # e0 e1 e2 e3 -> e0 e2 e1 e3
        words = lanes.view("<u4")
        moved = (words & 0xFF0000FF) | ((words & 0x0000FF00) << 8) | ((words & 0x00FF0000) >> 8)
        return moved.view(np.int32)
    mask = np.uint64(((1 << bits) - 1) * 0x0001000100010001)
    gather = np.uint64(sum(1 << (48 - (16 - bits) * pair) for pair in range(4)))
    four = np.uint64((1 << (4 * bits)) - 1)
    even = (((lanes & mask) * gather) >> np.uint64(48)) & four
    odd = ((((lanes >> np.uint64(8)) & mask) * gather) >> np.uint64(48)) & four
    eights = even | (odd << np.uint64(16))
    per_word = 4 // bits
    words = eights[:, 0::per_word]
    for part in range(1, per_word):
        words = words | (eights[:, part::per_word] << np.uint64(4 * bits * part))
    return words.astype(np.uint32).view(np.int32)


def pack_high(codes: np.ndarray, low_bits: int, high_bits: int) -> np.ndarray:
    """Pack the plane ``high`` in the order of ``low``: uint8 [n, size] -> int32 [n, size * high_bits / 32].

    ``pack`` puts neighbouring codes into the two halves of a word. One high word serves several low words, and each of
    its bytes holds the codes of half a low word; so the halves of these low words are brought together first, by
    swapping two axes.
    """
    half_low_word = np.dtype(f"<u{16 // low_bits}")
    halves = np.ascontiguousarray(codes).view(half_low_word).reshape(len(codes), -1, low_bits // high_bits, 2)
    swapped = np.ascontiguousarray(halves.transpose(0, 1, 3, 2))
    return pack(swapped.reshape(len(codes), -1).view(np.uint8), high_bits)


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16)


def _fields(stored: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Unpack ggml's order: the low fields of ``run`` bytes are elements 0..run-1, the next fields the next run.

    uint8 [n, size] -> uint8 [n, size * 8 / bits].
    """
    out = np.empty((len(stored), stored.shape[1] // run, 8 // bits, run), np.uint8)
    view = stored.reshape(len(stored), -1, run)
    for part in range(8 // bits):
        np.right_shift(view, bits * part, out=out[:, :, part])
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(len(stored), -1)


def _bits(stored: np.ndarray) -> np.ndarray:
    """Unpack one bit per element, the lowest first: uint8 [n, size] -> uint8 [n, size * 8]."""
    return np.unpackbits(np.ascontiguousarray(stored), axis=1, bitorder="little")


def _scales_and_mins(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K from 12 bytes."""
    first, second, third = stored[:, 0:4], stored[:, 4:8], stored[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, mins


# One reader per type: blocks uint8 [n, bytes] -> its planes, with the codes one byte each in natural order.


def _q4_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _fields(b[:, 2:18], 16, 4), "d": _half(b, 0)}


def _q4_1(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _fields(b[:, 4:20], 16, 4), "d": _half(b, 0), "m": _half(b, 2)}


def _q5_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _fields(b[:, 6:22], 16, 4), "codes_high": _bits(b[:, 2:6]), "d": _half(b, 0)}


def _q5_1(b: np.ndarray) -> dict[str, np.ndarray]:
    codes, high = _fields(b[:, 8:24], 16, 4), _bits(b[:, 4:8])
    return {"codes": codes, "codes_high": high, "d": _half(b, 0), "m": _half(b, 2)}


def _q8_0(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": b[:, 2:34] ^ np.uint8(128), "d": _half(b, 0)}  # a signed byte plus 128


def _q2_k(b: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _fields(b[:, 16:80], 32, 2), "d": _half(b, 80), "dmin": _half(b, 82), "packed": b[:, 0:16]}


def _q3_k(b: np.ndarray) -> dict[str, np.ndarray]:
    low = _fields(b[:, 96:104], 8, 4)
    high = _fields(b[:, 104:108], 4, 2)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    codes, mask = _fields(b[:, 32:96], 32, 2), _fields(b[:, 0:32], 32, 1)
    return {"codes": codes, "codes_high": mask, "d": _half(b, 108), "scales": scales}


def _q4_k(b: np.ndarray) -> dict[str, np.ndarray]:
    scales, mins = _scales_and_mins(b[:, 4:16])
    codes = _fields(b[:, 16:144], 32, 4)
    return {"codes": codes, "d": _half(b, 0), "dmin": _half(b, 2), "scales": scales, "mins": mins}


def _q5_k(b: np.ndarray) -> dict[str, np.ndarray]:
    scales, mins = _scales_and_mins(b[:, 4:16])
    codes, high = _fields(b[:, 48:176], 32, 4), _fields(b[:, 16:48], 32, 1)
    return {
        "codes": codes,
        "codes_high": high,
        "d": _half(b, 0),
        "dmin": _half(b, 2),
        "scales": scales,
        "mins": mins,
    }


def _q6_k(b: np.ndarray) -> dict[str, np.ndarray]:
    codes, high = _fields(b[:, 0:128], 64, 4), _fields(b[:, 128:192], 32, 2)
    return {"codes": codes, "codes_high": high, "d": _half(b, 208), "scales": b[:, 192:208].view(np.int8)}


def _iq4_xs(b: np.ndarray) -> dict[str, np.ndarray]:
    low = _fields(b[:, 4:8], 1, 4)
    high = _fields(b[:, 2:4], 1, 2)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    return {"codes": _fields(b[:, 8:136], 16, 4), "d": _half(b, 0), "scales": scales}


_READERS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
