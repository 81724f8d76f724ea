"""Writing, gathering and copying K/V pages against the definition, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from assertions import assert_bit_equal, assert_guards_intact
from rooflama.kernels import KernelInputError, copy_pages, gather_kv, reference, use_backend, write_kv
from rooflama.kernels.reference.paged_cache import quantize, round_to_e4m3
from strategies import DEVICE, beyond_int32, dtypes, exact, guarded, normal, seeds

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}
page_sizes = st.sampled_from([16, 32, 64])
head_dims = st.sampled_from([1, 16, 64, 80, 96, 128, 256])
kv_heads = st.integers(1, 5)
code_dtypes = st.sampled_from(list(LIMITS))


def poisoned_pages(shape, dtype):
    """k_pages, v_pages, k_scale, v_scale of NaN (int8: -128, which no writer stores); no scales for float pages."""
    poison = -128 if dtype == torch.int8 else float("nan")
    pages = [torch.full(shape, poison, device=DEVICE).to(dtype) for _ in range(2)]
    return pages + [torch.full(shape[:3], float("nan"), device=DEVICE) if dtype in LIMITS else None for _ in range(2)]


def random_slots(rng, num_tokens, num_slots):
    return torch.from_numpy(rng.permutation(num_slots)[:num_tokens]).to(DEVICE)


def ragged_table(rng, seq_lens, page_size, num_pages):
    """A block table of distinct random pages; columns past a sequence's end name page 2^30."""
    pages = iter(rng.permutation(num_pages))
    columns = max([-(-n // page_size) for n in seq_lens], default=0) + 1
    table = np.full((len(seq_lens), columns), 2**30, np.int32)
    for row, length in zip(table, seq_lens, strict=True):
        for column in range(-(-length // page_size)):
            row[column] = next(pages)
    return torch.from_numpy(table).to(DEVICE), torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)


def slots_of(table, seq_lens, page_size):
    """The slots of all keys, one sequence after the other."""
    return torch.cat(
        [
            row[torch.arange(n, device=DEVICE) // page_size].long() * page_size
            + torch.arange(n, device=DEVICE) % page_size
            for row, n in zip(table, seq_lens.tolist(), strict=True)
        ]
    )


@given(
    seq_lens=st.lists(st.integers(0, 40), min_size=1, max_size=3), page_size=page_sizes, num_kv_heads=kv_heads,
    head_dim=head_dims, dtype=dtypes, seed=seeds,
)  # fmt: skip
@example(seq_lens=[33, 0, 16], page_size=16, num_kv_heads=3, head_dim=80, dtype=torch.float16, seed=0)
def test_gather_returns_what_was_written(seq_lens, page_size, num_kv_heads, head_dim, dtype, seed):
    """Bit for bit, at any placement of the pages; every other slot keeps its poison, and the guards hold."""
    rng = np.random.default_rng(seed)
    num_keys = sum(seq_lens)
    k, v = (guarded(normal(rng, num_keys, num_kv_heads, head_dim, dtype=dtype))[0] for _ in range(2))
    poison = torch.full((12, page_size, num_kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    (k_pages, k_buffer), (v_pages, v_buffer) = guarded(poison), guarded(poison)
    table, lengths = ragged_table(rng, seq_lens, page_size, 12)
    slots = slots_of(table, lengths, page_size)
    write_kv(k, v, k_pages, v_pages, slots)
    context = f"{seq_lens=} {page_size=} {num_kv_heads=} {head_dim=} {dtype} {seed=}"
    for x, pages, buffer in ((k, k_pages, k_buffer), (v, v_pages, v_buffer)):
        assert_bit_equal(gather_kv(pages, table, lengths, num_keys=num_keys), x, context=context)
        written = torch.zeros(12 * page_size, dtype=torch.bool, device=DEVICE)
        written[slots] = True
        assert bool(pages.flatten(0, 1)[~written].isnan().all()), context
        assert_guards_intact(buffer, context=context)


@given(
    num_tokens=st.integers(0, 5), num_kv_heads=kv_heads, head_dim=head_dims, dtype=dtypes, page_dtype=code_dtypes,
    exponent=st.integers(-30, 30), seed=seeds,
)  # fmt: skip
@example(num_tokens=3, num_kv_heads=9, head_dim=128, dtype=torch.float32, page_dtype=torch.int8, exponent=0, seed=0)
def test_codes_and_scales_equal_definition(num_tokens, num_kv_heads, head_dim, dtype, page_dtype, exponent, seed):
    """Bit for bit: both divide in float32, correctly rounded."""
    rng = np.random.default_rng(seed)
    exponent = exponent if dtype != torch.float16 else exponent / 3
    k, v = (normal(rng, num_tokens, num_kv_heads, head_dim, dtype=dtype, scale=2.0**exponent) for _ in range(2))
    slots = random_slots(rng, num_tokens, 48)
    pages = poisoned_pages((3, 16, num_kv_heads, head_dim), page_dtype)
    expected = poisoned_pages((3, 16, num_kv_heads, head_dim), page_dtype)
    write_kv(k, v, *pages[:2], slots, *pages[2:])
    with use_backend("numpy"):
        write_kv(k, v, *expected[:2], slots, *expected[2:])
    for got, want in zip(pages, expected, strict=True):
        assert_bit_equal(got.float(), want.float(), context=f"{num_tokens=} {head_dim=} {dtype} {page_dtype} {seed=}")


@given(num_tokens=st.integers(1, 5), head_dim=head_dims, dtype=dtypes, page_dtype=code_dtypes, seed=seeds)
def test_a_quantised_value_is_within_half_a_step(num_tokens, head_dim, dtype, page_dtype, seed):
    """int8: half a scale. e4m3: a 16th of the value, or half the smallest step, 2^-9 scales."""
    rng = np.random.default_rng(seed)
    k = normal(rng, num_tokens, 2, head_dim, dtype=dtype, scale=10 ** rng.uniform(-2, 2))
    pages = poisoned_pages((1, 16, 2, head_dim), page_dtype)
    table, lengths = ragged_table(rng, [num_tokens], 16, 1)
    write_kv(k, k, *pages[:2], slots_of(table, lengths, 16), *pages[2:])
    got = gather_kv(pages[0], table, lengths, pages[2], num_keys=num_tokens)
    assert got.dtype == torch.float32
    scale = exact(pages[2][0, :num_tokens])[..., None]
    step = scale if page_dtype == torch.int8 else np.maximum(np.abs(exact(k)) / 8, scale * 2.0**-9)
    error = np.abs(exact(got) - exact(k))
    assert (error <= step * (0.5 + 1e-5)).all(), f"{(error / step).max()} steps; {head_dim=} {dtype} {seed=}"
    largest = np.abs(exact(k)).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale * LIMITS[page_dtype], largest, rtol=1e-6)


def test_definition_of_e4m3_equals_torch():
    """Every float16 up to 448, which holds every e4m3 number and every tie between two; then random float32."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.abs(halves) <= 448]
    rng = np.random.default_rng(0)
    randoms = (np.exp2(rng.uniform(-14, 8.8, 100_000)) * rng.choice([-1, 1], 100_000)).astype(np.float32)
    for x in (halves, randoms):
        want = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_array_equal(round_to_e4m3(x), want)
        np.testing.assert_array_equal(round_to_e4m3(x.astype(np.float64)), want)


def test_kernel_rounds_every_tie_to_even():
    """Each row holds 448, so that its scale is 1, and e4m3 numbers and ties; int8 the same with 127."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().double()
    for page_dtype, numbers in ((torch.float8_e4m3fn, codes), (torch.int8, torch.arange(128).double())):
        ties = (numbers[:-1] + numbers[1:]) / 2
        x = torch.cat([numbers, ties])[None, None].to(DEVICE, torch.float32)
        x = torch.cat([x, -x], dim=1)  # [1 token, 2 heads]
        pages = poisoned_pages((1, 16, 2, x.shape[2]), page_dtype)
        write_kv(x, x, *pages[:2], torch.zeros(1, dtype=torch.int64, device=DEVICE), *pages[2:])
        assert pages[2][0, 0].tolist() == [1.0, 1.0]
        want = x.to(page_dtype) if page_dtype != torch.int8 else x.round()  # torch rounds halves to even
        assert_bit_equal(pages[0][0, 0].float(), want[0].float(), context=str(page_dtype))


@pytest.mark.parametrize("backend", ["triton", "numpy"])
@pytest.mark.parametrize("page_dtype", LIMITS)
def test_rows_of_zeros_tiny_values_and_infinities(page_dtype, backend):
    """Zeros stay zeros, denormals stay small, and what is not finite comes back as NaN."""
    k = torch.zeros(1, 5, 16, device=DEVICE)
    k[0, 1] = torch.linspace(-5e-44, 5e-44, 16)  # the scale rounds to 0
    k[0, 2] = torch.linspace(-1e-38, 1e-38, 16)
    k[0, 3, 7] = float("inf")
    k[0, 4, 7] = float("nan")
    pages = poisoned_pages((1, 16, 5, 16), page_dtype)
    table, lengths = (
        torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        torch.ones(1, dtype=torch.int32, device=DEVICE),
    )
    with use_backend(backend):
        write_kv(k, k, *pages[:2], torch.zeros(1, dtype=torch.int64, device=DEVICE), *pages[2:])
        got = gather_kv(pages[0], table, lengths, pages[2], num_keys=1)[0]
    assert not pages[0][0, 0, :2].float().any()  # codes
    assert not got[0].any()
    assert bool((got[1] - k[0, 1]).abs().max() <= 5e-44)
    assert bool((got[2] - k[0, 2]).abs().max() <= 1e-39)
    assert bool(got[3:].isnan().all())


@given(num_tokens=st.integers(1, 6), page_dtype=st.sampled_from([None, *LIMITS]), dtype=dtypes, seed=seeds)
def test_a_slot_depends_on_its_token_alone(num_tokens, page_dtype, dtype, seed):
    """Tokens in another order, with their slots, write the same pages; negative slots write nothing."""
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, num_tokens, 2, 64, dtype=dtype) for _ in range(2))
    slots = random_slots(rng, num_tokens, 48)
    slots[torch.from_numpy(rng.random(num_tokens) < 0.3).to(DEVICE)] = -1
    shape = (3, 16, 2, 64)
    order = torch.from_numpy(rng.permutation(num_tokens)).to(DEVICE)
    kept = slots >= 0
    results = []
    for tokens in (torch.arange(num_tokens, device=DEVICE), order, kept.nonzero()[:, 0]):
        pages = poisoned_pages(shape, page_dtype or dtype)
        write_kv(k[tokens], v[tokens], *pages[:2], slots[tokens], *pages[2:])
        results.append([t.float() for t in pages if t is not None])
    for first, second, third in zip(*results, strict=True):
        assert_bit_equal(first, second)
        assert_bit_equal(first, third)


def test_write_rounds_to_the_dtype_of_the_pages():
    x = normal(np.random.default_rng(0), 2, 1, 64)
    k_pages, v_pages, *_ = poisoned_pages((1, 16, 1, 64), torch.float16)
    write_kv(x, x, k_pages, v_pages, torch.tensor([3, 4], device=DEVICE))
    assert_bit_equal(k_pages[0, 3:5], x.half())


@given(seq_lens=st.lists(st.integers(0, 40), min_size=1, max_size=3), page_dtype=code_dtypes, dtype=dtypes, seed=seeds)
def test_gather_of_codes_equals_definition(seq_lens, page_dtype, dtype, seed):
    rng = np.random.default_rng(seed)
    table, lengths = ragged_table(rng, seq_lens, 16, 12)
    shape = (12, 16, 3, 80)
    codes, scale = quantize(rng.standard_normal(shape), page_dtype == torch.int8)
    pages = torch.from_numpy(codes).to(page_dtype).to(DEVICE)
    scale_tensor = torch.from_numpy(scale).to(DEVICE)
    got = gather_kv(pages, table, lengths, scale_tensor, num_keys=sum(seq_lens), dtype=dtype)
    want = reference.gather_kv(codes.astype(np.float64), table.cpu().numpy(), lengths.cpu().numpy(), scale)
    assert_bit_equal(got, torch.from_numpy(want).float().to(DEVICE, dtype), context=f"{seq_lens=} {seed=}")


@given(num_pages=st.integers(2, 8), dtype=st.sampled_from([torch.float32, torch.float16, *LIMITS]), seed=seeds)
@example(num_pages=4, dtype=torch.float8_e4m3fn, seed=0)
def test_copy_pages(num_pages, dtype, seed):
    """Targets get the sources' bits, the other pages keep theirs, the guards hold."""
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(num_pages)).to(DEVICE)
    count = int(rng.integers(0, num_pages // 2 + 1))
    source, target = order[:count], order[count : 2 * count]
    source = source[torch.from_numpy(rng.integers(0, count, count)).to(DEVICE)] if count else source
    bits, buffer = guarded(
        torch.from_numpy(rng.integers(-128, 128, (num_pages, 16, 3, 20 * dtype.itemsize), np.int8)).to(DEVICE)
    )
    want = bits.clone()
    want[target] = want[source]
    copy_pages(bits.view(dtype), source, target)
    assert_bit_equal(bits, want, context=f"{num_pages=} {dtype} {seed=}")
    assert_guards_intact(buffer)


def test_copy_of_pages_that_lie_apart():
    """One layer of a pool that holds several, and scales."""
    pool = normal(np.random.default_rng(0), 5, 2, 16, 3, 64)
    want = pool.clone()
    want[4, 1] = want[0, 1]
    copy_pages(pool[:, 1], torch.tensor([0], device=DEVICE), torch.tensor([4], device=DEVICE))
    assert_bit_equal(pool, want)


def test_pages_that_lie_apart():
    """Write and gather in one layer of a pool that holds several; the other layer keeps its poison."""
    rng = np.random.default_rng(0)
    k_pool, v_pool = (torch.full((4, 2, 16, 3, 64), torch.nan, device=DEVICE) for _ in range(2))
    table, lengths = ragged_table(rng, [20, 7], 16, 4)
    k, v = normal(rng, 27, 3, 64), normal(rng, 27, 3, 64)
    write_kv(k, v, k_pool[:, 1], v_pool[:, 1], slots_of(table, lengths, 16))
    assert_bit_equal(gather_kv(v_pool[:, 1], table, lengths, num_keys=27), v)
    assert bool(k_pool[:, 0].isnan().all())


@pytest.mark.usefixtures("numpy_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_numpy_route_serves_dtypes_that_numpy_lacks(dtype):
    rng = np.random.default_rng(0)
    k = normal(rng, 20, 3, 64, dtype=torch.bfloat16)
    pages = poisoned_pages((4, 16, 3, 64), dtype)
    table, lengths = ragged_table(rng, [13, 7], 16, 4)
    write_kv(k, k, *pages[:2], slots_of(table, lengths, 16), *pages[2:])
    got = gather_kv(pages[1], table, lengths, pages[3], num_keys=20)
    if dtype == torch.bfloat16:
        assert_bit_equal(got, k)
    else:
        torch.testing.assert_close(got, k.float(), rtol=2.0**-4 + 1e-6, atol=1e-4)


def test_offsets_beyond_int32():
    """Pages and tokens whose offsets pass 2^31."""
    rng = np.random.default_rng(0)
    k, v = normal(rng, 3, 3, 64, dtype=torch.float16), normal(rng, 3, 3, 64, dtype=torch.float16)
    slots = torch.tensor([5, 16 + 5, 32 + 5], device=DEVICE)
    k_pages, v_pages = (beyond_int32(torch.zeros(3, 16, 3, 64, dtype=torch.float16, device=DEVICE)) for _ in range(2))
    write_kv(beyond_int32(k), beyond_int32(v), k_pages, v_pages, slots)
    assert_bit_equal(k_pages[:, 5], k)
    table, length = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([[2]], [6]))
    assert_bit_equal(gather_kv(v_pages, table, length, num_keys=6)[5], v[2])
    two, zero = table[0], torch.zeros_like(length)
    copy_pages(k_pages, two, zero)
    assert_bit_equal(k_pages[0, 5], k[2])
    copy_pages(v_pages, zero, two)
    assert_bit_equal(v_pages[2, 5], v[0])


def test_scales_beyond_int32():
    """The pages all lie in one place, so that only the scales are many."""
    num_pages = 2**31 // (16 * 4) + 2
    pages = torch.zeros(1, 16, 4, 16, dtype=torch.int8, device=DEVICE).expand(num_pages, -1, -1, -1)
    scale = beyond_int32(torch.zeros(3, 128, device=DEVICE)).as_strided((num_pages, 16, 4), (64, 4, 1))
    k = normal(np.random.default_rng(0), 1, 4, 16)
    slot = torch.tensor([(num_pages - 1) * 16 + 3], device=DEVICE)
    write_kv(k, k, pages, pages, slot, scale, scale)
    np.testing.assert_allclose(exact(scale[-1, 3]) * 127, np.abs(exact(k[0])).max(axis=-1), rtol=1e-6)
    table, length = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([[num_pages - 1]], [4]))
    got = gather_kv(pages, table, length, scale, num_keys=4)
    np.testing.assert_allclose(exact(got[3]), exact(k[0]), atol=exact(scale[-1, 3]).max())


def test_opcheck():
    k = torch.randn(2, 3, 16, device=DEVICE)
    pages = [torch.nan_to_num(t) for t in poisoned_pages((3, 16, 3, 16), torch.int8)]  # opcheck compares with ==
    slots = torch.tensor([4, 20], device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.write_kv, (k, k.clone(), *pages[:2], slots, *pages[2:]))
    table, lengths = (
        torch.zeros(1, 2, dtype=torch.int32, device=DEVICE),
        torch.ones(1, dtype=torch.int32, device=DEVICE),
    )
    torch.library.opcheck(torch.ops.rooflama.gather_kv, (pages[0], table, lengths, pages[2]), {"num_keys": 1})
    torch.library.opcheck(torch.ops.rooflama.copy_pages, (pages[0], slots[:1] * 0, slots[:1] * 0 + 1))


def test_compiles_into_one_graph():
    k = torch.randn(2, 3, 16, device=DEVICE)
    slots = torch.tensor([4, 20], device=DEVICE)
    table, lengths = torch.tensor([[0]], device=DEVICE).int(), torch.tensor([5], device=DEVICE).int()

    def step(k_pages, v_pages):
        write_kv(k, k + 1, k_pages, v_pages, slots)
        copy_pages(k_pages, slots[:1] * 0, slots[:1] * 0 + 2)
        return gather_kv(v_pages, table, lengths, num_keys=5)

    eager, compiled = poisoned_pages((3, 16, 3, 16), torch.float32), poisoned_pages((3, 16, 3, 16), torch.float32)
    assert_bit_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled[:2]), step(*eager[:2]))
    assert_bit_equal(compiled[0], eager[0])
    assert_bit_equal(compiled[0][2], compiled[0][0])


ZEROS = torch.zeros(2, 3, 16, device=DEVICE)
PAGES = torch.zeros(4, 16, 3, 16, device=DEVICE)
SLOTS = torch.zeros(2, dtype=torch.int64, device=DEVICE)
SCALES = torch.zeros(4, 16, 3, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS.int()), "slot_mapping must be one of int64"),
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS[:1]), r"slot_mapping must have shape \[2\]"),
        ((ZEROS, ZEROS[:, :2], PAGES, PAGES, SLOTS), r"v must have shape \[2, 3, 16\]"),
        ((ZEROS, ZEROS.half(), PAGES, PAGES, SLOTS), "v must be one of float32"),
        ((ZEROS, ZEROS, PAGES, PAGES.half(), SLOTS), "v_pages must be one of float32"),
        ((ZEROS, ZEROS, PAGES.double(), PAGES.double(), SLOTS), "k_pages is torch.float64"),
        ((ZEROS, ZEROS, PAGES[:, :12], PAGES[:, :12], SLOTS), "page_size is 12"),
        ((ZEROS, ZEROS, PAGES, PAGES.mT.contiguous().mT, SLOTS), "last dimension of v_pages must be contiguous"),
        ((ZEROS, ZEROS, PAGES, torch.zeros(4, 2, 16, 3, 16, device=DEVICE)[:, 0], SLOTS), "must be laid out alike"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS), "int8 and float8 pages come with scales"),
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS, SCALES, SCALES), "float pages without"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS, SCALES, SCALES.half()), "v_scale is torch.float16"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS, SCALES[:3], SCALES), "k_scale must have shape"),
    ],
)
def test_bad_write_is_refused_before_a_launch(arguments, message):
    with pytest.raises(KernelInputError, match=message):
        write_kv(*arguments)


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        (torch.zeros(1, 2), torch.ones(1).int(), "block_table must be one of int32"),
        (torch.zeros(1, 2).int(), torch.ones(2).int(), r"seq_lens must have shape \[1\]"),
        (torch.zeros(1, 2).int(), torch.ones(1), "seq_lens must be one of int32"),
    ],
)
def test_bad_gather_is_refused_before_a_launch(table, lengths, message):
    with pytest.raises(KernelInputError, match=message):
        gather_kv(PAGES.to(DEVICE), table.to(DEVICE), lengths.to(DEVICE), num_keys=1)


def test_codes_without_scales_are_not_gathered():
    table, one = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelInputError, match=r"^scale is None with torch\.int8 pages"):
        gather_kv(PAGES.char(), table, one, num_keys=1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's indices are not read back for a check")
def test_indices_out_of_range_are_refused():
    table, one = torch.zeros(1, 2).int(), torch.ones(1).int()
    with pytest.raises(KernelInputError, match="slots are numbered 0 to 63"):
        write_kv(ZEROS, ZEROS, PAGES, PAGES, torch.tensor([0, 64]))
    with pytest.raises(KernelInputError, match="pages are numbered 0 to 3"):
        gather_kv(PAGES, table + 4, one, num_keys=1)
    with pytest.raises(KernelInputError, match="a sequence has 0 to 32 keys"):
        gather_kv(PAGES, table, one * 33, num_keys=33)
    with pytest.raises(KernelInputError, match="the sum of seq_lens is 1"):
        gather_kv(PAGES, table, one, num_keys=2)
    for source, target, message in (
        ([4], [0], "pages are numbered"),
        ([0, 1], [2, 2], "written once"),
        ([0], [0], "both"),
    ):
        with pytest.raises(KernelInputError, match=message):
            copy_pages(PAGES, torch.tensor(source), torch.tensor(target))


def test_pages_to_copy_are_contiguous():
    with pytest.raises(KernelInputError, match="each page is contiguous"):
        copy_pages(PAGES.to(DEVICE)[:, :, :, :8], SLOTS.to(DEVICE), SLOTS.to(DEVICE) + 1)
