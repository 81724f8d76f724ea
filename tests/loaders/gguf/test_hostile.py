"""Hostile files: each is refused quickly, with the byte at fault, in memory bounded by the size of the file."""

import itertools
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    TensorBytes,
    array,
    gguf_bytes,
    key,
    number,
    small_file,
    text,
)
from gguf_mutations import OPERATIONS, check_any_input, mutate
from gguf_oracle import strict_read
from limits import within_seconds
from rooflama.loaders.gguf import GGUFError, GGUFFile, MissingKeyError, read_gguf

GGUF_F32, GGUF_Q4_0 = 0, 2
ARCHITECTURE = key("general.architecture", STRING, text("llama"))
HEADER_BYTES = 4 + 4 + 8 + 8


def a_tensor(name="a", dims=(8,), kind=GGUF_F32, data=bytes(32), **lies):
    return TensorBytes(name, dims, kind, data, **lies)


def alignment(value, kind=U32):
    return key("general.alignment", kind, number(kind, value))


def with_byte(data, at, value):
    return data[:at] + bytes([value]) + data[at + 1 :]


HUGE_ARRAY = gguf_bytes([key("a", ARRAY, array(U8, [], count=2**40))], [])
PADDED = gguf_bytes([], [a_tensor(dims=(7,), data=bytes(28)), a_tensor("b", dims=(7,), data=bytes(28))])
TWO = [a_tensor("a"), a_tensor("b")]

# name -> (the file, the byte at fault, what the message says)
HOSTILE = {
    "array count 2^40": (HUGE_ARRAY, 41, r"key 'a': array count 1099511627776"),
    "array count 2^64 - 1": (
        gguf_bytes([key("a", ARRAY, array(U64, [], count=2**64 - 1))], []),
        41,
        r"array count 18446744073709551615",
    ),
    "string array count": (gguf_bytes([key("a", ARRAY, array(STRING, [text("x")], count=9))], []), 41, "array count 9"),
    "string length 2^63": (
        gguf_bytes([key("a", STRING, number(U64, 2**63) + b"abc")], []),
        37,
        "the string has a length of 9223372036854775808 bytes",
    ),
    "string past the end": (gguf_bytes([key("a", STRING, number(U64, 100) + b"abc")], []), 45, "needs 100 bytes"),
    "element string past the end": (
        gguf_bytes([key("a", ARRAY, array(STRING, [text("x"), number(U64, 50)]))], []),
        66,
        r"key 'a', string 1 of 2: the string needs 50 bytes, 0 are left",
    ),
    "key past the end": (gguf_bytes([number(U64, 1000) + b"abcdef"], []), 32, "the key needs 1000 bytes"),
    "key length 2^16": (gguf_bytes([key("a" * 65_536, U8, b"\1")], []), 24, "the key has a length of 65536 bytes"),
    "empty key": (gguf_bytes([key("", U16, b"\1\0")], []), 24, "non-empty printable ASCII"),
    "key not UTF-8": (gguf_bytes([key(b"ab\xff", U8, b"\1")], []), 34, "the key is not UTF-8"),
    "key not ASCII": (gguf_bytes([key("né", U8, b"\1")], []), 24, "printable ASCII"),
    "key with a newline": (gguf_bytes([key("a\nb", U8, b"\1")], []), 24, "printable ASCII"),
    "value not UTF-8": (gguf_bytes([key("a", STRING, text(b"ok\xc3"))], []), 47, "the string is not UTF-8"),
    "surrogate in UTF-8": (gguf_bytes([key("a", STRING, text(b"\xed\xa0\x80"))], []), 45, "the string is not UTF-8"),
    "element not UTF-8": (
        gguf_bytes([key("a", ARRAY, array(STRING, [text("x"), text(b"\x80")]))], []),
        66,
        r"key 'a', string 1 of 2: the string is not UTF-8",
    ),
    "bool 5": (gguf_bytes([key("a", BOOL, b"\5")], []), 37, r"key 'a': bool 5: a bool is 0 or 1"),
    "bool 5 in an array": (
        gguf_bytes([key("a", ARRAY, array(BOOL, [b"\0", b"\5"]))], []),
        50,
        r"bool 5 at index 1",
    ),
    "value type 13": (gguf_bytes([key("a", 13, bytes(8))], []), 33, "value type 13"),
    "element type 99": (gguf_bytes([key("a", ARRAY, array(99, [bytes(8)]))], []), 37, "array element type 99"),
    "nested array": (
        gguf_bytes([key("a", ARRAY, array(ARRAY, [array(U8, [b"\1"])]))], []),
        37,
        "an array of arrays",
    ),
    "duplicate key": (
        gguf_bytes([key("a", U8, b"\1"), key("a", U8, b"\2")], []),
        38,
        r"key 'a' a second time",
    ),
    "key count 2^60": (gguf_bytes([], [], key_count=2**60), 16, "key count 1152921504606846976"),
    "key count too large for the file": (gguf_bytes([ARCHITECTURE], [], key_count=4), 16, "key count 4: each takes"),
    "tensor count 2^60": (gguf_bytes([], [], tensor_count=2**60), 8, "tensor count 1152921504606846976"),
    "tensor count 1 of 0": (gguf_bytes([ARCHITECTURE], [], tensor_count=1), 69, "is left|are left"),
    "alignment 0": (gguf_bytes([alignment(0)], []), 53, r"key 'general.alignment': alignment 0"),
    "alignment 1": (gguf_bytes([alignment(1)], [a_tensor()], alignment=1), 53, "alignment 1: a power of two from 8"),
    "alignment 3": (gguf_bytes([alignment(3)], [a_tensor()], alignment=3), 53, "alignment 3"),
    "alignment 24": (gguf_bytes([alignment(24)], [a_tensor()], alignment=24), 53, "alignment 24"),
    "alignment 2^31": (gguf_bytes([alignment(2**31)], []), 53, "alignment 2147483648"),
    "alignment as uint64": (gguf_bytes([alignment(32, U64)], []), 49, "type uint64: the alignment is a uint32"),
    "alignment as text": (
        gguf_bytes([key("general.alignment", STRING, text("32"))], []),
        49,
        "a value of type string",
    ),
    "n_dims 0": (gguf_bytes([], [a_tensor(dims=())]), 33, r"tensor 'a': 0 dimensions"),
    "n_dims 100": (gguf_bytes([], [a_tensor(n_dims=100)]), 33, "100 dimensions"),
    "n_dims 2^32 - 1": (gguf_bytes([], [a_tensor(n_dims=2**32 - 1)]), 33, "4294967295 dimensions"),
    "a zero dimension": (gguf_bytes([], [a_tensor(dims=(8, 0))]), 45, "dimension 1 is 0"),
    "dimensions that wrap": (gguf_bytes([], [a_tensor(dims=(2**33, 2**33))]), 45, r"product is below 2\^63"),
    "dimensions that wrap to a small size": (
        gguf_bytes([], [a_tensor(dims=(2**32, 2**32, 8))]),
        45,
        r"product is below 2\^63",
    ),
    "a tensor larger than the file": (gguf_bytes([], [a_tensor(dims=(2**40,))]), 64, "its data"),
    "tensor type 99": (gguf_bytes([], [a_tensor(kind=99)]), 45, r"tensor type 99: known types are F32, F16, Q4_0"),
    "removed tensor type": (gguf_bytes([], [a_tensor(kind=4)]), 45, r"tensor type 4 \(Q4_2\), which was removed"),
    "an activation type": (gguf_bytes([], [a_tensor(kind=9)]), 45, "tensor type 9: known types"),
    "a row of half a block": (gguf_bytes([], [a_tensor(dims=(16,), kind=GGUF_Q4_0)]), 37, "whole blocks of 32"),
    "offset that wraps": (gguf_bytes([], [a_tensor(offset=2**64 - 32)]), 49, "offset 18446744073709551584"),
    "misaligned offset": (gguf_bytes([], [a_tensor(offset=8)]), 49, "multiples of the alignment, 32"),
    "offset past the end": (gguf_bytes([], [a_tensor(offset=32)]), 49, "it must be 0"),
    "overlap": (gguf_bytes([], [TWO[0], a_tensor("b", offset=0)]), 82, r"tensor 'b': offset 0: .* it must be 32"),
    "gap": (gguf_bytes([], [TWO[0], a_tensor("b", offset=64)]), 82, "it must be 32"),
    "listed in another order": (
        gguf_bytes([], [a_tensor("a", offset=32), a_tensor("b", offset=0)]),
        49,
        "it must be 0",
    ),
    "duplicate tensor": (gguf_bytes([], [TWO[0], TWO[0]]), 57, r"tensor 'a' a second time"),
    "empty tensor name": (gguf_bytes([], [a_tensor("")]), 24, "non-empty and printable"),
    "tensor name of 65 bytes": (gguf_bytes([], [a_tensor("x" * 65)]), 24, "a length of 65 bytes"),
    "tensor name not UTF-8": (gguf_bytes([], [a_tensor(b"\xff")]), 32, "not UTF-8"),
    "tensor name with an escape": (gguf_bytes([], [a_tensor("a\x1b[2J")]), 24, "printable"),
    "trailing bytes": (gguf_bytes([], [a_tensor()]) + b"\0", 96, "1 bytes more than the header accounts for"),
    "trailing bytes without tensors": (gguf_bytes([ARCHITECTURE], []) + bytes(64), 96, "bytes more than the header"),
    "padding not zero": (with_byte(PADDED, 125, 7), 125, "byte 0x07 in the padding after its data"),
    "padding of the header not zero": (with_byte(PADDED, 92, 1), 92, "byte 0x01 in the padding before the tensors"),
    "last padding not zero": (with_byte(PADDED, 159, 1), 159, "byte 0x01 in the padding after its data"),
    "version 0": (gguf_bytes([], [], version=0), 4, "GGUF version 0"),
    "version 1": (gguf_bytes([], [], version=1), 4, "GGUF version 1.*Convert the model again"),
    "version 4": (gguf_bytes([], [], version=4), 4, "GGUF version 4.*upgrade"),
    "big-endian version 7": (gguf_bytes([], [], version=7, order=">"), 4, "GGUF version 7"),
    "GGML magic": (b"lmgg" + bytes(60), 0, "a GGML file, the format before GGUF"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", 0, "git-lfs pointer.*git lfs pull"),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(30), 0, "a safetensors file.*folder that holds it"),
    "zip": (b"PK\x03\x04" + bytes(30), 0, "a zip archive"),
    "web page": (b"<!DOCTYPE html><html>", 0, "a web page"),
    "JSON": (b'{"architectures": []}', 0, "JSON"),
    "noise": (b"\x01\x02\x03", 0, r"starts with b'\\x01\\x02\\x03': a GGUF file starts with the bytes GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_with_the_byte_at_fault(tmp_path, case):
    data, offset, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=message) as caught:
        read_gguf(path)
    assert caught.value.offset == offset
    assert str(caught.value).startswith(f"{path}, byte {offset}, ")
    check_any_input(data)


def test_the_huge_array_takes_49_bytes_and_no_time(tmp_path):
    assert len(HUGE_ARRAY) == 49
    path = tmp_path / "a.gguf"
    path.write_bytes(HUGE_ARRAY)

    def refused():
        with pytest.raises(GGUFError):
            read_gguf(path)

    within_seconds(0.1, refused)


def test_what_is_legal_although_unusual_is_read():
    for data in [
        gguf_bytes([], []),
        gguf_bytes([ARCHITECTURE], [], key_count=1) + bytes(27),  # padded to the alignment, with no tensors
        gguf_bytes([alignment(8)], [a_tensor()], alignment=8),
        gguf_bytes([alignment(2**16)], [a_tensor()], alignment=2**16),
        gguf_bytes([], [a_tensor(dims=(7,), data=bytes(28))], pad_last=False),
        gguf_bytes([], [a_tensor("x" * 64)]),
        gguf_bytes([], [a_tensor(dims=(2, 2, 1, 2))]),
        gguf_bytes([key("nomic-bert.Block_count", U16, b"\1\0")], []),
        gguf_bytes([key("a", STRING, text("")), key("b", ARRAY, array(STRING, []))], []),
        gguf_bytes([key("a", F32, struct.pack("<f", float("nan")))], []),
    ]:
        assert check_any_input(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_truncation_at_every_byte_is_refused(order):
    data = small_file(order=order)
    assert check_any_input(data, memory=False)
    for length in range(len(data)):
        assert not check_any_input(data[:length], memory=False), length


def test_only_the_last_padding_may_be_cut():
    data = gguf_bytes([ARCHITECTURE], [a_tensor(dims=(7,), data=bytes(range(28)))])
    kept = [length for length in range(len(data) + 1) if check_any_input(data[:length], memory=False)]
    assert kept == list(range(len(data) - 4, len(data) + 1))


mutations = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS),
        st.integers(0, 2_000),
        st.integers(0, 255),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=4,
)
valid_files = st.sampled_from([small_file(version, order) for version in (2, 3) for order in "<>"])


@given(data=valid_files, other=valid_files, mutations=mutations)
@example(data=small_file(), other=small_file(), mutations=[("cut", 0, 0, 0)])
def test_any_mutant_is_refused_or_read_as_the_plain_reader_reads_it(data, other, mutations):
    for operation, where, size, value in mutations:
        data = mutate(data, other, operation, where, size, value)
    check_any_input(data)


@given(data=st.binary(max_size=200))
def test_any_bytes_after_the_magic(data):
    check_any_input(b"GGUF\3\0\0\0" + data)


def _array(kind, elements, *, count=None):
    return gguf_bytes([key("a", ARRAY, array(kind, elements, count=count))], [])


def _many_keys(count):
    return gguf_bytes([key(f"{i:x}", U8, b"\1") for i in range(count)], [])


def _many_tensors(count):
    return gguf_bytes([], [a_tensor(f"{i:x}", dims=(1,), data=b"abcd") for i in range(count)], alignment=32)


# name -> (the file, bytes allowed beyond four times its size)
LARGE = {
    "65,536 keys": (lambda: _many_keys(65_536), 2**26),
    "65,536 tensors": (lambda: _many_tensors(65_536), 2**26),
    "200,000 short strings": (lambda: _array(STRING, [text("ab")] * 200_000), 2**20),
    "200,000 empty strings": (lambda: _array(STRING, [text("")] * 200_000), 2**20),
    "a long string that widens at its end": (
        lambda: gguf_bytes([key("a", STRING, text("a" * 2**24 + "🙂"))], []),
        2**26,
    ),
    "16 MiB of bytes": (lambda: _array(U8, [bytes(2**24)], count=2**24), 2**20),
    "16 MiB of bools": (lambda: _array(BOOL, [bytes(2**24)], count=2**24), 2**20),
    "16 MiB of padding": (lambda: gguf_bytes([alignment(2**24)], [a_tensor()], alignment=2**24), 2**20),
}


@pytest.mark.parametrize("case", LARGE)
def test_time_and_memory_are_bounded_by_the_size_of_the_file(tmp_path, case):
    make, slack = LARGE[case]
    data = make()
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    within_seconds(1.0, read_gguf, path)
    tracemalloc.start()
    file = read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(file, GGUFFile)
    assert peak < 4 * len(data) + slack, f"{peak / len(data):.1f} bytes a byte"


@pytest.mark.parametrize("count", [65_537, 10**6])
def test_more_keys_or_tensors_than_any_model_has_are_refused(tmp_path, count):
    for data, offset, what in [
        (gguf_bytes([bytes(count * 40)], [], key_count=count), 16, "key count"),
        (gguf_bytes([bytes(count * 40)], [], key_count=0, tensor_count=count), 8, "tensor count"),
    ]:
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(GGUFError, match=rf"{what} {count}: one file holds at most 65536") as caught:
            read_gguf(tmp_path / "a.gguf")
        assert caught.value.offset == offset


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, message in [
        (tmp_path / "missing.gguf", "no such file: the file must exist. Check the path"),
        (tmp_path, "a directory: .*Name the .gguf file inside it"),
        (tmp_path / "empty.gguf", "an empty file.*Download it again"),
        (tmp_path / "pipe.gguf", "not a regular file"),
        (tmp_path / "empty.gguf" / "x.gguf", "cannot be opened"),
        ("a\0b", "cannot be opened"),
    ]:
        with pytest.raises(GGUFError, match=message):
            read_gguf(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "a.gguf").write_bytes(small_file())
    (tmp_path / "a.gguf").chmod(0)
    with pytest.raises(GGUFError, match=r"cannot be opened .*Check its permissions"):
        read_gguf(tmp_path / "a.gguf")


def test_the_plain_reader_agrees_on_the_valid_file():
    """The oracle reads the values that were written, and refuses a bad file."""
    metadata, tensors = strict_read(small_file())
    assert metadata["scalar.5"] == -70_000
    assert metadata["array.strings"][4] == "日本"
    assert tensors["blk.0.cube"] == ("F16", (2, 3, 2), 1568, 24)
    assert strict_read(HUGE_ARRAY) is None
    assert np.frombuffer(small_file()[1600:1664], dtype=np.uint8).size == 64


@pytest.mark.parametrize(("count", "remedy"), [(1000, "Close keys are"), (1001, "Convert the model again")])
def test_a_missing_key_is_not_looked_for_among_thousands(count, remedy, tmp_path):
    """Comparing the key with 65,000 permutations of its letters would take seconds."""
    alike = itertools.islice(map("".join, itertools.permutations("split.no")), 1, count)
    keys = [key(name, U8, b"\1") for name in alike] + [key("split.count", U16, number(U16, 2))]
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_bytes(keys, []))
    with pytest.raises(MissingKeyError, match=f"no key 'split.no': .*{remedy}"):
        read_gguf(path)
