"""GGUF files made by code: valid ones by gguf's own writer, and arbitrary ones field by field.

gguf_bytes([key("general.architecture", STRING, text("llama"))], [TensorBytes("a", (4,), 0, bytes(16))])
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def number(kind: int, value: Any, order: str = "<") -> bytes:
    return struct.pack(order + CODES[kind], value)


def text(value: str | bytes, order: str = "<") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return number(U64, len(raw), order) + raw


def array(kind: int, elements: list[bytes], order: str = "<", *, count: int | None = None) -> bytes:
    """An array value; ``count`` overrides the length that the file states."""
    announced = len(elements) if count is None else count
    return number(U32, kind, order) + number(U64, announced, order) + b"".join(elements)


def key(name: str | bytes, kind: int, value: bytes, order: str = "<") -> bytes:
    return text(name, order) + number(U32, kind, order) + value


@dataclass
class TensorBytes:
    """A tensor of the file. ``dims`` are in ggml's order; ``offset`` None is the right one."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


def gguf_bytes(
    keys: list[bytes],
    tensors: list[TensorBytes],
    *,
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    key_count: int | None = None,
    tensor_count: int | None = None,
    pad_last: bool = True,
) -> bytes:
    """The file of these parts, valid except where the arguments say otherwise."""
    parts = [b"GGUF", number(U32, version, order)]
    parts.append(number(U64, len(tensors) if tensor_count is None else tensor_count, order))
    parts.append(number(U64, len(keys) if key_count is None else key_count, order))
    parts += keys
    offset = 0
    for tensor in tensors:
        parts.append(text(tensor.name, order))
        parts.append(number(U32, len(tensor.dims) if tensor.n_dims is None else tensor.n_dims, order))
        parts += [number(U64, dim, order) for dim in tensor.dims]
        parts.append(number(U32, tensor.kind, order))
        parts.append(number(U64, offset if tensor.offset is None else tensor.offset, order))
        offset += len(tensor.data) + -len(tensor.data) % alignment
    header = b"".join(parts)
    parts = [header, bytes(-len(header) % alignment if tensors else 0)]
    for i, tensor in enumerate(tensors):
        parts.append(tensor.data)
        if pad_last or i < len(tensors) - 1:
            parts.append(bytes(-len(tensor.data) % alignment))
    return b"".join(parts)


def random_tensor(rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """Random bytes of a tensor of any type, uint8 [rows, blocks x bytes of a block]."""
    return rng.integers(0, 256, (rows, blocks * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)


def write_gguf(
    path: Path,
    metadata: list[tuple[str, GGUFValueType, GGUFValueType | None, Any]],
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType | None]],
    *,
    big_endian: bool = False,
    alignment: int | None = None,
    tensors_per_file: int = 0,
) -> None:
    """Write with gguf's writer.

    Args:
        metadata: (key, type, element type of an array, value).
        tensors: name -> (float array, None), or (uint8 rows of blocks, their type).
        tensors_per_file: the number of tensors per file of a split set, named path-00001-of-0000N.gguf; 0 for one file.
    """
    writer = GGUFWriter(
        path,
        "llama",
        endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE,
        split_max_tensors=tensors_per_file,
    )
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, kind, element, value in metadata:
        writer.add_key_value(name, value, kind, element)
    for name, (data, ggml_type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def every_metadata_type(order: str = "<") -> list[bytes]:
    """One key of each scalar type and an array of each element type, bytes of a valid file."""
    values = {
        U8: 200, I8: -3, U16: 60_000, I16: -300, U32: 4_000_000_000, I32: -70_000, F32: 1.5, BOOL: 1,
        U64: 2**63 + 5, I64: -(2**62), F64: -2.25,
    }  # fmt: skip
    keys = [key("general.architecture", STRING, text("llama", order), order)]
    for kind, value in values.items():
        keys.append(key(f"scalar.{kind}", kind, number(kind, value, order), order))
        keys.append(key(f"array.{kind}", ARRAY, array(kind, [number(kind, value, order)] * 3, order), order))
    keys.append(key("array.empty", ARRAY, array(I32, [], order), order))
    words = ["", "a", "Ġthe", "né", "日本", "\0", "🙂"]
    keys.append(key("array.strings", ARRAY, array(STRING, [text(w, order) for w in words], order), order))
    return keys


def small_file(version: int = 3, order: str = "<") -> bytes:
    """A valid file with every metadata type and five tensors."""
    rng = np.random.default_rng(0)
    tensors = [
        TensorBytes("token_embd.weight", (64, 3), int(GGMLQuantizationType.Q8_0), rng.bytes(3 * 68)),
        TensorBytes("output_norm.weight", (5,), int(GGMLQuantizationType.F32), rng.bytes(20)),
        TensorBytes("blk.0.attn_q.weight", (32, 2), int(GGMLQuantizationType.Q4_1), rng.bytes(40)),
        TensorBytes("blk.0.cube", (2, 3, 2), int(GGMLQuantizationType.F16), rng.bytes(24)),
        TensorBytes("blk.0.bias", (16,), int(GGMLQuantizationType.F32), rng.bytes(64)),
    ]
    return gguf_bytes(every_metadata_type(order), tensors, version=version, order=order)
