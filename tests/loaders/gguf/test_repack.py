"""Repacking is lossless: the planes dequantise to the bits that gguf computes from the blocks of the file."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import LAYOUTS, KernelInputError, Weight, reference
from rooflama.kernels.reference.quant_layouts import bit_offsets, high_bit_offsets
from rooflama.loaders.device.raw import as_bytes
from rooflama.loaders.gguf.repack import pack, pack_high, repack, repack_stack
from rooflama.loaders.gguf.types import TYPE_SIZES
from rooflama.testing.strategies import seeds
from rooflama.testing.weights import TYPES, gguf_dequantize, random_blocks, random_bytes, some_columns


def assert_same_floats(got, expected, context):
    """Equal bits, except that any NaN equals any NaN."""
    got, expected = got.view(np.uint32), expected.view(np.uint32)
    both_nan = np.isnan(got.view(np.float32)) & np.isnan(expected.view(np.float32))
    wrong = (got != expected) & ~both_nan
    assert not wrong.any(), f"{wrong.sum()} differ, first at {np.argwhere(wrong)[0]}; {context}"


@pytest.mark.parametrize("make", [random_blocks, random_bytes])
@pytest.mark.parametrize("ggml_type", TYPES)
@given(rows=st.integers(0, 5), data=st.data(), seed=seeds)
def test_planes_dequantise_as_gguf_does(ggml_type, make, rows, data, seed):
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    raw = make(np.random.default_rng(seed), ggml_type, rows, columns)
    weight = repack(raw, ggml_type, columns)
    context = f"{ggml_type} [{rows}, {columns}] seed={seed}"
    if rows:
        assert_same_floats(reference.dequantize(weight.numpy()), gguf_dequantize(raw, ggml_type), context)
    assert weight.shape == (rows, columns)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_runs_of_rows_join_seamlessly(ggml_type, monkeypatch):
    """Repacking in runs of rows on several threads gives the same planes."""
    monkeypatch.setattr("rooflama.loaders.gguf.repack.RUN_WEIGHTS", 1024)
    raw = random_blocks(np.random.default_rng(0), ggml_type, 23, 256)
    assert_same_floats(
        reference.dequantize(repack(raw, ggml_type, 256).numpy()), gguf_dequantize(raw, ggml_type), ggml_type
    )


@pytest.mark.parametrize("ggml_type", [*TYPES, "F32", "F16", "BF16"])
@given(heights=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=seeds)
def test_a_stack_is_its_tensors_below_each_other(ggml_type, heights, seed):
    rng = np.random.default_rng(seed)
    columns = TYPE_SIZES[ggml_type][0] * 3
    raws = [rng.integers(0, 256, (rows, TYPE_SIZES[ggml_type][1] * 3), dtype=np.uint8) for rows in heights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rooflama.loaders.gguf.repack.RUN_WEIGHTS", 2 * columns)
        stack = repack_stack(raws, ggml_type, columns)
    joined = Weight.concat_rows([repack(raw, ggml_type, columns) for raw in raws])
    assert stack.shape == joined.shape
    for got, expected in zip(stack.planes, joined.planes, strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(as_bytes(got), as_bytes(expected))


@given(bits=st.sampled_from([1, 2, 4, 8]), words=st.integers(1, 5).map(lambda n: 2 * n), seed=seeds)
def test_pack_puts_element_i_where_the_layout_says(bits, words, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, words * 32 // bits), dtype=np.uint8)
    packed = pack(codes, bits).view(np.uint32)
    expected = np.zeros((3, words), np.uint32)
    for i, offset in enumerate(bit_offsets(bits)):
        expected |= codes[:, i :: 32 // bits].astype(np.uint32) << np.uint32(offset)
    np.testing.assert_array_equal(packed, expected)


@given(bits=st.sampled_from([(4, 1), (4, 2), (2, 1)]), words=st.integers(1, 3), seed=seeds)
def test_one_shift_brings_high_bits_to_their_low_bits(bits, words, seed):
    """Parts hold four codes at a time, on which the dot products of bytes rely."""
    low_bits, high_bits = bits
    size = words * 2 * 32 // high_bits
    codes = np.random.default_rng(seed).integers(0, 1 << (low_bits + high_bits), (3, size), dtype=np.uint8)
    low = pack(codes & ((1 << low_bits) - 1), low_bits).view(np.uint32)
    high = pack_high(codes >> low_bits, low_bits, high_bits).view(np.uint32)

    def bytes_of(plane, bits, part):
        mask = np.uint32(0x01010101 * ((1 << bits) - 1))
        return ((plane >> np.uint32(bits * part)) & mask).astype("<u4")

    parts = 8 // low_bits
    for word in range(low.shape[1]):
        high_word, position = divmod(word, low_bits // high_bits)
        for part in range(parts):
            joined = bytes_of(low[:, word], low_bits, part)
            joined |= bytes_of(high[:, high_word], high_bits, position * parts + part) << np.uint32(low_bits)
            per_word = 32 // low_bits
            elements = [2 * part, 2 * part + per_word // 2, 2 * part + 1, 2 * part + per_word // 2 + 1]
            expected = codes[:, [word * per_word + e for e in elements]]
            np.testing.assert_array_equal(joined.view(np.uint8).reshape(3, 4), expected)
    offsets = high_bit_offsets(low_bits, high_bits)
    assert sorted(offsets) == list(range(0, 32, high_bits))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_bytes_equal_the_files_but_for_widened_scales(ggml_type):
    widened = {"Q3_K": 4, "Q4_K": 4, "Q5_K": 4, "IQ4_XS": 2}  # additional bytes per block: 3.6%, 2.8%, 2.3%, 1.5%
    raw = random_blocks(np.random.default_rng(0), ggml_type, 3, 512)
    num_blocks = 3 * 512 // LAYOUTS[ggml_type].quant_block
    assert repack(raw, ggml_type, 512).nbytes == raw.nbytes + num_blocks * widened.get(ggml_type, 0)


def test_a_memory_mapped_file_is_not_written():
    raw = random_blocks(np.random.default_rng(0), "Q4_1", 4, 64)
    raw.flags.writeable = False
    before = raw.copy()
    repack(raw, "Q4_1", 64).planes[0].zero_()
    np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize(
    ("raw", "ggml_type", "columns", "message"),
    [
        (np.zeros((2, 18), np.uint8), "IQ1_S", 32, "ggml type 'IQ1_S'"),
        (np.zeros((2, 18), np.uint8), "Q4_0", 48, "32 weights of Q4_0 take 18 bytes"),
        (np.zeros((2, 17), np.uint8), "Q4_0", 32, r"shape \[2, 17\] for 32 columns"),
        (np.zeros(18, np.uint8), "Q4_0", 32, r"shape \[18\]"),
        (np.zeros((2, 18), np.int8), "Q4_0", 32, "int8 bytes"),
        (np.zeros((2, 72), np.uint8), "Q4_K", 128, "rows hold whole blocks"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(raw, ggml_type, columns, message):
    with pytest.raises(KernelInputError, match=message):
        repack(raw, ggml_type, columns)


def test_layouts_have_the_blocks_of_gguf():
    assert all(layout.quant_block == TYPE_SIZES[kind][0] for kind, layout in LAYOUTS.items())


def test_brain_floats_stay_as_they_are():
    weight = repack(np.zeros((1, 64), np.uint8), "BF16", 32)
    assert weight.planes[0].dtype == torch.bfloat16


FORKING = """
import os, signal
import numpy as np
from rooflama.loaders.gguf.repack import repack

raw = np.zeros((4, 20), np.uint8)
repack(raw, "Q4_1", 32)
child = os.fork()
if not child:
    signal.alarm(20)
    repack(raw, "Q4_1", 32)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_repacks(tmp_path):
    """It has none of the threads that its parent keeps."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "0\n", done.stderr
