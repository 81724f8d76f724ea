"""Random ggml blocks of every type, made from bytes: gguf's writer has no K-quants."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import LAYOUTS, Weight
from rooflama.loaders.gguf.repack import repack
from rooflama.loaders.gguf.types import TYPE_SIZES, row_nbytes

from .strategies import DEVICE, guarded

TYPES = list(LAYOUTS)

# Byte offsets of the float16 numbers in a block: d first, then m or dmin.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}


def random_bytes(rng: np.random.Generator, ggml_type: str, rows: int, columns: int) -> np.ndarray:
    """Arbitrary bytes, [rows, bytes_per_row]. Some scales are infinite or NaN."""
    return rng.integers(0, 256, (rows, row_nbytes(ggml_type, columns)), dtype=np.uint8)


def random_blocks(rng: np.random.Generator, ggml_type: str, rows: int, columns: int) -> np.ndarray:
    """Random codes under finite scales, [rows, bytes_per_row]: weights of about unit size."""
    if LAYOUTS[ggml_type].is_float:
        kind = gguf.GGMLQuantizationType[ggml_type]
        return gguf.quants.quantize(rng.standard_normal((rows, columns)).astype(np.float32), kind).view(np.uint8)
    raw = random_bytes(rng, ggml_type, rows, columns)
    blocks = raw.reshape(-1, TYPE_SIZES[ggml_type][1])
    largest = 2.0 ** (LAYOUTS[ggml_type].low_bits + LAYOUTS[ggml_type].high_bits - 1)
    if LAYOUTS[ggml_type].table is not None:
        largest = 127.0
    if LAYOUTS[ggml_type].quant_block == 256:
        largest *= 64.0 if ggml_type == "Q6_K" else 16.0
    for offset in HALVES[ggml_type]:
        scales = (rng.uniform(0.2, 2.0, len(blocks)) * rng.choice([-1.0, 1.0], len(blocks)) / largest).astype(
            np.float16
        )
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return raw


def random_weight(rng: np.random.Generator, ggml_type: str, rows: int, columns: int) -> Weight:
    """A weight on DEVICE with finite scales."""
    return repack(random_blocks(rng, ggml_type, rows, columns), ggml_type, columns).to(DEVICE)


def gguf_dequantize(raw: np.ndarray, ggml_type: str) -> np.ndarray:
    """The blocks as the gguf package dequantises them: [rows, columns] float32."""
    if ggml_type in ("F32", "F16"):
        return raw.view(np.float32 if ggml_type == "F32" else np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ggml_type])


def some_columns(ggml_type: str) -> list[int]:
    """Widths to test: one block, odd numbers of blocks, several tiles; for floats also widths without blocks."""
    return {1: [1, 7, 64, 100, 1100], 32: [32, 96, 288, 1056], 256: [256, 768, 1280]}[LAYOUTS[ggml_type].quant_block]


def guarded_weight(weight: Weight) -> tuple[Weight, list[Tensor]]:
    """The weight with poison around each plane, and the buffers for ``assert_guards_intact``."""
    pairs = [guarded(plane) for plane in weight.planes]
    return weight._replace(planes=tuple(view for view, _ in pairs)), [buffer for _, buffer in pairs]


def virtual_rows(rows: int, columns: int, ggml_type: str = "F16") -> Weight:
    """Rows of zeros. On the CPU they take no memory until they are written."""
    planes = []
    for plane in LAYOUTS[ggml_type].planes:
        shape = (rows, columns // plane.elements)
        if DEVICE.type == "cuda":
            planes.append(torch.zeros(shape, dtype=getattr(torch, plane.dtype), device=DEVICE))
        else:
            planes.append(torch.from_numpy(np.memmap("/dev/zero", dtype=plane.dtype, mode="c", shape=shape)))
    return Weight.make(ggml_type, planes, (rows, columns))
