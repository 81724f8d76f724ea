"""One safetensors file: a length (8 bytes, little-endian), a JSON header of that length, and the tensors' bytes.

The safetensors library checks the header: the dtype, shape and place of each tensor, and that the places cover the rest
of the file without gap or overlap. Two checks are added, because the library accepts a name that occurs twice, and a
header that is most of its file.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from .json_files import parse_json, refuse

LENGTH_BYTES = 8
SMALL_HEADER = 2**20  # bytes; a larger one must be a small part of its file: parsed JSON takes up to 50 times its size


class StoredTensor(NamedTuple):
    """A tensor as a file stores it.

    Attributes:
        path: the file.
        dtype: the name that the format gives the dtype.
        shape: rows first.
        offset: the byte of the file at which the tensor starts.
        data: its bytes, uint8 [nbytes], read-only pages of the mapped file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    data: np.ndarray


def header_nbytes(start: bytes) -> int:
    """The length of the header, from the first LENGTH_BYTES of a file."""
    return int.from_bytes(start[:LENGTH_BYTES], "little")


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """Map one file, and read and check its header; no tensor is read.

    Raises:
        HuggingFaceError: the file is damaged, or its header is out of proportion.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, header_nbytes(file.read(LENGTH_BYTES))
        if length > size - LENGTH_BYTES:
            refuse(path, f"a header of {length} bytes in a file of {size}", "the header lies inside the file")
        if length > max(SMALL_HEADER, size // 16):
            rule = f"one of more than {SMALL_HEADER} is at most a sixteenth of its file"
            refuse(path, f"a header of {length} bytes in a file of {size}", rule)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            refuse(path, str(error), "the header follows the safetensors format and describes the whole file")
        header = parse_json(file.read(length), path)
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        start, stop = (LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
        stored[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start, mapped[start:stop])
    return stored
