"""The functions of flash-attn: equality with a plain float64 formula and with torch, cache writes, refusals."""

import inspect
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention

from rooflama.integrations.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from rooflama.kernels import reference
from rooflama.models import ArgumentError
from rooflama.testing.assertions import assert_bit_equal, assert_within_rounding
from rooflama.testing.attention import NAN, int32, score_span, starts, units
from rooflama.testing.strategies import DEVICE, dtypes, exact, normal, seeds


@dataclass(frozen=True)
class Drawn:
    lens: tuple[tuple[int, int], ...]  # queries and keys of each sequence
    group: int
    head_dim: int
    dtype: torch.dtype
    window: int
    softcap: float
    page_size: int
    seed: int

    def sequences(self):
        """(q, k, v) of each, [tokens, heads, head_dim]."""
        rng = np.random.default_rng(self.seed)
        shape = {"dtype": self.dtype}
        return [
            (
                normal(rng, queries, 2 * self.group, self.head_dim, **shape),
                normal(rng, keys, 2, self.head_dim, **shape),
                normal(rng, keys, 2, self.head_dim, **shape),
            )
            for queries, keys in self.lens
        ]

    @property
    def options(self):
        window = (self.window - 1, self.window - 1) if self.window else (-1, -1)  # as transformers passes it
        return {"causal": True, "window_size": window, "softcap": self.softcap}

    def expected(self, dtype=torch.float64):
        """[tokens, heads, head_dim] per sequence, by the formula in ``dtype``."""
        found = []
        for q, k, v in self.sequences():
            queries, keys = len(q), len(k)
            position = torch.arange(keys - queries, keys)[:, None]
            visible = torch.arange(keys) <= position
            if self.window:
                visible &= torch.arange(keys) > position - self.window
            q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
            scores = q @ k.repeat_interleave(self.group, 0).mT / math.sqrt(self.head_dim)
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            weights = scores.masked_fill(~visible.to(DEVICE), -math.inf).softmax(-1)
            found.append((weights @ v.repeat_interleave(self.group, 0)).transpose(0, 1))
        return torch.cat(found)


@st.composite
def problems(draw, queries=None):
    lens = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 10)) if queries is None else queries
        lens.append((count, count + draw(st.integers(0, 20) | st.integers(0, 150))))
    return Drawn(
        lens=tuple(lens),
        group=draw(st.sampled_from([1, 2, 7])),
        head_dim=draw(st.sampled_from([8, 64, 80])),
        dtype=draw(dtypes),
        window=draw(st.just(0) | st.integers(1, 40)),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        page_size=draw(st.sampled_from([16, 64])),
        seed=draw(seeds),
    )


def check(drawn, out):
    q, k, v = zip(*drawn.sequences(), strict=True)
    wide = exact(drawn.expected())
    c = units(score_span(q, k, drawn.head_dim**-0.5), v, wide, drawn.dtype)
    assert_within_rounding(out, wide, drawn.expected(drawn.dtype), c=c, context=repr(drawn))


def paged(drawn, keep):
    """Pages in random places with the first ``keep[i]`` keys of each sequence, poison elsewhere; and their table."""
    rng = np.random.default_rng(drawn.seed)
    counts = [-(-keys // drawn.page_size) for _, keys in drawn.lens]
    order = rng.permutation(sum(counts) + 2)
    table = np.full((len(counts), max(counts) + 1), -1)
    pools = [torch.full((len(order), drawn.page_size, 2, drawn.head_dim), NAN, device=DEVICE) for _ in range(2)]
    pools = [pool.to(drawn.dtype) for pool in pools]
    for row, (count, length, (_, *values)) in enumerate(zip(counts, keep, drawn.sequences(), strict=True)):
        table[row, :count], order = order[:count], order[count:]
        pages = torch.from_numpy(table[row, np.arange(length) // drawn.page_size])
        for pool, value in zip(pools, values, strict=True):
            pool[pages, torch.arange(length) % drawn.page_size] = value[:length]
    return *pools, int32(table)


@given(drawn=problems())
def test_varlen_equals_the_formula(drawn):
    """With tokens at the end that belong to no sequence."""
    q, k, v = (torch.cat(parts) for parts in zip(*drawn.sequences(), strict=True))
    padded = torch.cat([q, q.new_full((2, *q.shape[1:]), NAN)])
    lens = (starts(queries for queries, _ in drawn.lens), starts(keys for _, keys in drawn.lens))
    out = flash_attn_varlen_func(padded, k, v, *lens, *np.max(drawn.lens, axis=0).tolist(), **drawn.options)
    check(drawn, out[:-2])
    assert (out[-2:] == 0).all()


@given(drawn=problems())
def test_varlen_over_pages_equals_the_formula(drawn):
    q = torch.cat([q for q, _, _ in drawn.sequences()])
    k_pages, v_pages, table = paged(drawn, [keys for _, keys in drawn.lens])
    lens = (starts(queries for queries, _ in drawn.lens), starts(keys for _, keys in drawn.lens))
    most = np.max(drawn.lens, axis=0).tolist()
    check(drawn, flash_attn_varlen_func(q, k_pages, v_pages, *lens, *most, block_table=table, **drawn.options))


@pytest.mark.parametrize("dense", [False, True], ids=["pages", "dense"])
@given(data=st.data())
def test_a_cache_is_written_and_attended_to(dense, data):
    queries = data.draw(st.integers(1, 4))
    drawn = data.draw(problems(queries=queries))
    before = [keys - queries for _, keys in drawn.lens]
    if dense:
        most = max(before) + queries + 1
        caches = [torch.full((len(before), most, 2, drawn.head_dim), NAN, device=DEVICE) for _ in range(2)]
        caches, table = [cache.to(drawn.dtype) for cache in caches], None
        for row, (length, (_, *values)) in enumerate(zip(before, drawn.sequences(), strict=True)):
            for kept, value in zip(caches, values, strict=True):
                kept[row, :length] = value[:length]
        wanted = [cache.clone() for cache in caches]
        for row, (_, *values) in enumerate(drawn.sequences()):
            for cache, value in zip(wanted, values, strict=True):
                cache[row, : len(value)] = value
    else:
        *caches, table = paged(drawn, before)
        *wanted, _ = paged(drawn, [keys for _, keys in drawn.lens])
    q, k, v = (torch.stack([values[-queries:] for values in parts]) for parts in zip(*drawn.sequences(), strict=True))
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=int32(before), block_table=table, **drawn.options)
    check(drawn, out.flatten(0, 1))
    for cache, expected in zip(caches, wanted, strict=True):
        assert_bit_equal(cache, expected)


def test_padding_of_a_decoding_batch_writes_nothing():
    """Sequences of -1 keys, with or without pages: what continuous batching passes for unused rows of a CUDA graph."""
    drawn = Drawn(((1, 20), (1, 5), (1, 5)), 2, 16, torch.float32, 0, 0.0, 16, 0)
    k_pages, v_pages, table = paged(drawn, [19, 0, 0])
    table[1] = -1
    before = k_pages.clone()
    q, k, v = (torch.stack([values[-1:] for values in parts]) for parts in zip(*drawn.sequences(), strict=True))
    lens = int32([19, -1, -1])
    out = flash_attn_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=lens, block_table=table, causal=True)
    assert_within_rounding(out[0], exact(drawn.expected()[:1]), c=16)
    assert (out[1:] == 0).all()
    changed = (k_pages != before) & ~(k_pages.isnan() & before.isnan())
    assert changed.flatten(2).any(2).sum() == 1


def test_one_query_reads_the_cache_as_the_numpy_definition_does():
    drawn = Drawn(((1, 20), (1, 33)), 3, 16, torch.float32, 7, 0.0, 16, 1)
    k_pages, v_pages, table = paged(drawn, [20, 33])
    q = torch.cat([q for q, _, _ in drawn.sequences()])
    out = flash_attn_with_kvcache(
        q[:, None], k_pages, v_pages, cache_seqlens=int32([20, 33]), block_table=table, window_size=(6, 0)
    )
    arguments = (exact(q), exact(k_pages), exact(v_pages), table.cpu().numpy(), np.array([20, 33]))
    expected, _ = reference.attention_decode(*arguments, softmax_scale=0.25, sliding_window=7)
    assert_within_rounding(out[:, 0], expected, c=16)


def test_equal_lengths_as_torch_attends():
    q, k, v = (torch.randn(2, 9, heads, 64, device=DEVICE) for heads in (6, 2, 2))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_within_rounding(flash_attn_func(q, k, v, causal=True), exact(expected), c=32)
    whole = scaled_dot_product_attention(heads[0][:, :, -1:], *heads[1:], enable_gqa=True).transpose(1, 2)
    assert_within_rounding(flash_attn_func(q[:, -1:], k, v), exact(whole), c=32)
    assert_within_rounding(flash_attn_with_kvcache(q[:, -1:], k, v, cache_seqlens=9), exact(whole), c=32)
    assert_within_rounding(flash_attn_with_kvcache(q[:, -1:], k, v), exact(whole), c=32)


@pytest.mark.parametrize(
    "option",
    [
        {"dropout_p": 0.1},
        {"alibi_slopes": torch.zeros(2)},
        {"s_aux": torch.zeros(2)},
        {"return_attn_probs": True},
        {"causal": False},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
def test_what_is_not_served_is_refused(function, option):
    q = torch.zeros(1, 4, 2, 16, device=DEVICE)
    lens = int32([0, 4])
    arguments = (q, q, q) if function is flash_attn_func else (q[0], q[0], q[0], lens, lens, 4, 4)
    with pytest.raises(ArgumentError, match=next(iter(option))):
        function(*arguments, **{"causal": True, **option})


@pytest.mark.parametrize(
    "option", ["rotary_cos", "cache_leftpad", "cache_batch_idx", "num_splits", "return_softmax_lse"]
)
def test_what_a_cache_is_not_used_for(option):
    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    with pytest.raises(ArgumentError, match=option):
        flash_attn_with_kvcache(q, q, q, **{option: 3})
    with pytest.raises(ArgumentError, match="cache_seqlens"):
        flash_attn_with_kvcache(q, q, q, q, q)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="no paged decoding")
def test_transformers_finds_its_keywords():
    """It passes an option if the signature has its name."""
    from transformers.modeling_flash_attention_utils import _lazy_define_process_function

    names = {"window_size", "softcap", "s_aux", "dropout_p", "deterministic", "block_table", "max_seqlen_k"}
    found = _lazy_define_process_function(flash_attn_varlen_func).keywords["supports_mapping"]
    assert {name for name in names if not found[name]} == set()
    found = _lazy_define_process_function(flash_attn_with_kvcache).keywords["supports_mapping"]
    assert found["block_table"]
    assert found["cache_seqlens"]
    assert "softmax_scale" in inspect.signature(flash_attn_func).parameters
