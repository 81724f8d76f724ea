"""Writing, gathering and copying K/V pages against the definition, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import copy_pages, gather_kv, reference, use_backend, write_kv
from rooflama.kernels.paged_cache import _gather_kv_kernel
from rooflama.kernels.paged_common import paged_kv
from rooflama.kernels.reference.paged_cache import quantize, round_to_e4m3
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.paged import LIMITS, poisoned_pages, ragged_table, random_slots, slots_of
from rooflama.testing.strategies import DEVICE, beyond_int32, dtypes, exact, guarded, normal, seeds

page_sizes = st.sampled_from([16, 32, 64, 128, 256])
head_dims = st.sampled_from([1, 16, 64, 80, 96, 128, 256])
kv_heads = st.integers(1, 5)
code_dtypes = st.sampled_from(list(LIMITS))


@given(
    seq_lens=st.lists(st.integers(0, 40), min_size=1, max_size=3), page_size=page_sizes, num_kv_heads=kv_heads,
    head_dim=head_dims, dtype=dtypes, seed=seeds,
)  # fmt: skip
@example(seq_lens=[33, 0, 16], page_size=16, num_kv_heads=3, head_dim=80, dtype=torch.float16, seed=0)
def test_gather_returns_what_was_written(seq_lens, page_size, num_kv_heads, head_dim, dtype, seed):
    """Bit for bit, at any placement of the pages; every other slot keeps its poison, and the guards hold."""
    rng = np.random.default_rng(seed)
    num_keys, num_pages = sum(seq_lens), sum(-(-n // page_size) for n in seq_lens) + 2
    k, v = (guarded(normal(rng, num_keys, num_kv_heads, head_dim, dtype=dtype))[0] for _ in range(2))
    poison = torch.full((num_pages, page_size, num_kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    (k_pages, k_buffer), (v_pages, v_buffer) = guarded(poison), guarded(poison)
    table, lengths = ragged_table(rng, seq_lens, page_size, num_pages)
    slots = slots_of(table, lengths, page_size)
    write_kv(k, v, k_pages, v_pages, slots)
    context = f"{seq_lens=} {page_size=} {num_kv_heads=} {head_dim=} {dtype} {seed=}"
    for x, pages, buffer in ((k, k_pages, k_buffer), (v, v_pages, v_buffer)):
        assert_bit_equal(gather_kv(pages, table, lengths, num_keys=num_keys), x, context=context)
        written = torch.zeros(num_pages * page_size, dtype=torch.bool, device=DEVICE)
        written[slots] = True
        assert bool(pages.flatten(0, 1)[~written].isnan().all()), context
        assert_guards_intact(buffer, context=context)


@given(
    num_tokens=st.integers(0, 5), page_size=page_sizes, num_kv_heads=kv_heads, head_dim=head_dims, dtype=dtypes,
    page_dtype=code_dtypes, exponent=st.integers(-30, 30), seed=seeds,
)  # fmt: skip
@example(
    num_tokens=3, page_size=256, num_kv_heads=9, head_dim=128, dtype=torch.float32, page_dtype=torch.int8, exponent=0,
    seed=0,
)  # fmt: skip
def test_codes_and_scales_equal_definition(
    num_tokens, page_size, num_kv_heads, head_dim, dtype, page_dtype, exponent, seed
):
    """Bit for bit: both divide in float32, correctly rounded. The guards hold."""
    rng = np.random.default_rng(seed)
    exponent = exponent if dtype != torch.float16 else exponent / 3
    k, v = (normal(rng, num_tokens, num_kv_heads, head_dim, dtype=dtype, scale=2.0**exponent) for _ in range(2))
    slots = random_slots(rng, num_tokens, 3 * page_size)
    expected = poisoned_pages((3, page_size, num_kv_heads, head_dim), page_dtype)
    pages, buffers = zip(*map(guarded, expected), strict=True)
    write_kv(k, v, *pages[:2], slots, *pages[2:])
    with use_backend("numpy"):
        write_kv(k, v, *expected[:2], slots, *expected[2:])
    context = f"{num_tokens=} {page_size=} {head_dim=} {dtype} {page_dtype} {seed=}"
    for got, want, buffer in zip(pages, expected, buffers, strict=True):
        assert_bit_equal(got.float(), want.float(), context=context)
        assert_guards_intact(buffer if buffer.dtype == torch.int8 else buffer.float(), context=context)


@pytest.mark.parametrize("page_dtype", [torch.float32, *LIMITS])
@pytest.mark.parametrize("slots", [[0], [47], [0, -1, 15, 16, 47]])
def test_the_first_and_last_slot_and_page_are_written(slots, page_dtype):
    """Of three pages of 16; a value comes back from the slot that was named, and no other slot changes."""
    k = torch.arange(1, len(slots) * 6 + 1, device=DEVICE).view(len(slots), 3, 2).float()
    pages, untouched = (poisoned_pages((3, 16, 3, 2), page_dtype) for _ in range(2))
    write_kv(k, -k, *pages[:2], torch.tensor(slots, device=DEVICE), *pages[2:])
    named = [slot for slot in slots if slot >= 0]
    others = [slot for slot in range(48) if slot not in named]
    for got, poison in zip(pages, untouched, strict=True):
        if got is not None:
            assert_bit_equal(got.float().flatten(0, 1)[others], poison.float().flatten(0, 1)[others])
    for got, scale, want in zip(pages[:2], pages[2:], (k, -k), strict=True):
        values = got.float() if scale is None else got.float() * scale[..., None]
        want = want[[slot >= 0 for slot in slots]]
        torch.testing.assert_close(values.flatten(0, 1)[named], want, rtol=0.07, atol=0.0)


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
        assert_bit_equal(pages[0][0, 0].float(), want[0].float(), signed_zeros=False, context=str(page_dtype))


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


@pytest.mark.parametrize("page_dtype", [torch.float32, *LIMITS])
def test_the_same_call_gives_the_same_bits(page_dtype):
    rng = np.random.default_rng(0)
    k, v = normal(rng, 27, 3, 80), normal(rng, 27, 3, 80)
    table, lengths = ragged_table(rng, [20, 7], 16, 4)
    results = []
    for _ in range(2):
        pages = poisoned_pages((5, 16, 3, 80), page_dtype)
        write_kv(k, v, *pages[:2], slots_of(table, lengths, 16), *pages[2:])
        gathered = gather_kv(pages[0], table, lengths, pages[2], num_keys=27)
        copy_pages(pages[1], table[0, :1], torch.tensor([4], dtype=torch.int32, device=DEVICE))
        results.append([gathered, *(t.float() for t in pages if t is not None)])
    for one, other in zip(*results, strict=True):
        assert_bit_equal(one, other)


@given(
    num_tokens=st.integers(1, 6), page_size=page_sizes, page_dtype=st.sampled_from([None, *LIMITS]), dtype=dtypes,
    seed=seeds,
)  # fmt: skip
def test_a_slot_depends_on_its_token_alone(num_tokens, page_size, page_dtype, dtype, seed):
    """Tokens in another order, with their slots, write the same pages; negative slots write nothing."""
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, num_tokens, 2, 64, dtype=dtype) for _ in range(2))
    slots = random_slots(rng, num_tokens, 3 * page_size)
    slots[torch.from_numpy(rng.random(num_tokens) < 0.3).to(DEVICE)] = -1
    shape = (3, page_size, 2, 64)
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


@given(
    seq_lens=st.lists(st.integers(0, 40) | st.integers(0, 300), min_size=1, max_size=3), page_size=page_sizes,
    page_dtype=code_dtypes, dtype=dtypes, seed=seeds,
)  # fmt: skip
@example(seq_lens=[300, 0, 256], page_size=256, page_dtype=torch.int8, dtype=torch.float32, seed=0)
def test_gather_of_codes_equals_definition(seq_lens, page_size, page_dtype, dtype, seed):
    rng = np.random.default_rng(seed)
    num_pages = sum(-(-n // page_size) for n in seq_lens) + 2
    table, lengths = ragged_table(rng, seq_lens, page_size, num_pages)
    shape = (num_pages, page_size, 3, 20)
    codes, scale = quantize(rng.standard_normal(shape), page_dtype == torch.int8)
    pages, _ = guarded(torch.from_numpy(codes).to(page_dtype).to(DEVICE))
    scale_tensor, _ = guarded(torch.from_numpy(scale).to(DEVICE))
    got = gather_kv(pages, table, lengths, scale_tensor, num_keys=sum(seq_lens), dtype=dtype)
    exact_codes, tables = codes.astype(np.float64), (table.cpu().numpy(), lengths.cpu().numpy())
    want = reference.gather_kv(exact_codes, *tables, scale, num_keys=sum(seq_lens))
    assert_bit_equal(got, torch.from_numpy(want).float().to(DEVICE, dtype), context=f"{seq_lens=} {page_size=} {seed=}")


@pytest.mark.parametrize("num_keys", [1, 20, 21, 26, 31])
def test_gather_writes_no_more_keys_than_asked_for(monkeypatch, num_keys):
    """Nothing past the end of out, whatever the lengths: on a GPU the host cannot compare them with num_keys."""
    rng = np.random.default_rng(0)
    pages = normal(rng, 6, 16, 2, 8)
    table, lengths = ragged_table(rng, [20, 7, 5], 16, 6)
    every = gather_kv(pages, table, lengths, num_keys=32)
    out, buffer = guarded(torch.full((num_keys, 2, 8), torch.nan, device=DEVICE))
    _gather_kv_kernel[(table.shape[1], 3)](
        paged_kv(pages, None, None, None), table, table.stride(0), lengths, out, num_keys,
        HEAD_DIM=8, BLOCK_ROWS=8, BLOCK_SEQS=1,
    )  # fmt: skip
    assert_bit_equal(out, every[:num_keys])
    assert_guards_intact(buffer)
    monkeypatch.setattr("rooflama.kernels.paged_cache.check", lambda *_: None)  # which compares them on the CPU
    assert_bit_equal(gather_kv(pages, table, lengths, num_keys=num_keys), every[:num_keys])
    assert_bit_equal(gather_kv(pages, table, lengths, num_keys=32 + num_keys)[:32], every)


def test_gather_after_more_than_int32_keys():
    """Sequences so long that ``out`` ends within the first: the last one writes nothing, and nothing elsewhere."""
    pages = normal(np.random.default_rng(0), 6, 16, 2, 8)
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(3, 2)
    lengths = torch.tensor([2**30, 2**30, 20], dtype=torch.int32, device=DEVICE)
    out, buffer = guarded(torch.full((20, 2, 8), torch.nan, device=DEVICE))
    _gather_kv_kernel[(2, 3)](
        paged_kv(pages, None, None, None), table, table.stride(0), lengths, out, 20,
        HEAD_DIM=8, BLOCK_ROWS=8, BLOCK_SEQS=4,
    )  # fmt: skip
    assert_bit_equal(out, pages[:2].flatten(0, 1)[:20])
    assert_guards_intact(buffer)


@given(
    num_pages=st.integers(2, 8), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, *LIMITS]),
    seed=seeds,
)  # fmt: skip
@example(num_pages=4, dtype=torch.float8_e4m3fn, seed=0)
@example(num_pages=4, dtype=torch.bfloat16, seed=0)
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


@pytest.mark.parametrize("backend", ["triton", "numpy"])
@pytest.mark.parametrize("page_dtype", [torch.float32, *LIMITS])
def test_a_pool_without_pages(page_dtype, backend):
    pages = poisoned_pages((0, 16, 3, 16), page_dtype)
    k = torch.zeros(2, 3, 16, device=DEVICE)
    table, lengths = torch.zeros(2, 1, device=DEVICE).int(), torch.zeros(2, device=DEVICE).int()
    with use_backend(backend):
        write_kv(k, k, *pages[:2], torch.tensor([-1, -1], device=DEVICE), *pages[2:])
        copy_pages(pages[0], lengths[:0], lengths[:0])
        assert gather_kv(pages[0], table, lengths, pages[2], num_keys=0).shape == (0, 3, 16)


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
