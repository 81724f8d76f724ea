"""Dequantisation against its definition, bit for bit: only one operation rounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, Weight, dequantize, reference, resident_form
from rooflama.kernels.dequantize import _dequantize_kernel
from rooflama.kernels.quantized_tiles import planes_of
from rooflama.loaders.gguf.repack import repack
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.strategies import DEVICE, dtypes, seeds
from rooflama.testing.weights import (
    TYPES,
    guarded_weight,
    random_blocks,
    random_bytes,
    random_weight,
    some_columns,
    virtual_rows,
)


def rounded_definition(weight, dtype):
    return torch.from_numpy(reference.dequantize(weight.numpy())).to(device=weight.device, dtype=dtype)


@pytest.mark.parametrize("make", [random_blocks, random_bytes])
@pytest.mark.parametrize("ggml_type", TYPES)
@given(rows=st.integers(0, 19), data=st.data(), dtype=dtypes, seed=seeds)
def test_dequantize_equals_definition(ggml_type, make, rows, data, dtype, seed):
    """Infinities and NaN among the scales included, and planes with poison around them."""
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    raw = make(np.random.default_rng(seed), ggml_type, rows, columns)
    weight, buffers = guarded_weight(repack(raw, ggml_type, columns).to(DEVICE))
    context = f"{ggml_type} [{rows}, {columns}] {dtype} seed={seed}"
    with np.errstate(all="ignore"):
        got = dequantize(weight, dtype)
    assert_bit_equal(got, rounded_definition(weight, dtype), signed_zeros=False, context=context)
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_some_rows_only(ggml_type):
    weight = random_weight(np.random.default_rng(0), ggml_type, 40, 256)
    some = weight.slice_rows(16, 33)
    assert some.shape == (17, 256)
    assert_bit_equal(dequantize(some), rounded_definition(weight, torch.float32)[16:33], signed_zeros=False)
    assert weight.slice_rows(32, 48).shape == (8, 256)


def test_the_same_call_gives_the_same_bits():
    weight = random_weight(np.random.default_rng(0), "Q4_K", 9, 768)
    assert_bit_equal(dequantize(weight), dequantize(weight))


def test_output_beyond_int32():
    """Row 2 starts past 2^31. Only the first program of three rows runs; both storages are virtual."""
    columns = 2**30 + 32
    weight, out = virtual_rows(3, columns), virtual_rows(3, columns).planes[0]
    weight.planes[0][:, :32] = torch.arange(96, device=DEVICE).view(3, 32)
    tile = {"LAYOUT": weight.layout, "BLOCK_N": 8, "BLOCK_K": 32}
    _dequantize_kernel[(1, 1)](planes_of(weight), out, 3, columns, columns, **tile)
    assert_bit_equal(out[:, :32], weight.planes[0][:, :32])


def test_codes_beyond_int32():
    """The words of row 64 start past 2^31. Only the first program of 65 rows runs; both storages are virtual."""
    rows, columns = 65, 2**27 + 32
    weight, out = virtual_rows(rows, columns, "Q8_0"), virtual_rows(rows, columns).planes[0]
    few = random_weight(np.random.default_rng(0), "Q8_0", rows, 64)
    for plane, values in zip(weight.planes, few.planes, strict=True):
        plane[:, : values.shape[1]] = values
    assert 64 * weight.planes[0].shape[1] > 2**31
    tile = {"LAYOUT": weight.layout, "BLOCK_N": 128, "BLOCK_K": 32}
    _dequantize_kernel[(1, 1)](planes_of(weight), out, rows, columns, columns // 32, **tile)
    assert_bit_equal(out[:, :32], dequantize(few, torch.float16)[:, :32])


@pytest.mark.parametrize("ggml_type", TYPES)
def test_resident_form_on_a_cpu_is_float32_rows(ggml_type, numpy_backend):
    weight = random_weight(np.random.default_rng(0), ggml_type, 5, 256).to("cpu")
    resident = resident_form(weight, "cpu")
    assert resident.ggml_type == "F32"
    assert resident.shape == weight.shape
    assert_bit_equal(resident.planes[0], rounded_definition(weight, torch.float32))
    assert resident_form(resident, "cpu").planes[0].data_ptr() == resident.planes[0].data_ptr()


def test_resident_form_for_triton_is_the_planes_themselves():
    weight = random_weight(np.random.default_rng(0), "Q4_K", 5, 256)
    resident = resident_form(weight, DEVICE)
    assert resident.ggml_type == "Q4_K"
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(resident.planes, weight.planes, strict=True))


def test_opcheck():
    for ggml_type in ("Q4_K", "IQ4_NL", "F16"):
        weight = random_weight(np.random.default_rng(0), ggml_type, 5, 256)
        arguments = (ggml_type, list(weight.planes), list(weight.shape), torch.float16)
        torch.library.opcheck(torch.ops.rooflama.dequantize, arguments)


def test_compiles_into_one_graph():
    weight = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    compiled = torch.compile(lambda bias: dequantize(weight) + bias, fullgraph=True, backend="aot_eager")
    bias = torch.ones(64, device=DEVICE)
    assert_bit_equal(compiled(bias), dequantize(weight) + bias)


def test_bad_input_is_refused_before_a_launch():
    weight = random_weight(np.random.default_rng(0), "Q4_1", 3, 64)
    low, d, m = weight.planes
    for broken, message in [
        (weight._replace(ggml_type="IQ1_S"), "a type is one of F32, F16"),
        (weight._replace(shape=(3, 48)), "Q4_1 comes in whole blocks of 32 columns"),
        (weight._replace(shape=(4, 64)), r"has contiguous planes on one device, low \[4, 8\]"),
        (weight._replace(planes=(low, d)), "has contiguous planes on one device, low"),
        (weight._replace(planes=(low, d.float(), m)), "torch.float32"),
        (weight._replace(planes=(low.T.contiguous().T, d, m)), r"strides \(1, 3\)"),
        (weight._replace(planes=(low, d.to("meta"), m)), "on meta"),
        (torch.ones(3, 64), "weight is a Tensor: weight must be a Weight"),
    ]:
        with pytest.raises(KernelInputError, match=message):
            dequantize(broken)
        if isinstance(broken, Weight):
            with pytest.raises(KernelInputError, match=message):
                Weight.make(*broken)
    with pytest.raises(KernelInputError, match=r"dtype is torch\.float64"):
        dequantize(weight, torch.float64)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    weight = random_weight(np.random.default_rng(0), "Q4_1", 3, 64)
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        dequantize(weight, torch.bfloat16)
