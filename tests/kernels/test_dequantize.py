"""Dequantisation against its definition, bit for bit: only one operation rounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assertions import assert_bit_equal, assert_guards_intact
from quant_blocks import TYPES, guarded_weight, random_blocks, random_bytes, random_weight, some_columns, virtual_rows
from rooflama.kernels import KernelInputError, dequantize, reference, resident_form
from rooflama.kernels.dequantize import dequantize_rows
from rooflama.loaders.quant_layout import repack
from strategies import DEVICE, dtypes, seeds


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
    assert_bit_equal(got, rounded_definition(weight, dtype), context=context)
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_some_rows_only(ggml_type):
    weight = random_weight(np.random.default_rng(0), ggml_type, 40, 256)
    out = torch.full((20, 256), float("nan"), device=DEVICE)
    dequantize_rows(weight, 16, 33, out)
    assert_bit_equal(out[:17], rounded_definition(weight, torch.float32)[16:33])
    assert bool(out[17:].isnan().all()), "wrote rows it was not asked for"


def test_rows_beyond_int32():
    """Row 2^25 + 1 of 64 columns starts past 2^31; the storage is virtual, only one row of it is touched."""
    weight = virtual_rows(2**25 + 2, 64)
    row = torch.arange(64, dtype=torch.float16, device=DEVICE)
    weight.planes[0][2**25 + 1] = row
    out = torch.empty(1, 64, device=DEVICE)
    dequantize_rows(weight, 2**25 + 1, 2**25 + 2, out)
    assert_bit_equal(out[0], row.float())


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
        arguments = (list(weight.planes), weight.ggml_type, *weight.shape, torch.float16)
        torch.library.opcheck(torch.ops.rooflama.dequantize_planes, arguments)


def test_bad_input_is_refused_before_a_launch():
    weight = random_weight(np.random.default_rng(0), "Q4_1", 3, 64)
    low, d, m = weight.planes
    for broken, message in [
        (weight._replace(ggml_type="IQ1_S"), "a type is one of F32, F16"),
        (weight._replace(shape=(3, 48)), "Q4_1 comes in whole blocks of 32 columns"),
        (weight._replace(shape=(4, 64)), r"has contiguous planes low \[4, 8\]"),
        (weight._replace(planes=(low, d)), "has contiguous planes low"),
        (weight._replace(planes=(low, d.float(), m)), "torch.float32"),
        (weight._replace(planes=(low.T.contiguous().T, d, m)), r"strides \(1, 3\)"),
    ]:
        with pytest.raises(KernelInputError, match=message):
            dequantize(broken)
    with pytest.raises(KernelInputError, match=r"dtype is torch\.float64"):
        dequantize(weight, torch.float64)
