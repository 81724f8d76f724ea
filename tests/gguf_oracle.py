"""A second, plain reader of GGUF: slow, one field at a time, without code of rooflama's reader.

``strict_read`` returns a file's contents, or None if the format forbids the file. The two readers must agree on every
input.
"""

from __future__ import annotations

import io
import math
import struct

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

SIZES = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
FORMATS = dict(zip([0, 1, 2, 3, 4, 5, 6, 10, 11, 12], "BbHhIifQqd", strict=True))


class _Refused(Exception):
    pass


def _require(condition: bool) -> None:
    if not condition:
        raise _Refused


class _Reader:
    def __init__(self, data: bytes):
        self.stream, self.size = io.BytesIO(data), len(data)
        self.order = "<"

    def take(self, count: int) -> bytes:
        _require(count <= self.size - self.stream.tell())
        return self.stream.read(count)

    def unpack(self, code: str):
        return struct.unpack(self.order + code, self.take(struct.calcsize("=" + code)))[0]

    def string(self, limit: int = 32 * 2**20) -> str:
        length = self.unpack("Q")
        _require(length <= limit)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused from None

    def value(self, kind: int, *, inside_array: bool = False):
        if kind in FORMATS:
            return self.unpack(FORMATS[kind])
        if kind == 7:
            byte = self.take(1)
            _require(byte in (b"\0", b"\1"))
            return byte == b"\1"
        if kind == 8:
            return self.string()
        _require(kind == 9 and not inside_array)
        element, count = self.unpack("I"), self.unpack("Q")
        _require(element <= 12 and element != 9)
        smallest = 8 if element == 8 else 1 if element == 7 else struct.calcsize("=" + FORMATS[element])
        _require(count <= self.size // smallest)
        return [self.value(element, inside_array=True) for _ in range(count)]

    def zeros(self, count: int) -> None:
        _require(not any(self.take(count)))


def strict_read(data: bytes) -> tuple[dict, dict] | None:
    """(metadata, tensor name -> (type, dims, start, bytes)), or None."""
    try:
        return _read(_Reader(data))
    except _Refused:
        return None


def _read(r: _Reader) -> tuple[dict, dict]:
    _require(r.take(4) == b"GGUF")
    raw = r.take(4)
    r.order = ">" if raw[:2] == b"\0\0" else "<"
    _require(struct.unpack(r.order + "I", raw)[0] in (2, 3))
    n_tensors, n_keys = r.unpack("Q"), r.unpack("Q")
    _require(n_tensors <= 65_536 and n_keys <= 65_536)
    metadata: dict = {}
    kinds: dict = {}
    for _ in range(n_keys):
        name = r.string(65_535)
        _require(name != "" and all("!" <= letter <= "~" for letter in name) and name not in metadata)
        kinds[name] = r.unpack("I")
        metadata[name] = r.value(kinds[name])
    alignment = metadata.get("general.alignment", 32)
    _require(kinds.get("general.alignment", 4) == 4 and alignment in [2**n for n in range(3, 25)])
    listed = []
    for _ in range(n_tensors):
        name = r.string(64)
        _require(name != "" and name.isprintable())
        n_dims = r.unpack("I")
        _require(1 <= n_dims <= 4)
        dims = [r.unpack("Q") for _ in range(n_dims)]
        kind, offset = r.unpack("I"), r.unpack("Q")
        _require(kind in SIZES and SIZES[kind][0] != "Q8_1")
        listed.append((name, dims, kind, offset))
    header_end = r.stream.tell()
    start = -(-header_end // alignment) * alignment
    if not listed:
        _require(r.size <= start)
        r.zeros(r.size - header_end)
        return metadata, {}
    r.zeros(start - header_end)
    tensors: dict = {}
    position = start
    for name, dims, kind, offset in listed:
        type_name, block, block_bytes = SIZES[kind]
        _require(min(dims) >= 1 and math.prod(dims) < 2**63 and dims[0] % block == 0 and name not in tensors)
        nbytes = math.prod(dims) // block * block_bytes
        _require(start + offset == position and position + nbytes <= r.size)
        tensors[name] = (type_name, tuple(dims), position, nbytes)
        end = position + nbytes
        position = -(-end // alignment) * alignment
        r.stream.seek(end)
        last = len(tensors) == len(listed)
        r.zeros(min(position, r.size) - end if last else position - end)
    _require(r.stream.tell() == r.size)
    return metadata, tensors
