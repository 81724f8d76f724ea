"""rooflama.attention: dense tensors against the NumPy definition of the paged kernels, and causality."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rooflama
from rooflama.integrations.dense import PAGE_SIZE, as_pages
from rooflama.kernels import KernelInputError, reference
from rooflama.testing.assertions import assert_bit_equal, assert_within_rounding
from rooflama.testing.attention import score_span, units
from rooflama.testing.strategies import DEVICE, dtypes, exact, normal, seeds


def defined(q, k, v, *, causal=True, **options):
    """The definition, where each sequence is one page; without ``causal``, each query is a sequence of its own."""
    batch, heads, queries, dim = q.shape
    pages = [x.transpose(0, 2, 1, 3) for x in (k, v)]
    rows = q.transpose(0, 2, 1, 3).reshape(-1, heads, dim)
    per_sequence = queries if causal else 1
    owners = np.repeat(np.arange(batch), queries // per_sequence)
    starts = np.arange(len(owners) + 1) * per_sequence
    lens = np.full(len(owners), k.shape[2])
    out, _ = reference.attention_prefill(rows, *pages, owners[:, None], lens, starts, **options)
    return out.reshape(batch, queries, heads, dim).transpose(0, 2, 1, 3)


@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 12),
    context=st.integers(0, 140),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([8, 10, 64]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 20]),
    softcap=st.sampled_from([0.0, 5.0]),
    heads_first=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_attention_equals_definition(
    batch, queries, context, kv_heads, group, head_dim, causal, window, softcap, heads_first, dtype, seed
):
    rng = np.random.default_rng(seed)

    def dense(heads, tokens):
        if heads_first:
            return normal(rng, batch, heads, tokens, head_dim, dtype=dtype)
        return normal(rng, batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)

    q, k, v = dense(kv_heads * group, queries), dense(kv_heads, context + queries), dense(kv_heads, context + queries)
    options = {"causal": causal, "sliding_window": window if causal else 0, "softcap": softcap}
    got = rooflama.attention(q, k, v, softmax_scale=0.2, **options)
    want = defined(*map(exact, (q, k, v)), softmax_scale=0.2, **options)
    rounded = defined(*(exact(x).astype(np.float32) for x in (q, k, v)), softmax_scale=0.2, **options)
    same_dtype = torch.from_numpy(rounded).to(dtype=dtype, device=DEVICE)
    c = units(score_span([q], [k], 0.2), [v], want, dtype)
    assert_within_rounding(got, want, same_dtype, c=c, context=f"seed={seed}")


@given(queries=st.integers(2, 20), keys=st.integers(20, 60), place=st.integers(0, 59), seed=seeds)
def test_editing_the_future_changes_no_bit_of_the_past(queries, keys, place, seed):
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, 1, 4, queries, 16), normal(rng, 1, 2, keys, 16), normal(rng, 1, 2, keys, 16)
    before = rooflama.attention(q, k, v)
    place %= keys
    k[:, :, place:], v[:, :, place:] = 3.0, -2.0
    past = max(0, min(queries, place - (keys - queries)))  # queries that see only keys before the place
    assert_bit_equal(rooflama.attention(q, k, v)[:, :, :past], before[:, :, :past])
    everything = rooflama.attention(q, k, v, causal=False)
    assert_bit_equal(everything[:, :, -1:], rooflama.attention(q[:, :, -1:], k, v))


def test_leading_dimensions_are_batches():
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 3, 4, 5, 16), normal(rng, 2, 3, 2, 9, 16), normal(rng, 2, 3, 2, 9, 16)
    for causal in (True, False):
        got = rooflama.attention(q, k, v, causal=causal)
        assert got.shape == q.shape
        for i in range(2):
            assert_bit_equal(got[i], rooflama.attention(q[i], k[i], v[i], causal=causal))
            assert_bit_equal(got[i, 1], rooflama.attention(q[i, 1], k[i, 1], v[i, 1], causal=causal))
    assert rooflama.attention(q[:, :0], k[:, :0], v[:, :0], causal=False).shape == (2, 0, 4, 5, 16)


def test_keys_of_a_cache_are_read_where_they_lie():
    cache = torch.randn(2, 2, 9 + PAGE_SIZE, 16, device=DEVICE)
    k, v = cache[:, :, :9], cache.clone()[:, :, :9]
    pages, _, _ = as_pages(k, v)
    assert pages.data_ptr() == k.data_ptr()
    expanded, _, _ = as_pages(*(x[:1].expand(5, -1, -1, -1) for x in (k, v)))
    assert expanded.data_ptr() == k.data_ptr()


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 4, 3, 16), (1, 2, 9, 16), (1, 2, 9, 16)), {}, rooflama.ArgumentError, "same leading dimensions"),
        (((4, 3, 16), (1, 2, 9, 16), (1, 2, 9, 16)), {}, rooflama.ArgumentError, "same leading dimensions"),
        (((3, 16), (9, 16), (9, 16)), {}, rooflama.ArgumentError, r"q \[3, 16\]"),
        (((1, 4, 3, 16), (1, 2, 9, 16), (1, 2, 8, 16)), {}, rooflama.ArgumentError, "v is|v "),
        (((1, 4, 3, 16), (1, 2, 9, 8), (1, 2, 9, 8)), {}, rooflama.ArgumentError, "head_dim"),
        (((1, 4, 3, 16), (1, 3, 9, 16), (1, 3, 9, 16)), {}, KernelInputError, "4 query heads over 3"),
        (
            ((1, 4, 3, 16), (1, 2, 9, 16), (1, 2, 9, 16)),
            {"causal": False, "sliding_window": 4},
            rooflama.ArgumentError,
            "sliding_window 4 without causal",
        ),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, error, message):
    with pytest.raises(error, match=message):
        rooflama.attention(*(torch.zeros(shape, device=DEVICE) for shape in shapes), **options)


def test_what_is_no_tensor_is_named():
    q = torch.zeros(2, 3, 16)
    with pytest.raises(rooflama.ArgumentError, match="k is a list: q, k and v are tensors"):
        rooflama.attention(q, q.tolist(), q)
