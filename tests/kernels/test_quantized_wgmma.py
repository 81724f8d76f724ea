"""The wgmma regime of quantized_matmul: its launches before and after on any device, the product on Hopper."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gluon_in_numpy import DTYPES, Box, Pointer, assembly, run_wgmma
from rooflama.kernels import quantized_matmul, reference
from rooflama.kernels.backend import INTERPRETED
from rooflama.kernels.launch import override
from rooflama.kernels.quantized_matmul import most_tokens
from rooflama.kernels.quantized_tiles import Input, Output, Planes, planes_of
from rooflama.kernels.quantized_wgmma import serves
from rooflama.kernels.quantized_wgmma_codes import repeated, unit_of, unpack_assembly
from rooflama.kernels.quantized_wgmma_ends import SUMS_UNIT, Plan, launch_arrange, scratch_bytes
from rooflama.kernels.quantized_wgmma_output import Partials
from rooflama.kernels.weight import LAYOUTS
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE, exact, guarded, normal, seeds
from rooflama.testing.weights import guarded_weight, random_weight

runs_triton = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="Triton runs on the CPU interpreted")
HOPPER = DEVICE.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="wgmma exists on compute capability 9.x alone")
halves = st.sampled_from([torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda"))

QUANTISED = [name for name, layout in LAYOUTS.items() if not layout.is_float]

# The column that stands at each place of a group: lane q holds neighbours, a step s takes four of them.
COLUMNS = {
    group: [
        group // 4 * q + 4 * s + 2 * h + p
        for s, h, q, p in itertools.product(range(group // 16), range(2), range(4), range(2))
    ]
    for group in (16, 32)
}


def run(one):
    one.kernel[one.grid](*one.args, **one.options)


@runs_triton
@given(
    num_tokens=st.integers(3, 33),
    blocks=st.integers(1, 2),
    ggml_type=st.sampled_from(["Q4_K", "Q2_K", "Q8_0"]),
    dtype=halves,
    normed=st.booleans(),
    parts=st.integers(1, 2),
    seed=seeds,
)
def test_arrange_equals_numpy(num_tokens, blocks, ggml_type, dtype, normed, parts, seed):
    rng = np.random.default_rng(seed)
    layout, columns = LAYOUTS[ggml_type], 256 * blocks
    group, plan = layout.group, Plan.of(64, columns, num_tokens, parts, layout, DEVICE)
    x = guarded(normal(rng, num_tokens, columns, dtype=dtype))[0]
    norm = guarded(normal(rng, columns))[0] if normed else None
    arranged_shape, sums_shape, _ = plan.shapes(64, columns, layout)
    arranged = torch.full(arranged_shape, float("nan"), dtype=torch.float16, device=DEVICE)
    sums = torch.full(sums_shape, float("nan"), dtype=torch.float16, device=DEVICE) if ggml_type != "Q8_0" else None
    units = torch.full((plan.padded,), float("nan"), device=DEVICE)
    arrived = torch.full((21,), 7, dtype=torch.int32, device=DEVICE)
    run(launch_arrange(Input(x, x.stride(0), norm, 1e-5), arranged, sums, units, arrived, plan, False))
    assert not arrived.any()

    entering = reference.rms_norm(exact(x), exact(norm), 1e-5) if normed else exact(x)
    places = np.zeros((plan.padded, columns // group, group))
    places[:num_tokens] = entering.reshape(num_tokens, -1, group)[:, :, COLUMNS[group]]
    by_token = exact(units)[:, None, None]
    assert normed or (np.log2(by_token) % 1 == 0).all()
    by_tile = (plan.tiles, parts, plan.n // parts)
    got = exact(arranged).reshape(plan.tiles, columns // group, plan.n, group).transpose(0, 2, 1, 3)
    got = got.reshape(*by_tile, columns // group, group).swapaxes(0, 1)
    got = got.reshape(parts, plan.padded, columns // group, group)
    largest = np.abs(got[0, :num_tokens]).max((1, 2))
    assert ((largest >= 2.0**14) & (largest <= 2.0**15)).all()
    scaled = places / by_token
    unit = 2.0**-11 if parts == 1 else 2.0**-22
    norms = 2.0**-20 if normed else 0.0  # float32's roundings of the norm
    assert (np.abs(got.sum(0) - scaled) <= (unit + norms) * np.abs(scaled) + 2.0**-25).all()
    if not normed:
        assert (got[0] == scaled).all()
    if sums is not None:
        per_block = 256 // group
        high, low = exact(sums).reshape(plan.tiles, blocks, plan.n, 2, per_block).transpose(3, 0, 2, 1, 4)
        high, low = (SUMS_UNIT.value * t.reshape(*by_tile, -1).swapaxes(0, 1) for t in (high, low))
        high, low = (t.reshape(parts, plan.padded, -1) for t in (high, low))
        of_group, of_sizes = got.sum(3), np.abs(got).sum(3)
        assert (np.abs(high - of_group) <= 2.0**-11 * np.abs(of_group) + 2.0**-21 * of_sizes).all()
        assert (np.abs(high + low - of_group) <= 2.0**-22 * np.abs(of_group) + 2.0**-21 * of_sizes + 2.0**-19).all()


@runs_triton
@pytest.mark.parametrize("size", [2.0**-24, 60000.0, float("inf"), float("nan")])
def test_units_are_of_finite_numbers(size):
    """The largest number of a token becomes 2^14 or more, and what is not finite stays so."""
    rng = np.random.default_rng(0)
    layout = LAYOUTS["Q8_0"]
    plan = Plan.of(64, 256, 3, 1, layout, DEVICE)
    x = normal(rng, 3, 256, dtype=torch.float16)
    x[1] *= 0.0 if size == 2.0**-24 else 1.0
    x[1, 7], x[2] = size, 0.0
    arranged = torch.empty(plan.shapes(64, 256, layout)[0], dtype=torch.float16, device=DEVICE)
    units = torch.full((plan.padded,), float("nan"), device=DEVICE)
    run(launch_arrange(Input(x, x.stride(0), None, 0.0), arranged, None, units, None, plan, False))
    got = exact(arranged).reshape(8, plan.n, 32).transpose(1, 0, 2).reshape(plan.n, 8, 32)
    want = exact(x).reshape(3, 8, 32)[:, :, COLUMNS[32]]
    np.testing.assert_array_equal(got[:3] * exact(units)[:3, None, None], want)
    assert ((np.abs(got[:2]).max((1, 2), where=np.isfinite(got[:2]), initial=0.0)) >= 2.0**14).all()
    assert np.isfinite(exact(units)).all()


def test_every_block_is_in_one_split():
    for rows, columns, num_tokens in itertools.product((64, 6144, 28672), (256, 512, 1280, 4096), (3, 64)):
        plan = Plan.of(rows, columns, num_tokens, 1, LAYOUTS["Q4_K"], DEVICE)
        assert (plan.splits - 1) * plan.blocks < columns // 256 <= plan.splits * plan.blocks


def products(num_tokens, rows, columns, dtype, ending, seed=0, ggml_type="Q4_K"):
    """(arguments of a call with poison around every tensor, and the float64 result)."""
    rng = np.random.default_rng(seed)
    weight, _ = guarded_weight(random_weight(rng, ggml_type, rows, columns))
    x = guarded(normal(rng, num_tokens, columns, dtype=dtype))[0]
    options = {"out_dtype": torch.float32, "swiglu": "swiglu" in ending}
    entering = exact(x)
    if "bias" in ending:
        options["bias"] = guarded(normal(rng, rows))[0]
    if "residual" in ending:
        options["residual"] = guarded(normal(rng, num_tokens, rows, dtype=dtype))[0]
    if "norm" in ending:
        norm_weight = guarded(normal(rng, columns, scale=2.0**-6))[0]  # small: silu(gate) * up must fit float16
        options |= {"norm_weight": norm_weight, "eps": 1e-5}
        entering = reference.rms_norm(entering, exact(options["norm_weight"]), 1e-5)
        if "float32" not in ending:  # the normed x then has 11 bits
            options["out_dtype"] = dtype
    added = {name: exact(options[name]) for name in ("bias", "residual") if name in options}
    expected = reference.quantized_matmul(entering, weight.numpy(), **added, swiglu=options["swiglu"])
    return (x, weight), options, expected


def assert_served(x, weight, options):
    assert serves(Input(x, x.stride(0), options.get("norm_weight"), 0.0), weight)
    assert most_tokens(weight.layout, DEVICE)["fixed_point"] < x.shape[0] <= most_tokens(weight.layout, DEVICE)["wgmma"]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernel itself runs")
@pytest.mark.parametrize("ggml_type", QUANTISED)
@pytest.mark.parametrize(
    ("splits", "tile", "num_tokens", "late", "ending"),
    [
        (2, 64, 9, False, "norm and bias and residual to float32"),
        (2, 128, 40, True, "bias and swiglu"),
        (1, 64, 9, False, "norm and swiglu to float32"),
    ],
)
def test_product_in_numpy(ggml_type, splits, tile, num_tokens, late, ending):
    """The Gluon kernel's arithmetic on the CPU: one or several splits, one or two numbers per x."""
    rows, columns, parts = 140, 768, 2 if "norm" in ending else 1
    (x, weight), options, expected = products(num_tokens, rows, columns, torch.float16, ending, ggml_type=ggml_type)
    layout = LAYOUTS[ggml_type]
    with override("wgmma", SPLITS=splits, ROWS=tile, FLIGHT=1 + late, REGISTERS=255):
        plan = Plan.of(rows, columns, num_tokens, parts, layout, DEVICE)
    grid = (plan.tiles * -(-rows // tile), plan.splits)
    arranged_shape, sums_shape, partials_shape = plan.shapes(rows, columns, layout)
    arranged, sums = (torch.empty(shape, dtype=torch.float16) for shape in (arranged_shape, sums_shape))
    sums, units = sums if sums.numel() else None, torch.empty(plan.padded)
    partials, arrived = None, None
    if splits > 1:
        partials, arrived = torch.full(partials_shape, float("nan")), torch.full((grid[0],), 7, dtype=torch.int32)
    activations = Input(x, x.stride(0), options.get("norm_weight"), options.get("eps", 0.0))
    run(launch_arrange(activations, arranged, sums, units, arrived, plan, True))
    out = torch.full(expected.shape, float("nan"))
    added = [options.get(name) for name in ("bias", "residual")]
    run_wgmma(
        late,
        grid,
        Box(arranged.numpy(), min(256, 128 // layout.group * plan.n)),
        None if sums is None else Box(sums.numpy(), plan.n),
        pointer(units),
        Planes(*map(pointer, planes_of(weight))),
        Partials(pointer(partials), pointer(arrived)),
        Output(*map(pointer, added), rows, pointer(out)),
        rows,
        columns // 256,
        plan.blocks,
        num_tokens,
        plan.tiles,
        layout,
        *(tile, plan.n, parts, options["swiglu"], plan.flight),
        True,
        False,
    )
    assert np.linalg.norm(exact(out) - expected) <= 1e-5 * np.linalg.norm(expected)


def pointer(tensor):
    """A contiguous tensor as ``gluon_in_numpy`` takes it."""
    return None if tensor is None else Pointer(tensor.numpy().reshape(-1), DTYPES[str(tensor.dtype).split(".")[1]])


@pytest.mark.parametrize("ggml_type", [name for name in QUANTISED if LAYOUTS[name].quant_block == 256])
@pytest.mark.parametrize("byte", range(4))
def test_products_of_scales_and_values_are_exact(ggml_type, byte):
    """Of every code with every scale that the file format has, in the registers of one group."""
    layout, pairs = LAYOUTS[ggml_type], LAYOUTS[ggml_type].group // 8
    bits = {"Q2_K": 4, "Q6_K": 8}.get(ggml_type, 6)
    signed = layout.has_signed_scales
    scales = np.arange(1 << bits)[:, None] - (signed << (bits - 1))
    codes = np.arange(1 << layout.low_bits + layout.high_bits)
    low, high = codes % (1 << layout.low_bits), codes >> layout.low_bits
    words = [
        sum(one << n * i for i in range(32 // max(n, 1)))
        for one, n in ((low, layout.low_bits), (high, max(1, layout.high_bits)))
    ]
    shape = (16, *np.broadcast_shapes(scales.shape, codes.shape))
    word, high_word, scale = (np.broadcast_to(t, shape) for t in (*words, (scales + 128 * signed) << 8 * byte))
    scale = np.where(
        np.arange(16)[:, None, None] < 8, scale, scale[:, ::-1]
    )  # a lane's two rows have scales of their own
    shifts = np.zeros(shape, int)
    inputs = [word, word, high_word, shifts, shifts, scale]
    numbers = assembly(unpack_assembly(layout, False, byte), "", inputs, repeated(DTYPES["int32"], layout), True, 2)
    halves = np.stack(numbers).view(np.float16).reshape(-1, pairs, *shape, 2)
    got = halves.astype(float).sum(0) * unit_of(layout)
    values = np.array(layout.table)[codes] if layout.table else codes - layout.zero
    products = (scales * values)[..., None]
    assert (got[:, :8] == products).all()
    assert (got[:, 8:] == products[::-1]).all()


ENDINGS = (
    "plain",
    "bias",
    "bias and residual",
    "swiglu",
    "norm",
    "norm and bias and swiglu",
    "norm to float32",
    "norm and residual to float32",
)
TOKENS = (3, 8, 9, 16, 31, 64, 64, 33)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ggml_type", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(len(ENDINGS)))
def test_equals_float64(ggml_type, dtype, case):
    """Every type, dtype, ending and number of tokens; types differ in which number goes with which ending."""
    num_tokens, ending = TOKENS[(case + QUANTISED.index(ggml_type)) % len(TOKENS)], ENDINGS[case]
    rows, columns = (200, 1280) if num_tokens % 2 else (64, 256) if num_tokens == 8 else (322, 4096)
    args, options, expected = products(num_tokens, rows, columns, dtype, ending, num_tokens, ggml_type)
    assert_served(*args, options)
    got = exact(quantized_matmul(*args, **options))
    rounding = 1e-5 if options["out_dtype"] == torch.float32 else torch.finfo(dtype).eps
    assert np.linalg.norm(got - expected) <= rounding * np.linalg.norm(expected)
    each = np.linalg.norm(got - expected, axis=1)  # no token may be wrong behind the others
    assert (each <= 4 * rounding * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q6_K", "Q5_0"])
@pytest.mark.parametrize(
    ("splits", "rows_each", "flight", "registers"),
    [(1, 128, 1, 96), (2, 64, 2, 255), (3, 128, 2, 168), (8, 64, 4, 255)],
)
def test_any_tile(ggml_type, splits, rows_each, flight, registers):
    args, options, expected = products(17, 200, 1792, torch.bfloat16, "bias", ggml_type=ggml_type)
    with override("wgmma", SPLITS=splits, ROWS=rows_each, FLIGHT=flight, REGISTERS=registers):
        got = exact(quantized_matmul(*args, **options))
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("num_tokens", [5, 64])
def test_replays_give_the_same_bits_whatever_scratch_holds(num_tokens):
    (x, weight), options, _ = products(num_tokens, 200, 2048, torch.bfloat16, "norm and bias")
    first = quantized_matmul(x, weight, **options)
    for _ in range(3):
        poison = [torch.full((1 << k,), float("nan"), device=DEVICE) for k in range(10, 22)]
        del poison  # the next call's scratch is made of it
        assert_bit_equal(quantized_matmul(x, weight, **options), first)
    other = x.flip(0).contiguous()
    assert_bit_equal(quantized_matmul(other, weight, **options), first.flip(0))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("ending", ["plain", "norm"])
def test_what_is_not_finite_stays_with_its_token(bad, ending):
    (x, weight), options, _ = products(9, 100, 512, torch.float16, ending)
    clean = quantized_matmul(x, weight, **options)
    x[4, 77] = bad
    got = quantized_matmul(x, weight, **options)
    others = [t for t in range(9) if t != 4]
    assert_bit_equal(got[others], clean[others])
    assert not torch.isfinite(got[4]).any()


@pytest.mark.gpu
@on_hopper
def test_sums_that_overflow_float16_do_not_overflow():
    (x, weight), options, _ = products(8, 64, 256, torch.float16, "plain")
    x.fill_(60000.0)
    expected = reference.quantized_matmul(exact(x), weight.numpy())
    got = exact(quantized_matmul(x, weight, **options))
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-5 * np.linalg.norm(exact(x))


@pytest.mark.gpu
@on_hopper
def test_takes_the_scratch_it_states():
    (x, weight), options, _ = products(33, 4096, 4096, torch.bfloat16, "plain")
    quantized_matmul(x, weight, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = quantized_matmul(x, weight, **options)
    taken = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    stated = scratch_bytes(*weight.shape, x.shape[0], 1, weight.layout, DEVICE)
    assert stated <= taken <= stated + 4 * 512  # allocations are multiples of 512 bytes
