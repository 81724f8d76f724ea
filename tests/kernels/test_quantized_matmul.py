"""Quantised matmul: every type and regime against the definition, and the laws it keeps."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import (
    LAYOUTS,
    Weight,
    dequantize,
    quantized_matmul,
    reference,
    resident_form,
)
from rooflama.kernels.launch import override
from rooflama.kernels.quantized_tiles import Input, Output, planes_of
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.testing.strategies import DEVICE, dtypes, exact, guarded, normal, seeds
from rooflama.testing.weights import TYPES, guarded_weight, random_weight, some_columns, virtual_rows

# The gemv regime serves up to 8 tokens, dot up to 64, matmul the rest.
tokens_of_any_regime = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17, 33, 64, 65])
tokens_of_own_kernels = st.sampled_from([1, 3, 8, 9, 20])
cases_of_own_kernels = st.tuples(st.sampled_from(TYPES), tokens_of_own_kernels).filter(
    lambda case: case[1] <= 8 or not LAYOUTS[case[0]].is_float  # more tokens on float weights are torch's business
)


def magnitude(weight):
    """|scale * value| + |minimum| of each weight, float64: what the kernel's terms are made of before they cancel."""
    parts = []
    for cleared in (("m", "dmin"), ("d", "values")):
        planes = (
            torch.zeros_like(plane) if p.name in cleared else plane
            for p, plane in zip(weight.layout.planes, weight.planes, strict=True)
        )
        parts.append(np.abs(reference.dequantize(weight._replace(planes=tuple(planes)).numpy(), np.float64)))
    return parts[0] + parts[1]


def assert_matmul_close(got, x, weight, bias=None, residual=None, *, context):
    """Within the rounding of float32 sums, of weights rounded to the dtype of x, and of the result."""
    expected, bound = product_and_bound(exact(x), weight, bias, residual, x.dtype)
    assert_within_bound(got, expected, bound, context)


def product_and_bound(x, weight, bias, residual, dtype, x_rounded=False):
    """The definition's product of float64 ``x``, and how far a kernel in ``dtype`` may be from it.

    A sum of K float32 products is off by about sqrt(K) half units in the last place of sum |x w|. ``x_rounded``: the
    kernel may have rounded x to ``dtype`` on the way.
    """

    def as64(tensor):
        return None if tensor is None else exact(tensor)

    expected = reference.quantized_matmul(x, weight.numpy(), as64(bias), residual=as64(residual))
    unit32, unit = 2.0**-24, torch.finfo(dtype).eps / 2
    terms = np.abs(x) @ magnitude(weight).T
    added = sum(np.abs(as64(t)) for t in (bias, residual) if t is not None) + np.zeros_like(expected)
    bound = (4 + np.sqrt(x.shape[1])) * unit32 * (terms + added) + 2 * unit * (np.abs(expected) + added)
    weight_rounded = dtype != torch.float32 and not (weight.layout.is_float and weight.planes[0].dtype == dtype)
    bound += (weight_rounded + x_rounded) * unit * np.abs(x) @ np.abs(reference.dequantize(weight.numpy())).T
    return expected, bound + torch.finfo(dtype).smallest_normal


def assert_within_bound(got, expected, bound, context):
    error = np.abs(exact(got) - expected)
    bad = ~(error <= bound)
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(error / bound, nan=np.inf), 0)), bad.shape)
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements are off; worst at {tuple(int(i) for i in worst)}: "
            f"got {exact(got)[worst]!r}, expected {expected[worst]!r}, allowed {bound[worst]:.3e}; {context}"
        )


@pytest.mark.parametrize("ggml_type", TYPES)
@given(
    num_tokens=tokens_of_any_regime,
    rows=st.integers(1, 40),
    dtype=dtypes,
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    batch_invariant=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_quantized_matmul_equals_definition(
    ggml_type, num_tokens, rows, dtype, has_bias, has_residual, batch_invariant, data, seed
):
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    rng = np.random.default_rng(seed)
    weight, buffers = guarded_weight(random_weight(rng, ggml_type, rows, columns))
    x, _ = guarded(normal(rng, num_tokens, columns, dtype=dtype))
    bias = guarded(normal(rng, rows))[0] if has_bias else None
    residual = guarded(normal(rng, num_tokens, rows, dtype=dtype))[0] if has_residual else None
    got = quantized_matmul(x, weight, bias, residual=residual, batch_invariant=batch_invariant)
    context = f"{ggml_type} [{rows}, {columns}] num_tokens={num_tokens} {dtype} seed={seed}"
    assert_matmul_close(got, x, weight, bias, residual, context=context)
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@given(
    ggml_type=st.sampled_from(TYPES),
    num_tokens=tokens_of_any_regime,
    half=st.integers(1, 20),
    dtype=dtypes,
    fused=st.sampled_from([(True, False), (False, True), (True, True)]),
    has_bias=st.booleans(),
    batch_invariant=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_norm_in_and_swiglu_out_equal_definition(
    ggml_type, num_tokens, half, dtype, fused, has_bias, batch_invariant, data, seed
):
    normed, swiglu = fused
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, ggml_type, 2 * half, columns)
    weight = weight._replace(planes=tuple(guarded(plane)[0] for plane in weight.planes))
    x, _ = guarded(normal(rng, num_tokens, columns, dtype=dtype))
    bias = guarded(normal(rng, 2 * half))[0] if has_bias else None
    norm_weight = guarded(normal(rng, columns))[0] if normed else None
    got = quantized_matmul(
        x, weight, bias, norm_weight=norm_weight, eps=1e-5, swiglu=swiglu, batch_invariant=batch_invariant
    )
    entering = reference.rms_norm(exact(x), exact(norm_weight), 1e-5) if normed else exact(x)
    expected, bound = product_and_bound(entering, weight, bias, None, dtype, x_rounded=normed)
    if swiglu:
        (gate, up), (gate_bound, up_bound) = np.split(expected, 2, axis=1), np.split(bound, 2, axis=1)
        expected = reference.swiglu(gate, up)
        steepest = 1.1  # of silu
        opened = np.abs(reference.swiglu(gate, np.ones_like(gate)))
        bound = steepest * gate_bound * (np.abs(up) + up_bound) + opened * up_bound
        bound += 2 * torch.finfo(dtype).eps * np.abs(expected) + torch.finfo(dtype).smallest_normal
    context = f"{ggml_type} [{2 * half}, {columns}] num_tokens={num_tokens} {dtype} normed={normed} seed={seed}"
    assert_within_bound(got, expected, bound, context)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("ending", ["plain", "bias", "bias and residual", "bias and swiglu"])
def test_definition_equals_torch(scale, normed, ending):
    """In float64, to its rounding, with an eps that matters."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, "Q5_1", 6, 96).to("cpu")
    x, norm_weight, eps = rng.standard_normal((5, 96)) * scale, rng.standard_normal(96), 0.3 * scale**2
    bias = rng.standard_normal(6) if "bias" in ending else None
    residual = rng.standard_normal((5, 6)) if "residual" in ending else None
    options = {"norm_weight": norm_weight, "eps": eps} if normed else {}
    got = reference.quantized_matmul(x, weight.numpy(), bias, residual=residual, swiglu="swiglu" in ending, **options)
    entering = torch.from_numpy(x)
    if normed:
        entering = torch.nn.functional.rms_norm(entering, (96,), torch.from_numpy(norm_weight), eps)
    rows = torch.from_numpy(reference.dequantize(weight.numpy(), np.float64))
    want = torch.nn.functional.linear(entering, rows, None if bias is None else torch.from_numpy(bias))
    if residual is not None:
        want += torch.from_numpy(residual)
    if "swiglu" in ending:
        gate, up = want.chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-11, atol=1e-13 * want.abs().max().item())


@pytest.mark.parametrize("ggml_type", TYPES)
@given(num_tokens=tokens_of_own_kernels, dtype=dtypes, data=st.data(), seed=seeds)
def test_a_unit_vector_reads_out_one_column(ggml_type, num_tokens, dtype, data, seed):
    """Nothing is summed, so nothing but the conversion to the dtype rounds."""
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, ggml_type, 11, columns)
    chosen = torch.from_numpy(rng.integers(0, columns, num_tokens)).to(DEVICE)
    x = torch.nn.functional.one_hot(chosen, columns).to(dtype)
    expected = dequantize(weight, dtype).T[chosen]
    assert_bit_equal(quantized_matmul(x, weight), expected, signed_zeros=False, context=f"seed={seed}")


def assert_same_rows(actual, expected):
    """The same bits; on a GPU the same up to rounding, since ptxas contracts a row's sums by its place in the tile."""
    if DEVICE.type == "cuda":
        assert_within_rounding(actual, exact(expected))
    else:
        assert_bit_equal(actual, expected)


@given(case=cases_of_own_kernels, rows=st.integers(2, 30), dtype=dtypes, seed=seeds)
def test_permuting_rows_permutes_outputs(case, rows, dtype, seed):
    """What un-permuting the q and k rows of arch llama on the quantised bytes rests on."""
    ggml_type, num_tokens = case
    rng = np.random.default_rng(seed)
    weight, x = random_weight(rng, ggml_type, rows, 256), normal(rng, num_tokens, 256, dtype=dtype)
    order = torch.from_numpy(rng.permutation(rows)).to(DEVICE)
    assert_same_rows(quantized_matmul(x, weight.take_rows(order)), quantized_matmul(x, weight)[:, order])


@given(case=cases_of_own_kernels, rows=st.lists(st.integers(1, 20), min_size=1, max_size=3), seed=seeds)
def test_concatenating_rows_concatenates_outputs(case, rows, seed):
    """What a fused QKV or gate and up matrix rests on."""
    ggml_type, num_tokens = case
    rng = np.random.default_rng(seed)
    x = normal(rng, num_tokens, 256)
    weights = [random_weight(rng, ggml_type, n, 256) for n in rows]
    joined = quantized_matmul(x, Weight.concat_rows(weights))
    assert_same_rows(joined, torch.cat([quantized_matmul(x, w) for w in weights], dim=1))


@given(ggml_type=st.sampled_from(TYPES), num_tokens=st.integers(2, 40), dtype=dtypes, seed=seeds)
@example(ggml_type="Q8_0", num_tokens=65, dtype=torch.float32, seed=0)
@example(ggml_type="F16", num_tokens=100, dtype=torch.float16, seed=1)
def test_batch_invariance(ggml_type, num_tokens, dtype, seed):
    """With batch_invariant, a token's bits do not depend on the tokens beside it."""
    rng = np.random.default_rng(seed)
    weight, x = random_weight(rng, ggml_type, 10, 256), normal(rng, num_tokens, 256, dtype=dtype)
    cut = int(rng.integers(1, num_tokens))
    options = {"norm_weight": normal(rng, 256), "swiglu": bool(seed % 2), "batch_invariant": True}
    alone = [quantized_matmul(part, weight, **options) for part in (x[:1], x[1:cut], x[max(1, cut) :])]
    assert_bit_equal(quantized_matmul(x, weight, **options), torch.cat(alone))


@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0", "F16"])
@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_the_same_call_gives_the_same_bits(ggml_type, num_tokens):
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, ggml_type, 40, 512), normal(rng, num_tokens, 512)
    options = {"norm_weight": normal(rng, 512), "eps": 1e-5}
    assert_bit_equal(quantized_matmul(x, weight, **options), quantized_matmul(x, weight, **options))


@pytest.mark.parametrize("num_tokens", [1, 20])
@given(exponent=st.integers(-6, 6), seed=seeds)
def test_a_power_of_two_changes_no_mantissa(num_tokens, exponent, seed):
    rng = np.random.default_rng(seed)
    weight, x = random_weight(rng, "Q5_1", 9, 96), normal(rng, num_tokens, 96)
    assert_bit_equal(quantized_matmul(x * 2.0**exponent, weight), quantized_matmul(x, weight) * 2.0**exponent)


@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_strided_rows(num_tokens):
    """x and the residual may be slices of wider tensors; what lies beside them is not read."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, "Q8_0", 12, 64)
    wide_x = torch.full((num_tokens, 96), float("nan"), device=DEVICE)
    wide_residual = torch.full((num_tokens, 20), float("nan"), device=DEVICE)
    wide_x[:, 16:80], wide_residual[:, 4:16] = normal(rng, num_tokens, 64), normal(rng, num_tokens, 12)
    x, residual = wide_x[:, 16:80], wide_residual[:, 4:16]
    expected = quantized_matmul(x.contiguous(), weight, residual=residual.contiguous())
    assert_bit_equal(quantized_matmul(x, weight, residual=residual), expected)


@pytest.mark.parametrize("num_tokens", [2, 9])
def test_offsets_beyond_int32(num_tokens):
    """The last row starts past 2^31 elements; the storage is virtual, only the rows of x are touched."""
    stride = 2**31 // (num_tokens - 1) // 8 * 8 + 16
    shape = (num_tokens, 64)
    numel = stride * (num_tokens - 1) + 64
    if DEVICE.type == "cuda":
        buffer = torch.empty(numel, dtype=torch.float16, device=DEVICE)
    else:
        buffer = torch.from_numpy(np.memmap("/dev/zero", dtype=np.float16, mode="c", shape=(numel,)))
    rng = np.random.default_rng(0)
    x = buffer.as_strided(shape, (stride, 1))
    x.copy_(normal(rng, *shape, dtype=torch.float16))
    weight = random_weight(rng, "Q4_0", 5, 64)
    assert_bit_equal(quantized_matmul(x, weight), quantized_matmul(x.contiguous(), weight))
    residual = buffer.as_strided((num_tokens, 5), (stride, 1))
    assert_bit_equal(
        quantized_matmul(x, weight, residual=residual), quantized_matmul(x, weight, residual=residual.contiguous())
    )


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("regime", ["gemv", "dot"])
def test_output_beyond_int32(regime, swiglu):
    """Token 4's results start past 2^31: a kernel is told of as many rows as that takes, and its first program runs.

    The output is virtual; so is the weight with swiglu, where the first row of up comes after all those of gate.
    """
    width = 2**29 + 16
    rows, columns = (2 * width, 1) if swiglu else (width, 64)
    rng = np.random.default_rng(0)
    first = random_weight(rng, "F16", 32, columns)
    if swiglu:
        weight = virtual_rows(rows, columns)
        weight.planes[0][:16], weight.planes[0][width : width + 16] = first.planes[0][:16], first.planes[0][16:]
    else:
        weight = first
    x, out = normal(rng, 5, columns, dtype=torch.float16), virtual_rows(5, width).planes[0]
    common = (planes_of(weight), Output(None, None, 0, out), 5, rows, columns, columns)
    options = {"SWIGLU": swiglu, "LAYOUT": weight.layout, "BLOCK_N": 32}
    if regime == "gemv":
        kernel = importlib.import_module("rooflama.kernels.quantized_gemv")._gemv_kernel
        kernel[(1,)](Input(x, columns, None, 0.0), *common, BLOCK_M=8, BLOCK_K=256, RESIDENT=False, **options)
    else:
        kernel = importlib.import_module("rooflama.kernels.quantized_matmul")._dot_kernel
        kernel[(1,)](x, columns, *common, BLOCK_M=16, BLOCK_K=128, **options)
    expected = reference.quantized_matmul(exact(x), first.numpy(), swiglu=swiglu)
    assert_within_rounding(out[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("ggml_type", ["Q4_1", "Q6_K"])
def test_a_small_workspace_changes_nothing_but_the_number_of_passes(ggml_type):
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, ggml_type, 40, 256), normal(rng, 70, 256)
    bias, residual = normal(rng, 40), normal(rng, 70, 40)
    with override("matmul", WORKSPACE_BYTES=16 * 256 * 4):
        got = quantized_matmul(x, weight, bias, residual=residual)
        assert_matmul_close(got, x, weight, bias, residual, context=ggml_type)
        assert_matmul_close(quantized_matmul(x, weight), x, weight, context=ggml_type)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_definition_runs_on_resident_rows(ggml_type, numpy_backend):
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, ggml_type, 6, 256).to("cpu"), normal(rng, 3, 256).cpu()
    resident = resident_form(weight, "cpu")
    bias, residual = normal(rng, 6).cpu(), normal(rng, 3, 6).cpu()
    got = quantized_matmul(x, resident, bias, residual=residual)
    assert_bit_equal(got, quantized_matmul(x, weight, bias, residual=residual))
    assert_matmul_close(got, x, weight, bias, residual, context=ggml_type)
    assert np.shares_memory(reference.dequantize(resident.numpy()), resident.numpy().planes[0])
