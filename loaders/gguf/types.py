"""The parts of a GGUF file: metadata types, ggml's tensor types, and the parsed header."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..checkpoint import TensorInfo

ByteOrder = Literal["little", "big"]

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {  # metadata type id -> struct code, the same as NumPy's except for bool
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
VALUE_TYPES = {int(kind): kind.name.lower() for kind in GGUFValueType}

# Without Q8_1, which no file stores: gguf's table says 40 bytes, ggml's struct has 36.
GGML_TYPES = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind.name != "Q8_1"}
TYPE_SIZES = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}  # elements, bytes per block
REMOVED_GGML_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

# First bytes of files that are passed by mistake -> what they are, and the remedy.
MISTAKEN = [
    (b"version https://git-lfs", "a git-lfs pointer, not the file it stands for", "Run git lfs pull in its repository"),
    (
        b"PK\x03\x04",
        "a zip archive, as PyTorch writes",
        "Convert the checkpoint with llama.cpp's convert_hf_to_gguf.py",
    ),
    (b"ggjt", "a GGJT file, the format before GGUF", "Convert the original checkpoint again"),
    (b"tjgg", "a GGJT file, the format before GGUF", "Convert the original checkpoint again"),
    (b"lmgg", "a GGML file, the format before GGUF", "Convert the original checkpoint again"),
    (b"fmgg", "a GGMF file, the format before GGUF", "Convert the original checkpoint again"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"<", "a web page or XML", "The download gave a page instead of the file: download it again"),
    (b"FUGG", "GGUF's first bytes in reverse order", "Its writer is at fault: convert the checkpoint again"),
    (b"{", "JSON", "Name the .gguf file itself"),
]


def row_nbytes(ggml_type: str, columns: int) -> int:
    """Bytes of a row of ``columns`` elements, which must be whole blocks."""
    block, nbytes = TYPE_SIZES[ggml_type]
    return columns // block * nbytes


class StringArray(Sequence[str]):
    """The strings of a metadata array, each decoded when it is read.

    Takes 16 bytes per string beyond its text. Stays valid after the file is closed. Equals any sequence of the same
    strings.
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
class Header:
    """The checked header of one file. ``value_offsets``: key -> the byte at which its value starts."""

    version: int
    byte_order: ByteOrder
    metadata: Mapping[str, Value]
    value_offsets: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
