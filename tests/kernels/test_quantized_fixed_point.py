"""A few tokens in 16 bits: integer dot products with activations in fixed point, held to their own definition."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import LAYOUTS, KernelInputError, quantized_matmul, quantized_matmul_pair, reference
from rooflama.kernels.launch import override
from rooflama.kernels.quantized_matmul import most_tokens
from rooflama.kernels.reference.fixed_point import fixed_point
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.strategies import DEVICE, DTYPES, exact, guarded, normal, seeds
from rooflama.testing.weights import TYPES, guarded_weight, random_weight, some_columns

QUANTISED = [name for name in TYPES if not LAYOUTS[name].is_float]
MOST_TOKENS = most_tokens(LAYOUTS["Q4_K"], DEVICE)["fixed_point"]
halves = st.sampled_from([dtype for dtype in DTYPES if dtype.itemsize == 2])


def sums_bound(x, weight, extra=0.0):
    """Rounding of the sums over groups in float32, in any order: they are exact until then."""
    planes = weight.layout.planes
    parts = []
    for cleared in (("m", "dmin"), ("d",)):
        kept = (torch.zeros_like(t) if p.name in cleared else t for p, t in zip(planes, weight.planes, strict=True))
        parts.append(np.abs(reference.dequantize(weight._replace(planes=tuple(kept)).numpy(), np.float64)))
    groups = weight.shape[1] / weight.layout.group
    return (4 + np.sqrt(groups)) * 2.0**-24 * (np.abs(x) @ (parts[0] + parts[1]).T + extra)


@pytest.mark.parametrize("ggml_type", QUANTISED)
@given(
    num_tokens=st.integers(1, MOST_TOKENS),
    rows=st.integers(1, 20),
    dtype=halves,
    normed=st.booleans(),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    resident=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_equals_its_definition(
    ggml_type, num_tokens, rows, dtype, normed, has_bias, has_residual, resident, data, seed
):
    """To the rounding of float32 sums: nothing is rounded to 16 bits, on the way or at the end."""
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    rng = np.random.default_rng(seed)
    weight, buffers = guarded_weight(random_weight(rng, ggml_type, rows, columns))
    x, _ = guarded(normal(rng, num_tokens, columns, dtype=dtype))
    bias = guarded(normal(rng, rows))[0] if has_bias else None
    residual = guarded(normal(rng, num_tokens, rows, dtype=dtype))[0] if has_residual else None
    norm_weight = guarded(normal(rng, columns))[0] if normed else None
    got = quantized_matmul(
        x, weight, bias, residual=residual, norm_weight=norm_weight, eps=1e-5, resident=resident,
        out_dtype=torch.float32,
    )  # fmt: skip
    context = f"{ggml_type} [{rows}, {columns}] num_tokens={num_tokens} {dtype} normed={normed} seed={seed}"

    root = 1.0 / np.sqrt((exact(x) ** 2).mean(1, keepdims=True) + 1e-5) if normed else 1.0
    entering = fixed_point(exact(x) * exact(norm_weight) if normed else exact(x)) * root
    added = [exact(t) for t in (bias, residual) if t is not None]
    expected = reference.quantized_matmul(
        exact(x),
        weight.numpy(),
        None if bias is None else exact(bias),
        residual=None if residual is None else exact(residual),
        norm_weight=None if norm_weight is None else exact(norm_weight),
        eps=1e-5,
        fixed_point=True,
    )
    bound = sums_bound(entering, weight, sum(np.abs(t) for t in added) + np.zeros_like(expected))
    error = np.abs(exact(got) - expected)
    assert (error <= bound).all(), f"{np.max(error / bound):.2f} of what is allowed; {context}"
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize("ggml_type", QUANTISED)
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_at_least_ten_times_as_exact_as_rounding_to_bfloat16(ggml_type, spread):
    """Against float64, the norm joined. ``spread``: one column in 32 is so much larger than the others."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, ggml_type, 16, 1024)
    x = normal(rng, 1, 1024, dtype=torch.float16)
    x[:, ::32] *= spread
    norm_weight = torch.from_numpy(rng.uniform(0.5, 1.5, 1024)).float().to(DEVICE)
    got = quantized_matmul(x, weight, norm_weight=norm_weight, eps=1e-5, out_dtype=torch.float32)
    entering = reference.rms_norm(exact(x), exact(norm_weight), 1e-5)
    expected = reference.quantized_matmul(entering, weight.numpy())
    rounded = exact(torch.from_numpy(entering).to(torch.bfloat16))
    by_bfloat16 = np.linalg.norm(reference.quantized_matmul(rounded, weight.numpy()) - expected)
    assert 10 * np.linalg.norm(exact(got) - expected) <= by_bfloat16


def exact_step(group):
    """The step of one group of 32 numbers, in rational arithmetic."""
    largest = max(Fraction(abs(float(v))) for v in group)
    exponent = -112
    while largest >= (2 - Fraction(1, 2**14)) * Fraction(2) ** exponent:
        exponent += 1
    return Fraction(2) ** (exponent - 14)


def exactly(group):
    """``fixed_point`` of one group of 32 numbers, in rational arithmetic."""
    step = exact_step(group)
    return [round(Fraction(float(v)) / step) * step for v in group]  # round() takes ties to even


@given(exponent=st.integers(-130, 100), spread=st.integers(0, 20), seed=seeds)
@example(exponent=0, spread=0, seed=0)
def test_the_definition_in_rational_arithmetic(exponent, spread, seed):
    rng = np.random.default_rng(seed)
    group = (rng.standard_normal(32) * 2.0 ** (exponent - rng.integers(0, spread + 1, 32))).astype(np.float32)
    assert [Fraction(v) for v in fixed_point(group[None])[0]] == exactly(group)


JUST_BELOW = 2 - 2**-14 - 2**-23  # the last float32 that is rounded to steps of 2^-14


@pytest.mark.parametrize(
    "largest",
    [1.0, np.nextafter(np.float32(2), np.float32(0)), 2 - 2**-14, JUST_BELOW, 2 - 2**-13, 2**-126, 2**-149, 0.0, 2e37],
)
def test_the_largest_number_fits_sixteen_bits(largest):
    group = np.full((1, 32), 0.25 * largest, np.float32)
    group[0, 3], group[0, 4] = largest, -largest
    out = fixed_point(group)[0]
    assert [Fraction(v) for v in out] == exactly(group[0])
    assert np.abs(out / float(exact_step(group[0]))).max() <= 2**15 - 1
    weight = random_weight(np.random.default_rng(0), "Q8_0", 4, 32)
    x = torch.from_numpy(group).to(DEVICE)
    one = torch.ones(32, device=DEVICE, dtype=torch.float16)
    got = quantized_matmul(one[None], weight, norm_weight=x[0], eps=0.0, out_dtype=torch.float32)
    expected = reference.dequantize(weight.numpy(), np.float64) @ out
    np.testing.assert_allclose(exact(got)[0], expected, rtol=1e-5, atol=2.0**-23 * 8 * np.abs(expected).max())


def test_the_largest_exponent_is_a_number():
    """Up to float32's last octave; beyond (2 - 2^-14) 2^127 there is none."""
    weight = random_weight(np.random.default_rng(0), "Q8_0", 4, 32)
    one = torch.ones(1, 32, device=DEVICE, dtype=torch.float16)
    for largest, is_number in ((2.0**127, True), (JUST_BELOW * 2.0**127, True), ((2 - 2**-14) * 2.0**127, False)):
        group = np.zeros((1, 32), np.float32)
        group[0, 5] = largest
        out = fixed_point(group)[0]
        assert np.isfinite(out).all() == is_number
        norm_weight = torch.from_numpy(group)[0].to(DEVICE)
        got = quantized_matmul(one, weight, norm_weight=norm_weight, eps=0.0, out_dtype=torch.float32)
        expected = reference.dequantize(weight.numpy(), np.float64) @ out
        np.testing.assert_allclose(exact(got)[0], expected, rtol=1e-5)


def test_what_is_exact_in_fifteen_bits_passes_unrounded():
    rng = np.random.default_rng(0)
    whole = rng.integers(-(2**14), 2**14, (3, 64)).astype(np.float64)
    whole[:, ::32] = 2**14
    np.testing.assert_array_equal(fixed_point(whole), whole)
    np.testing.assert_array_equal(fixed_point(whole * 2.0**-60), whole * 2.0**-60)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0", "Q2_K"])
def test_no_number_in_gives_no_number_out(ggml_type, value):
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, ggml_type, 5, 768), normal(rng, MOST_TOKENS, 768, dtype=torch.float16)
    sound = quantized_matmul(x, weight)
    x[1, 700] = value
    got = quantized_matmul(x, weight)
    assert got[1].isnan().all()
    assert_bit_equal(got[::2], sound[::2])
    assert np.isnan(fixed_point(exact(x))[1, 672:704]).all()


def test_the_nan_that_is_largest_as_a_whole_number():
    """A GPU makes NaN of these bits; adding to them as to a whole number would overflow."""
    every_bit = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    norm_weight = np.ones(64, np.float32)
    norm_weight[40] = every_bit[0]
    assert norm_weight.view(np.uint32)[40] == 0x7FFFFFFF
    np.testing.assert_array_equal(np.isnan(fixed_point(norm_weight[None])), np.arange(64)[None] >= 32)
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, "Q8_0", 5, 64), normal(rng, 1, 64, dtype=torch.float16)
    assert quantized_matmul(x, weight, norm_weight=torch.from_numpy(norm_weight).to(DEVICE), eps=1e-5).isnan().all()


@given(ggml_type=st.sampled_from(QUANTISED), dtype=halves, seed=seeds)
def test_a_token_does_not_depend_on_its_neighbour(ggml_type, dtype, seed):
    """Nor on whether its weight was requested early."""
    rng = np.random.default_rng(seed)
    weight, x = random_weight(rng, ggml_type, 10, 256), normal(rng, MOST_TOKENS, 256, dtype=dtype)
    options = {"norm_weight": normal(rng, 256), "swiglu": bool(seed % 2), "eps": 1e-6}
    together = quantized_matmul(x, weight, resident=True, **options)
    alone = torch.cat([quantized_matmul(row[None], weight, **options) for row in x])
    if DEVICE.type == "cuda":  # ptxas contracts sums differently in the two kernels
        np.testing.assert_allclose(exact(together), exact(alone), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert_bit_equal(together, alone)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 65])
def test_a_wider_result_is_not_rounded_on_the_way(num_tokens):
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, "Q6_K", 9, 256), normal(rng, num_tokens, 256, dtype=torch.float16)
    got = quantized_matmul(x, weight, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    expected = reference.quantized_matmul(exact(x), weight.numpy())
    assert np.linalg.norm(exact(got) - expected) < 1e-4 * np.linalg.norm(expected)  # float16 rounds at 3e-4


@pytest.mark.parametrize("columns", [4096, 8192, 8448])
def test_one_tile_and_many(columns):
    """Rows of one whole tile, of whole tiles, and of one tile that is not full."""
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, "Q4_K", 3, columns), normal(rng, 1, columns, dtype=torch.float16)
    got = quantized_matmul(x, weight, out_dtype=torch.float32)
    expected = reference.quantized_matmul(exact(x), weight.numpy(), fixed_point=True)
    assert (np.abs(exact(got) - expected) <= sums_bound(fixed_point(exact(x)), weight)).all()


@given(
    types=st.tuples(*[st.sampled_from(TYPES)] * 2),
    num_tokens=st.sampled_from([0, *range(1, MOST_TOKENS + 2), 65]),
    rows=st.tuples(*[st.integers(0, 20)] * 2),
    dtype=st.sampled_from(DTYPES),
    normed=st.booleans(),
    has_bias=st.tuples(*[st.booleans()] * 2),
    batch_invariant=st.booleans(),
    seed=seeds,
)
@example(("Q4_K", "Q6_K"), 1, (20, 9), torch.float16, True, (True, True), False, 0)
def test_a_pair_is_the_product_of_each(types, num_tokens, rows, dtype, normed, has_bias, batch_invariant, seed):
    """In every bit, if the tiles are the same: of any two types, at any number of tokens."""
    rng = np.random.default_rng(seed)
    columns = 512
    weights, buffers = [], []
    for ggml_type, count in zip(types, rows, strict=True):
        weight, guards = guarded_weight(random_weight(rng, ggml_type, count, columns))
        weights.append(weight)
        buffers += guards
    x, _ = guarded(normal(rng, num_tokens, columns, dtype=dtype))
    biases = [guarded(normal(rng, count))[0] if has else None for has, count in zip(has_bias, rows, strict=True)]
    norm_weight = guarded(normal(rng, columns))[0] if normed else None
    options = {"norm_weight": norm_weight, "eps": 1e-5, "batch_invariant": batch_invariant, "resident": True}
    with override("fixed_point", BLOCK_N=8, BLOCK_K=256, num_warps=4):
        pair = quantized_matmul_pair(x, *weights, *biases, **options)
        each = [quantized_matmul(x, weight, bias, **options) for weight, bias in zip(weights, biases, strict=True)]
    context = f"{types} {rows} num_tokens={num_tokens} {dtype} normed={normed} seed={seed}"
    for got, expected in zip(pair, each, strict=True):
        if DEVICE.type == "cuda":  # ptxas contracts sums differently in the two kernels
            scale = 1.0 + float(np.abs(exact(expected)).max(initial=0.0))
            np.testing.assert_allclose(
                exact(got), exact(expected), rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * scale, err_msg=context
            )
        else:
            assert_bit_equal(got, expected, context=context)
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize("num_tokens", [1, MOST_TOKENS])
def test_a_pair_is_one_launch_in_the_tile_of_the_wider_type(num_tokens):
    """Of all rows together."""
    rng = np.random.default_rng(0)
    wide, narrow = random_weight(rng, "Q8_0", 9, 4096), random_weight(rng, "Q2_K", 40, 4096)
    x = normal(rng, num_tokens, 4096, dtype=torch.float16)
    alone = [
        quantized_matmul.body(x.new_empty(num_tokens, weight.shape[0]), x, weight).options["num_warps"]
        for weight in (wide, narrow)
    ]
    for pair in ((wide, narrow), (narrow, wide)):
        out = tuple(x.new_empty(num_tokens, weight.shape[0]) for weight in pair)
        one = quantized_matmul_pair.body(out, x, *pair)
        assert one.options["num_warps"] == alone[0]
        assert one.grid == (sum(-(-weight.shape[0] // one.options["BLOCK_N"]) for weight in pair),)
    assert num_tokens == 2 or alone[0] != alone[1]


@pytest.mark.parametrize("num_tokens", [3, 65])
def test_more_tokens_are_two_products(num_tokens):
    rng = np.random.default_rng(0)
    pair = [random_weight(rng, ggml_type, 4, 256) for ggml_type in ("Q4_K", "Q6_K")]
    x = normal(rng, num_tokens, 256, dtype=torch.float16)
    assert quantized_matmul_pair.body(tuple(x.new_empty(num_tokens, 4) for _ in pair), x, *pair) is None


def test_a_pair_of_other_columns_is_refused():
    rng = np.random.default_rng(0)
    first, second = random_weight(rng, "Q4_K", 4, 256), random_weight(rng, "Q6_K", 4, 512)
    x = normal(rng, 1, 256, dtype=torch.float16)
    for pair in ((first, second), (second, first)):
        with pytest.raises(KernelInputError, match="x has shape"):
            quantized_matmul_pair(x, *pair)
