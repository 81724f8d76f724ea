"""RMSNorm against its definition, and the laws it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, add_rms_norm, reference, rms_norm
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.testing.strategies import DEVICE, beyond_int32, dtypes, exact, guarded, normal, seeds

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


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e9])
@pytest.mark.parametrize("eps_per_mean_square", [0.0, 1e-3, 1.0])
def test_definition_equals_torch(scale, eps_per_mean_square):
    """In float64, to its rounding, and with an eps that matters."""
    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, 5, 37)) * scale
    weight, eps = rng.standard_normal(37), eps_per_mean_square * scale**2

    def norm(x):
        return torch.nn.functional.rms_norm(torch.from_numpy(x), (37,), torch.from_numpy(weight), eps).numpy()

    np.testing.assert_allclose(reference.rms_norm(x, weight, eps), norm(x), rtol=1e-14)
    normed, total = reference.add_rms_norm(x, residual, weight, eps)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(normed, norm(x + residual), rtol=1e-14)


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


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), hidden=st.integers(1, 200), dtype=dtypes, seed=seeds)
def test_leading_dimensions_are_rows(shape, hidden, dtype, seed):
    """Also between other columns, where rows do not touch."""
    rng = np.random.default_rng(seed)
    x, residual = (normal(rng, *shape, hidden + 3, dtype=dtype)[..., :hidden] for _ in range(2))
    weight = normal(rng, hidden)
    assert_bit_equal(rms_norm(x, weight, 1e-5).flatten(0, -2), rms_norm(x.flatten(0, -2), weight, 1e-5))
    got, want = (
        add_rms_norm(x, residual, weight, 1e-5),
        add_rms_norm(x.flatten(0, -2), residual.flatten(0, -2), weight, 1e-5),
    )
    for one, other in zip(got, want, strict=True):
        assert one.shape == x.shape
        assert_bit_equal(one.flatten(0, -2), other)


def test_rows_at_unequal_distances_are_refused():
    for x in (torch.zeros(2, 3, 8, device=DEVICE)[:, :2], torch.zeros(3, 2, 8, device=DEVICE).transpose(0, 1)):
        with pytest.raises(KernelInputError, match="rows of x must lie at one distance"):
            rms_norm(x, torch.ones(8, device=DEVICE), 1e-5)
        with pytest.raises(KernelInputError, match="rows of residual must lie at one distance"):
            add_rms_norm(x.contiguous(), x, torch.ones(8, device=DEVICE), 1e-5)


def test_the_same_call_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, residual, weight = normal(rng, 6, 700), normal(rng, 6, 700), normal(rng, 700)
    assert_bit_equal(rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    for first, again in zip(*(add_rms_norm(x, residual, weight, 1e-5) for _ in range(2)), strict=True):
        assert_bit_equal(first, again)


def assert_strides_change_nothing(x, residual, weight):
    assert_bit_equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))
    strided = add_rms_norm(x, residual, weight, 1e-5)
    plain = add_rms_norm(x.contiguous(), residual.contiguous(), weight, 1e-5)
    for name, got, want in zip(("norm", "sum"), strided, plain, strict=True):
        assert_bit_equal(got, want, context=name)


def test_row_stride():
    """Rows may be slices of wider tensors, x's and the residual's of different ones; what lies beside is not read."""
    rng = np.random.default_rng(0)
    wide_x, wide_residual = (torch.full((4, width), float("nan"), device=DEVICE) for width in (96, 53))
    wide_x[:, 32:64], wide_residual[:, 8:40] = normal(rng, 4, 32), normal(rng, 4, 32)
    assert_strides_change_nothing(wide_x[:, 32:64], wide_residual[:, 8:40], normal(rng, 32))


def test_offsets_beyond_int32():
    """x and the residual by turns, so that neither's stride can serve for the other's."""
    rng = np.random.default_rng(0)
    x, residual = (normal(rng, 3, 64, dtype=torch.float16) for _ in range(2))
    weight = torch.ones(64, device=DEVICE)
    far = beyond_int32(x)
    assert_strides_change_nothing(far, residual, weight)
    far.copy_(residual)
    assert_strides_change_nothing(x, far, weight)


def test_opcheck():
    x, weight = torch.randn(3, 40, device=DEVICE), torch.ones(40, device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.rooflama.add_rms_norm, (x, x.clone(), weight, 1e-5))


def test_compiles_into_one_graph():
    x, residual = torch.randn(2, 3, 40, device=DEVICE)
    weight = torch.ones(40, device=DEVICE)

    def block(x, residual, weight):
        normed, total = add_rms_norm(rms_norm(x, weight, 1e-5) + 1, residual, weight, 1e-5)
        return normed * 2, total + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, residual, weight)
    for got, want in zip(compiled, block(x, residual, weight), strict=True):
        assert_bit_equal(got, want)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(9), r"weight has shape \[9\]: weight must have shape \[8\]"),
        (torch.zeros(8), torch.zeros(8), r"x must have shape \[\.\.\., columns\]"),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), "x is torch.float64"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.int32), "weight is torch.int32"),
        (torch.zeros(8, 2).T, torch.zeros(8), "last dimension of x must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(16, device=DEVICE)[::2], "last dimension of weight must be contiguous"),
        (torch.zeros(2, 0), torch.zeros(0), r"x has shape \[2, 0\]: a mean needs at least one column"),
    ],
)
def test_bad_input_is_refused_before_a_launch(x, weight, message):
    with pytest.raises(KernelInputError, match=message):
        rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    with pytest.raises(KernelInputError, match=message):
        add_rms_norm(x.to(DEVICE), torch.zeros(x.shape, device=DEVICE), weight.to(DEVICE), 1e-5)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(1, 8), r"residual must have shape \[2, 8\]"),
        (torch.zeros(2, 8, dtype=torch.int32), "residual is torch.int32"),
        (torch.zeros(8, 2).T, "last dimension of residual must be contiguous"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(residual, message):
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(KernelInputError, match=message):
        add_rms_norm(x, residual.to(DEVICE), weight, 1e-5)


def test_tensors_on_two_devices_are_refused():
    x, weight, far = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE), torch.zeros(8, device="meta")
    with pytest.raises(KernelInputError, match="weight on meta: all tensors of one call live on one device"):
        rms_norm(x, far, 1e-5)
    with pytest.raises(KernelInputError, match="residual on meta: all tensors of one call live on one device"):
        add_rms_norm(x, far.expand(2, 8), weight, 1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    x, weight = torch.zeros(1, 8), torch.zeros(8)
    half = torch.bfloat16
    for call in (
        lambda: rms_norm(x.to(half), weight, 1e-5),
        lambda: rms_norm(x, weight.to(half), 1e-5),
        lambda: add_rms_norm(x.to(half), x, weight, 1e-5),
        lambda: add_rms_norm(x, x.to(half), weight, 1e-5),
        lambda: add_rms_norm(x, x, weight.to(half), 1e-5),
    ):
        with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
            call()
