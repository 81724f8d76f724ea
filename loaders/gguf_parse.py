"""The header of one GGUF file: untrusted bytes in, checked facts out. GGUF version 2 and 3, either byte order.

    "GGUF" | u32 version | u64 tensor count | u64 key count | keys and values | tensor infos | padding | tensor data

Nothing read from the file is used before it is checked, so a hostile file costs time and memory in proportion to its
size and to nothing it claims. The rules are the specification's (docs/gguf.md of ggml), and llama.cpp's where it is
stricter: tensors follow each other in listed order at exactly the running sum of their padded sizes, arrays are not
nested, duplicates are refused. Stricter than both: padding must be zero, no dimension may be zero, nothing may follow
the last tensor's padding, names are printable, and one file holds at most 65,536 keys and as many tensors.
The padding after the last tensor may be missing, as llama.cpp allows.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, overload

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from .gguf_errors import GGUFError

ByteOrder = Literal["little", "big"]

MAX_KEYS = MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 64
MAX_STRING_BYTES = 32 * 2**20  # a decoded string may take four times as much
MAX_DIMS = 4
MAX_ALIGNMENT = 2**24
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {  # metadata type id -> struct code, which is NumPy's too but for bool
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
VALUE_TYPES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", BOOL: "bool",
    STRING: "string", ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip

# Q8_1 lives in activations only; its 40 bytes in gguf's table are not the 36 of ggml's struct.
GGML_TYPES = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind.name != "Q8_1"}
TYPE_SIZES = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}  # elements, bytes of a block
REMOVED_GGML_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8
DAMAGED = "The file is damaged or was not written as GGUF: download or convert it again"


class StringArray(Sequence[str]):
    """The strings of a metadata array, decoded when asked for. 16 bytes a string beyond its text; valid after close.

    Equal to any sequence of the same strings.
    """

    __slots__ = ("_blob", "_ends")

    def __init__(self, blob: bytes, ends: array):
        self._blob = blob  # u64 length, text, u64 length, text, ...
        self._ends = ends  # ends[i]: where string i stops in the blob; ends[-1] is 0 for the string before the first

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        return self._blob[self._ends[index] + 8 : self._ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        blob, start = self._blob, 0
        ends = iter(self._ends)
        next(ends)
        for end in ends:
            yield blob[start + 8 : end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in self[:3])
        return f"StringArray([{shown}{', ...' if len(self) > 3 else ''}], {len(self)} strings)"


Value = int | float | bool | str | np.ndarray | StringArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    ``shape`` is in NumPy's order, rows first: [out, in] for a matrix. A row is the last dimension: ``columns`` elements
    in ``row_nbytes`` bytes. ``offset`` counts bytes from the start of file ``file_index``.
    """

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    n_elements: int
    nbytes: int
    file_index: int
    offset: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return self.n_elements // self.columns

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // self.rows


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself. ``value_offsets`` gives the byte at which each key's value starts."""

    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Mapping[str, Value]
    value_offsets: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    data_start: int


class _Cursor:
    """A position in the file's bytes that cannot pass their end, and knows what it is reading for the error message."""

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
        """Refuse if fewer than ``count`` bytes are left."""
        left = self.size - self.position
        if count > left:
            self.fail(
                f"{what} needs {count} bytes, {left} are left",
                "everything the header announces lies inside the file",
                "The file is cut short or damaged: compare its size with the source's and download it again",
            )

    def number(self, code: str, what: str) -> Any:
        layout = struct.Struct(self.prefix + code)
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def text(self, what: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        start = self.position
        length = self.number("Q", f"the length of {what}")
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
        """Pass ``count`` bytes of padding, which must be zero."""
        self.need(count, what)
        padding = bytes(self.data[self.position : self.position + count])
        if padding.strip(b"\0"):
            at = self.position + count - len(padding.lstrip(b"\0"))
            self.fail(f"byte {padding.lstrip(bytes(1))[0]:#04x} in {what}", "padding is zero", at=at)
        self.position += count


def parse_header(data: memoryview, path: str, file_index: int = 0) -> Header:
    """Check and decode the header of one file.

    Args:
        data: the whole file, usually memory-mapped; only the header and the padding between tensors are touched.
        path: the file's name, for messages.
        file_index: written into each TensorInfo, the number of the file in a split set.

    Raises:
        GGUFError: the first rule that the bytes break, with the byte at which they do.
    """
    cursor = _Cursor(data, path)
    version = _version(cursor)
    tensor_count = _count(cursor, "tensor count", MAX_TENSORS, MIN_TENSOR_INFO_BYTES)
    key_count = _count(cursor, "key count", MAX_KEYS, MIN_KEY_VALUE_BYTES)
    metadata, value_offsets = _metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata, value_offsets)
    infos = [_tensor_info(cursor, i) for i in range(tensor_count)]
    cursor.reading = "the padding after the header"
    padding = -cursor.position % alignment
    cursor.zeros(padding if infos else min(padding, cursor.size - cursor.position), "the padding before the tensors")
    data_start = cursor.position
    tensors = _place(cursor, infos, alignment, file_index)
    return Header(version, cursor.order, alignment, metadata, value_offsets, tensors, data_start)


def _version(cursor: _Cursor) -> int:
    cursor.position = 4  # the magic was matched when the file was opened
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:  # the number's low half is never 0: the file has the other byte order
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
        values = values.astype(values.dtype.newbyteorder("="))  # a copy: it stays when the file is closed
    values.flags.writeable = False
    cursor.position += count * itemsize
    return values


def _strings(cursor: _Cursor, count: int) -> StringArray:
    """Walk ``count`` strings in one tight loop: a vocabulary of 150,000 takes about 0.1 s."""
    data, size, start = cursor.data, cursor.size, cursor.position
    length_at = struct.Struct(cursor.prefix + "Q").unpack_from
    ends = array("Q", bytes(8 * (count + 1)))
    position = start
    for i in range(1, count + 1):
        text = position + 8
        if text > size or (end := text + length_at(data, position)[0]) > size or end - text > MAX_STRING_BYTES:
            cursor.position = position
            cursor.reading += f", string {i - 1} of {count}"
            cursor.text("the string")  # finds the same fault and words it
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


@dataclass(slots=True)
class _ListedTensor:
    """A tensor as the header lists it, its place not yet checked."""

    start: int
    name: str
    ggml_type: str
    shape: tuple[int, ...]
    n_elements: int
    nbytes: int
    offset: int
    offset_at: int


def _tensor_info(cursor: _Cursor, index: int) -> _ListedTensor:
    cursor.reading = f"tensor {index}"
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
    dims = [cursor.number("Q", "a dimension") for _ in range(n_dims)]
    n_elements = 1
    for i, dim in enumerate(dims):
        n_elements *= dim
        if dim == 0:
            cursor.fail(f"dimension {i} is 0", "every dimension is at least 1", at=dims_at + 8 * i)
        if n_elements >= 2**63:
            cursor.fail(f"dimensions {dims}", "their product is below 2^63", at=dims_at + 8 * i)
    at = cursor.position
    kind = cursor.number("I", "the tensor's type")
    if kind not in GGML_TYPES:
        _refuse_type(cursor, kind, at)
    type_name, block, block_bytes = GGML_TYPES[kind]
    if dims[0] % block:
        cursor.fail(
            f"rows of {dims[0]} elements in type {type_name}", f"a row holds whole blocks of {block}", at=dims_at
        )
    offset_at = cursor.position
    offset = cursor.number("Q", "the tensor's offset")
    nbytes = n_elements // block * block_bytes
    return _ListedTensor(start, name, type_name, tuple(reversed(dims)), n_elements, nbytes, offset, offset_at)


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


def _place(cursor: _Cursor, listed: list[_ListedTensor], alignment: int, file_index: int) -> dict[str, TensorInfo]:
    """Check that the tensors fill the rest of the file, in listed order, each padded to the alignment."""
    data_start = cursor.position
    tensors: dict[str, TensorInfo] = {}
    for i, tensor in enumerate(listed):
        cursor.reading = f"tensor {tensor.name!r}"
        if tensor.name in tensors:
            cursor.fail(f"tensor {tensor.name!r} a second time", "a name occurs once", at=tensor.start)
        expected = cursor.position - data_start
        if tensor.offset % alignment:
            cursor.fail(
                f"offset {tensor.offset}", f"offsets are multiples of the alignment, {alignment}", at=tensor.offset_at
            )
        if tensor.offset != expected:
            cursor.fail(
                f"offset {tensor.offset}",
                f"tensors lie one after another without gap or overlap, so it must be {expected}",
                at=tensor.offset_at,
            )
        cursor.need(tensor.nbytes, f"its data ({tensor.nbytes} bytes of {tensor.ggml_type} {list(tensor.shape)})")
        tensors[tensor.name] = TensorInfo(
            tensor.name,
            tensor.ggml_type,
            tensor.shape,
            tensor.n_elements,
            tensor.nbytes,
            file_index,
            cursor.position,
        )
        cursor.position += tensor.nbytes
        padding = -tensor.nbytes % alignment
        if i == len(listed) - 1:
            padding = min(padding, cursor.size - cursor.position)
        cursor.zeros(padding, f"the padding after tensor {tensor.name!r}")
    cursor.reading = "the end of the file"
    if cursor.position != cursor.size:
        cursor.fail(
            f"{cursor.size - cursor.position} bytes more than the header accounts for",
            "nothing follows the last tensor and its padding",
        )
    return tensors
