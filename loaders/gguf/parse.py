"""Parsing the header of one GGUF file from untrusted bytes. GGUF versions 2 and 3, either byte order.

    "GGUF" | u32 version | u64 tensor count | u64 key count | keys and values | tensor infos | padding | tensor data

Every number is checked before it is used, so the time and memory that a hostile file costs are proportional to its
size, whatever its header claims.

The rules are those of the specification (docs/gguf.md of ggml), or of llama.cpp where it is stricter: tensors follow
each other in listed order at exactly the running sum of their padded sizes, arrays are not nested, and duplicates are
refused. Five rules are stricter than both: padding is zero, no dimension is zero, nothing follows the padding of the
last tensor, names are printable, and one file holds at most 65,536 keys and 65,536 tensors. The padding of the last
tensor may be missing, as in llama.cpp.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from ..checkpoint import TensorInfo
from .errors import GGUFError
from .types import (
    ARRAY,
    BOOL,
    GGML_TYPES,
    MISTAKEN,
    REMOVED_GGML_TYPES,
    SCALARS,
    STRING,
    VALUE_TYPES,
    ByteOrder,
    Header,
    StringArray,
    Value,
)

MAX_KEYS = MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 64
MAX_STRING_BYTES = 32 * 2**20  # decoded, a string may take four times as many
MAX_DIMS = 4
MAX_ALIGNMENT = 2**24
DEFAULT_ALIGNMENT = 32

MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8
DAMAGED = "The file is damaged or was not written as GGUF: download or convert it again"


class _Cursor:
    """A position in the file's bytes that cannot pass their end. ``reading`` names the current part for errors."""

    def __init__(self, data: memoryview, path: str):
        self.data, self.path = data, path
        self.size = len(data)
        self.position = 0
        self.order: ByteOrder = "little"
        self.reading = "the header"

    @property
    def prefix(self) -> str:
        return "<" if self.order == "little" else ">"

    def fail(self, found: str, rule: str, remedy: str = DAMAGED, *, at: int | None = None) -> NoReturn:
        offset = self.position if at is None else at
        raise GGUFError(found, rule=rule, remedy=remedy, path=self.path, offset=offset, reading=self.reading)

    def need(self, count: int, what: str) -> None:
        """Raise if fewer than ``count`` bytes are left."""
        left = self.size - self.position
        if count > left:
            self.fail(
                f"{what} needs {count} bytes, {left} are left",
                "all that the header announces lies inside the file",
                "The file is cut short or damaged: compare its size with the source's and download it again",
            )

    def numbers(self, codes: str, what: str) -> tuple[Any, ...]:
        layout = self.prefix + codes
        size = struct.calcsize(layout)
        self.need(size, what)
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return values

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, what)[0]

    def text(self, what: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        start = self.position
        length = self.number("Q", what)
        if length > max_bytes:
            self.fail(f"{what} has a length of {length} bytes", f"it may have at most {max_bytes}", at=start)
        self.need(length, what)
        try:
            value = str(self.data[self.position : self.position + length], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})", "text is UTF-8", at=self.position + error.start)
        self.position += length
        return value

    def zeros(self, count: int, what: str) -> None:
        """Skip ``count`` bytes of padding, which must be zero."""
        self.need(count, what)
        padding = bytes(self.data[self.position : self.position + count])
        if padding.strip(b"\0"):
            at = self.position + count - len(padding.lstrip(b"\0"))
            self.fail(f"byte {padding.lstrip(bytes(1))[0]:#04x} in {what}", "padding is zero", at=at)
        self.position += count


def parse_header(data: memoryview, path: str, file_index: int = 0, *, size: int | None = None) -> Header:
    """Check and decode the header of one file.

    Args:
        data: the whole file, usually memory-mapped; only the header and the padding between tensors are read.
        path: the file's name in errors.
        file_index: the file's number in a split set, for each TensorInfo.
        size: the size of the file if ``data`` is only its beginning; padding beyond ``data`` is then not checked.

    Raises:
        GGUFError: the bytes break a rule; names the first one and the byte.
    """
    cursor = _Cursor(data, path)
    _magic(cursor)
    version = _version(cursor)
    tensor_count = _count(cursor, "tensor count", MAX_TENSORS, MIN_TENSOR_INFO_BYTES)
    key_count = _count(cursor, "key count", MAX_KEYS, MIN_KEY_VALUE_BYTES)
    metadata, value_offsets = _metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata, value_offsets)
    listed = _listed(cursor, tensor_count, alignment, file_index)
    cursor.reading = "the padding after the header"
    padding = -cursor.position % alignment
    cursor.zeros(padding if listed else min(padding, cursor.size - cursor.position), "the padding before the tensors")
    cursor.size = cursor.size if size is None else size
    return Header(version, cursor.order, metadata, value_offsets, _place(cursor, listed, alignment))


def _magic(cursor: _Cursor) -> None:
    start = bytes(cursor.data[:32])
    if not start.startswith(b"GGUF"):
        found, remedy = f"starts with {start[:4]!r}", DAMAGED
        if start[8:9] == b"{":
            found, remedy = "a safetensors file", "Load the folder that holds it, with its config.json"
        for signature, what, cure in MISTAKEN:
            if start.startswith(signature):
                found, remedy = what, cure
                break
        cursor.fail(found, "a GGUF file starts with the bytes GGUF", remedy)
    cursor.position = 4


def _version(cursor: _Cursor) -> int:
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:  # a version's low half is never 0, so the file has the other byte order
        cursor.order, cursor.position = "big", 4
        version = cursor.number("I", "the version")
    if version == 1:
        cursor.fail(
            "GGUF version 1", "versions 2 and 3 are read", "Convert the model again with a current converter", at=4
        )
    if version not in (2, 3):
        cursor.fail(
            f"GGUF version {version}", "versions 2 and 3 are read", "If the file is newer, upgrade rooflama", at=4
        )
    return version


def _count(cursor: _Cursor, what: str, limit: int, min_bytes: int) -> int:
    start = cursor.position
    count = cursor.number("Q", f"the {what}")
    if count > limit:
        cursor.fail(f"{what} {count}", f"one file holds at most {limit}", at=start)
    left = cursor.size - cursor.position
    if count * min_bytes > left:
        cursor.fail(f"{what} {count}", f"each takes at least {min_bytes} bytes and {left} are left", at=start)
    return count


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    value_offsets: dict[str, int] = {}
    for i in range(count):
        cursor.reading = f"key {i}"
        start = cursor.position
        key = cursor.text("the key", MAX_KEY_BYTES)
        if not (key and key.isascii() and key.isprintable() and " " not in key):
            cursor.fail(f"key {key[:80]!r}", "a key is non-empty printable ASCII without spaces", at=start)
        cursor.reading = f"key {key[:80]!r}"
        if key in metadata:
            cursor.fail(f"key {key[:80]!r} a second time", "a key occurs once", at=start)
        kind = cursor.number("I", "the value's type")
        value_offsets[key] = cursor.position
        metadata[key] = _value(cursor, kind)
    return metadata, value_offsets


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind == STRING:
        return cursor.text("the string")
    if kind == ARRAY:
        return _array(cursor)
    if kind not in SCALARS:
        known = ", ".join(f"{number} {name}" for number, name in VALUE_TYPES.items())
        cursor.fail(f"value type {kind}", f"the types are {known}", at=cursor.position - 4)
    value = cursor.number(SCALARS[kind], f"the {VALUE_TYPES[kind]}")
    if kind != BOOL:
        return value
    if value > 1:
        cursor.fail(f"bool {value}", "a bool is 0 or 1", at=cursor.position - 1)
    return bool(value)


def _array(cursor: _Cursor) -> np.ndarray | StringArray:
    kind = cursor.number("I", "the array's element type")
    if kind == ARRAY:
        cursor.fail("an array of arrays", "arrays are not nested, as in llama.cpp", at=cursor.position - 4)
    if kind != STRING and kind not in SCALARS:
        cursor.fail(
            f"array element type {kind}", f"element types are {sorted([*SCALARS, STRING])}", at=cursor.position - 4
        )
    start = cursor.position
    count = cursor.number("Q", "the array's count")
    itemsize = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
    left = cursor.size - cursor.position
    if count * itemsize > left:
        cursor.fail(
            f"array count {count}", f"each element takes at least {itemsize} bytes and {left} are left", at=start
        )
    if kind == STRING:
        return _strings(cursor, count)
    raw = cursor.data[cursor.position : cursor.position + count * itemsize]
    values = np.frombuffer(raw, dtype=cursor.prefix + SCALARS[kind])
    if kind == BOOL:
        if count and values.max() > 1:
            worst = int(np.argmax(values > 1))
            cursor.fail(f"bool {values[worst]} at index {worst}", "a bool is 0 or 1", at=cursor.position + worst)
        values = values.astype(np.bool_)
    else:
        values = values.astype(values.dtype.newbyteorder("="))  # a copy, which outlives the mapping
    values.flags.writeable = False
    cursor.position += count * itemsize
    return values


def _strings(cursor: _Cursor, count: int) -> StringArray:
    """Read ``count`` strings in one tight loop: 150,000 take about 0.1 s."""
    data, size, start = cursor.data, cursor.size, cursor.position
    length_at = struct.Struct(cursor.prefix + "Q").unpack_from
    ends = array("Q", bytes(8 * (count + 1)))
    position = start
    for i in range(1, count + 1):
        text = position + 8
        if text > size or (end := text + length_at(data, position)[0]) > size or end - text > MAX_STRING_BYTES:
            cursor.position = position
            cursor.reading += f", string {i - 1} of {count}"
            cursor.text("the string")  # raises the error for this string
        try:
            str(data[text:end], "utf-8")
        except UnicodeDecodeError as error:
            cursor.reading += f", string {i - 1} of {count}"
            cursor.fail(f"the string is not UTF-8 ({error.reason})", "text is UTF-8", at=text + error.start)
        ends[i] = end - start
        position = end
    cursor.position = position
    return StringArray(bytes(data[start:position]), ends)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value], value_offsets: Mapping[str, int]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    cursor.reading, at = f"key {key!r}", value_offsets[key]
    alignment = metadata[key]
    (kind,) = struct.unpack_from(cursor.prefix + "I", cursor.data, at - 4)
    if kind != 4:
        cursor.fail(f"a value of type {VALUE_TYPES[kind]}", "the alignment is a uint32", at=at - 4)
    assert isinstance(alignment, int)
    if alignment % 8 or alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        cursor.fail(f"alignment {alignment}", f"a power of two from 8 to {MAX_ALIGNMENT}", at=at)
    return alignment


def _listed(cursor: _Cursor, count: int, alignment: int, file_index: int) -> dict[str, TensorInfo]:
    """Read the tensor infos, with offsets from the first tensor; each must start where the one before it ends."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for index in range(count):
        cursor.reading, start = f"tensor {index}", cursor.position
        info = _tensor_info(cursor, file_index)
        if info.name in tensors:
            cursor.fail(f"tensor {info.name!r} a second time", "a name occurs once", at=start)
        found, offset_at = f"offset {info.offset}", cursor.position - 8
        if info.offset % alignment:
            cursor.fail(found, f"offsets are multiples of the alignment, {alignment}", at=offset_at)
        if info.offset != expected:
            rule = f"tensors lie one after another without gap or overlap, so it must be {expected}"
            cursor.fail(found, rule, at=offset_at)
        tensors[info.name] = info
        expected += info.nbytes + -info.nbytes % alignment
    return tensors


def _tensor_info(cursor: _Cursor, file_index: int) -> TensorInfo:
    start = cursor.position
    name = cursor.text("the tensor's name", MAX_TENSOR_NAME_BYTES)
    if not (name and name.isprintable()):
        cursor.fail(f"name {name!r}", "a tensor's name is non-empty and printable", at=start)
    cursor.reading = f"tensor {name!r}"
    at = cursor.position
    n_dims = cursor.number("I", "the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{n_dims} dimensions", f"a tensor has 1 to {MAX_DIMS}", at=at)
    dims_at = cursor.position
    *dims, kind, offset = cursor.numbers(f"{n_dims}QIQ", "the tensor's dimensions, type and offset")
    n_elements = 1
    for i, dim in enumerate(dims):
        n_elements *= dim
        if dim == 0:
            cursor.fail(f"dimension {i} is 0", "every dimension is at least 1", at=dims_at + 8 * i)
        if n_elements >= 2**63:
            cursor.fail(f"dimensions {dims}", "their product is below 2^63", at=dims_at + 8 * i)
    if kind not in GGML_TYPES:
        _refuse_type(cursor, kind, dims_at + 8 * n_dims)
    type_name, block, block_bytes = GGML_TYPES[kind]
    if dims[0] % block:
        cursor.fail(
            f"rows of {dims[0]} elements in type {type_name}", f"a row holds whole blocks of {block}", at=dims_at
        )
    nbytes = n_elements // block * block_bytes
    return TensorInfo(name, type_name, tuple(reversed(dims)), nbytes, file_index, offset)


def _refuse_type(cursor: _Cursor, kind: int, at: int) -> NoReturn:
    known = ", ".join(name for name, _, _ in GGML_TYPES.values())
    if kind in REMOVED_GGML_TYPES:
        cursor.fail(
            f"tensor type {kind} ({REMOVED_GGML_TYPES[kind]}), which was removed from the format",
            f"known types are {known}",
            "Quantise the model again with a current llama-quantize",
            at=at,
        )
    cursor.fail(
        f"tensor type {kind}",
        f"known types are {known}",
        "If the type is newer than the installed gguf package, upgrade gguf; otherwise the file is damaged",
        at=at,
    )


def _place(cursor: _Cursor, listed: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The tensors with offsets from the start of the file. They and their padding must fill the rest of the file."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in listed.items():
        cursor.reading = f"tensor {name!r}"
        cursor.need(info.nbytes, "its data")
        tensors[name] = replace(info, offset=cursor.position)
        cursor.position += info.nbytes
        padding = -info.nbytes % alignment
        if len(tensors) == len(listed):
            padding = min(padding, cursor.size - cursor.position)
        cursor.zeros(padding, "the padding after its data")
    cursor.reading = "the end of the file"
    if cursor.position != cursor.size:
        cursor.fail(
            f"{cursor.size - cursor.position} bytes more than the header accounts for",
            "nothing follows the last tensor and its padding",
        )
    return tensors
