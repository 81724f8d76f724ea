"""RMSNorm against its definition, and the laws it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.kernels import KernelInputError, add_rms_norm, reference, rms_norm
from strategies import DEVICE, dtypes, exact, guarded, normal, seeds

sizes = {"num_tokens": st.integers(0, 9), "hidden": st.integers(1, 700)}


def torch_rms_norm(x, weight, eps):
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale * weight.float()).to(x.dtype)


@given(**sizes, dtype=dtypes, weight_dtype=dtypes, eps=st.sampled_from([1e-6, 1e-5]), seed=seeds)
@example(num_tokens=3, hidden=576, dtype=torch.float16, weight_dtype=torch.float32, eps=1e-5, seed=0)
def test_rms_norm_equals_definition(num_tokens, hidden, dtype, weight_dtype, eps, seed):
    rng = np.random.default_rng(seed)
    x, buffer = guarded(normal(rng, num_tokens, hidden, dtype=dtype, scale=10 ** rng.uniform(-3, 1)))
    weight, _ = guarded(normal(rng, hidden, dtype=weight_dtype))
    got = rms_norm(x, weight, eps)
    context = f"num_tokens={num_tokens} hidden={hidden} seed={seed}"
    assert_within_rounding(
        got, reference.rms_norm(exact(x), exact(weight), eps), torch_rms_norm(x, weight, eps), context=context
    )
    assert_guards_intact(buffer, context=context)


@given(**sizes, dtype=dtypes, seed=seeds)
def test_add_rms_norm_equals_addition_then_norm(num_tokens, hidden, dtype, seed):
    rng = np.random.default_rng(seed)
    x, residual = (normal(rng, num_tokens, hidden, dtype=dtype) for _ in range(2))
    weight = normal(rng, hidden)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert_bit_equal(total, (x.float() + residual.float()).to(dtype))
    assert_bit_equal(normed, rms_norm(total, weight, 1e-5))


@given(hidden=st.integers(1, 300), exponent=st.integers(-8, 8), seed=seeds)
def test_scale_invariance_without_eps(hidden, exponent, seed):
    """A power of two changes no mantissa, so the norm's bits stay."""
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, 2, hidden), normal(rng, hidden)
    assert_bit_equal(rms_norm(x * 2.0**exponent, weight, 0.0), rms_norm(x, weight, 0.0))


@given(num_tokens=st.integers(2, 8), hidden=st.integers(1, 300), dtype=dtypes, seed=seeds)
def test_batch_invariance(num_tokens, hidden, dtype, seed):
    """A row's bits do not depend on the rows beside it."""
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, num_tokens, hidden, dtype=dtype), normal(rng, hidden)
    alone = torch.cat([rms_norm(x[i : i + 1], weight, 1e-5) for i in range(num_tokens)])
    assert_bit_equal(rms_norm(x, weight, 1e-5), alone)


def test_row_stride():
    """Rows may be a slice of a wider tensor."""
    rng = np.random.default_rng(0)
    wide, weight = normal(rng, 4, 96), normal(rng, 32)
    assert_bit_equal(rms_norm(wide[:, 32:64], weight, 1e-5), rms_norm(wide[:, 32:64].contiguous(), weight, 1e-5))


def test_offsets_beyond_int32():
    """Row 2 starts 2^31 + 16 elements in, the stride itself fits int32; only three rows of the storage are touched."""
    stride = 2**30 + 8
    buffer = torch.empty(0, dtype=torch.float16, device=DEVICE)
    buffer = buffer.new_empty(2 * stride + 64) if DEVICE.type == "cuda" else _untouched_half(2 * stride + 64)
    x = buffer.as_strided((3, 64), (stride, 1))
    x.copy_(normal(np.random.default_rng(0), 3, 64, dtype=torch.float16))
    weight = torch.ones(64, device=DEVICE)
    assert_bit_equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))


def _untouched_half(numel):
    """Address space without memory behind it, until it is written."""
    return torch.from_numpy(np.memmap("/dev/zero", dtype=np.float16, mode="c", shape=(numel,)))


def test_opcheck():
    x, weight = torch.randn(3, 40, device=DEVICE), torch.ones(40, device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.rooflama.add_rms_norm, (x, x.clone(), weight, 1e-5))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(9), r"weight has shape \[9\]: weight must have shape \[8\]"),
        (torch.zeros(8), torch.zeros(8), r"x must have shape \[any, any\]"),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), "x is torch.float64"),
        (torch.zeros(8, 2).T, torch.zeros(8), "last dimension of x must be contiguous"),
    ],
)
def test_bad_input_is_refused_before_a_launch(x, weight, message):
    with pytest.raises(KernelInputError, match=message):
        rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        rms_norm(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(8), 1e-5)
