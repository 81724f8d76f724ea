"""Mutations of GGUF bytes, and what must hold for any input. The hypothesis tests and the fuzzer use both."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np

from gguf_oracle import SIZES, strict_read
from rooflama.loaders.gguf import GGUFError, GGUFFile, StringArray
from rooflama.loaders.gguf.parse import parse_header

BLOCK_BYTES = {name: (block, nbytes) for name, block, nbytes in SIZES.values()}
INTERESTING = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 64, 100, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
INTERESTING += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


def mutate(data: bytes, other: bytes, operation: str, at: int, size: int, number: int) -> bytes:
    """One change at byte ``at`` (modulo the length). ``size`` and ``number`` select its extent and new value."""
    if not data:
        return data
    at %= len(data)
    if operation == "flip":
        return data[:at] + bytes([data[at] ^ (1 << number % 8)]) + data[at + 1 :]
    if operation == "byte":
        return data[:at] + bytes([number % 256]) + data[at + 1 :]
    if operation == "word":
        width = (1, 2, 4, 8)[size % 4]
        value = INTERESTING[number % len(INTERESTING)] % 256**width
        return data[:at] + value.to_bytes(width, ("little", "big")[number % 2]) + data[at + width :]
    if operation == "insert":
        return data[:at] + bytes([number % 256]) * (size % 70) + data[at:]
    if operation == "delete":
        return data[:at] + data[at + size % 70 :]
    if operation == "cut":
        return data[:at]
    if operation == "splice":
        return data[:at] + other[number % (len(other) + 1) :]
    if operation == "repeat":
        return data[: at + size % 200] + data[at:]
    raise ValueError(operation)


OPERATIONS = ["flip", "byte", "word", "insert", "delete", "cut", "splice", "repeat"]


def random_mutant(rng: np.random.Generator, files: list[bytes]) -> bytes:
    data = files[rng.integers(len(files))]
    for _ in range(rng.integers(1, 5)):
        other = files[rng.integers(len(files))]
        at = rng.integers(max(1, min(len(data), 2_000 if rng.random() < 0.8 else 60)))
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        data = mutate(data, other, operation, int(at), int(rng.integers(256)), int(rng.integers(2**32)))
    return data


def check_any_input(data: bytes, *, seconds: float = 1.0, memory: bool = True) -> bool:
    """Refused with GGUFError, or read as the plain reader reads it; quickly and in little memory. True if accepted."""
    if memory:
        tracemalloc.start()
    start, file, refusal = time.process_time(), None, None
    try:
        header = parse_header(memoryview(data), "memory")
        file = GGUFFile([Path("memory")], [header], [np.frombuffer(data, dtype=np.uint8)])
    except GGUFError as error:
        refusal = error
    finally:
        elapsed = time.process_time() - start
        if memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert elapsed < seconds, f"{elapsed:.2f} s for {len(data)} bytes"
    if memory:
        assert peak < 4 * len(data) + 64 * 2**20, f"{peak} bytes for a file of {len(data)}"
    expected = strict_read(data)
    assert (file is not None) == (expected is not None), f"accepted {file is not None}, strictly {expected is not None}"
    if file is None:
        assert refusal.offset is not None
        assert 0 <= refusal.offset <= len(data)
        assert f"byte {refusal.offset}, {refusal.reading}: " in str(refusal)
        return False
    metadata, tensors = expected
    _same_metadata(file.metadata, metadata)
    found = {n: (t.ggml_type, t.shape[::-1], t.offset, t.nbytes) for n, t in file.tensors.items()}
    assert found == tensors
    _within_bounds(file, data)
    return True


def _same_metadata(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        value = ours[name]
        if isinstance(value, StringArray):
            assert list(value) == expected, name
        else:  # NaN equals itself here
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected, dtype=np.asarray(value).dtype), name)


def _within_bounds(file, data: bytes) -> None:
    spans = sorted((info.offset, info.offset + info.nbytes) for info in file.tensors.values())
    assert all(0 < start < end <= len(data) for start, end in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    for name, info in file.tensors.items():
        block, nbytes = BLOCK_BYTES[info.ggml_type]
        assert info.nbytes == info.n_elements // block * nbytes
        try:
            rows = file.data(name)
        except GGUFError:  # big-endian, and a type without a defined form
            assert file.byte_order == "big"
            continue
        assert rows.shape == (info.rows, info.row_nbytes)
        assert rows.nbytes == info.nbytes
