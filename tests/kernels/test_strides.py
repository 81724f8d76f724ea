"""Tensors laid out as serving code lays them out: K/V of all heads in one pool, v of strides of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rooflama.kernels import (
    attention_decode,
    attention_prefill,
    copy_pages,
    gather_kv,
    rope,
    rope_and_cache_write,
    write_kv,
)
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.attention import Drawn, arguments, spread
from rooflama.testing.rope import Step
from rooflama.testing.strategies import DEVICE, normal

GQA = Drawn(query_lens=(1, 1, 1), seq_lens=(37, 0, 90), num_kv_heads=3, group=2, head_dim=48)
PAGE_DTYPES = [None, torch.int8, torch.float8_e4m3fn]


def one_pool(k_pages, v_pages):
    """The same pages as halves of [num_pages, page_size, 2 * num_kv_heads, head_dim]."""
    return torch.cat([k_pages.view(torch.uint8), v_pages.view(torch.uint8)], dim=2).view(k_pages.dtype).chunk(2, dim=2)


def apart(x):
    """The same [num_tokens, heads, head_dim] inside a wider tensor, with a token and a head stride of its own."""
    wide = torch.full((len(x), x.shape[1] + 2, x.shape[2] + 8), torch.nan, dtype=x.dtype, device=x.device)
    inner = wide[:, 1:-1, 8:]
    inner.copy_(x)
    return inner


def far(x, dim):
    """The same values with the last entry of a dimension past 2^31 elements; the storage is virtual."""
    return spread(x.transpose(0, dim)).transpose(0, dim)


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("decode", [True, False])
def test_attention_over_one_pool(page_dtype, decode):
    fields = arguments(replace(GQA, page_dtype=page_dtype), decode=decode)
    attention = attention_decode if decode else attention_prefill
    k_pages, v_pages = one_pool(fields["k_pages"], fields["v_pages"])
    got = attention(**fields | {"k_pages": k_pages, "v_pages": v_pages, "q": apart(fields["q"])})
    for one, other in zip(got, attention(**fields), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("fused", [True, False])
def test_writing_into_one_pool(page_dtype, fused):
    """From a v whose strides are not those of k; and both are gathered again."""
    step = Step(0, 5, 6, 3, 48, 48, torch.float32, page_dtype)
    step.slots = torch.tensor([3, 20, 17, 16, -1], device=DEVICE)

    def write(v, k_pages, v_pages, *scales):
        if fused:
            rope_and_cache_write(step.q, step.k, v, *step.tables, step.positions, step.slots, k_pages, v_pages,
                                 None, None, *scales)  # fmt: skip
        else:
            write_kv(step.k, v, k_pages, v_pages, step.slots, *scales)

    want, (k_pages, v_pages, *scales) = step.pages(), step.pages()
    write(step.v, *want)
    pool = one_pool(k_pages, v_pages)
    write(apart(step.v), *pool, *scales)
    for got, expected in zip((*pool, *scales), want, strict=True):
        if expected is not None:
            assert_bit_equal(got.float(), expected.float())
    table, lengths = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([[1, 0]], [20]))
    for got, expected, scale in zip(pool, want, scales, strict=False):
        keys = gather_kv(got, table, lengths, scale, num_keys=20)
        assert_bit_equal(keys, gather_kv(expected, table, lengths, scale, num_keys=20))


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("name", "dim"), [("pages", 1), ("pages", 2), ("q", 1)])
def test_attention_over_places_and_heads_beyond_int32(name, dim, decode):
    """As a pool or a projection has them whose outermost dimension are the heads."""
    fields = arguments(replace(GQA, seq_lens=(37, 1, 90), dtype=torch.float16), decode=decode)
    attention = attention_decode if decode else attention_prefill
    names = ("q",) if name == "q" else ("k_pages", "v_pages")
    got = attention(**fields | {name: far(fields[name], dim) for name in names})
    for one, other in zip(got, attention(**fields), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_writing_to_places_and_heads_beyond_int32(dim, fused):
    """From heads that lie as far apart, and gathered by a table whose rows do."""
    step = Step(0, 5, 6, 3, 48, 48, torch.float16)
    step.slots = torch.tensor([15, 20, 17, 31, 16], device=DEVICE)

    def write(q, k, v, k_pages, v_pages):
        if fused:
            rope_and_cache_write(q, k, v, *step.tables, step.positions, step.slots, k_pages, v_pages)
        else:
            write_kv(k, v, k_pages, v_pages, step.slots)

    near = step.pages()[:2]
    pages = [far(tensor, dim) for tensor in near]
    write(step.q, step.k, step.v, *near)
    write(*(far(tensor, 1) for tensor in (step.q, step.k, step.v)), *pages)
    table, lengths = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([[2, 2], [3, 3], [1, 0]], [0, 3, 32]))
    for got, want in zip(pages, near, strict=True):
        assert_bit_equal(
            gather_kv(got, spread(table), lengths, num_keys=35), gather_kv(want, table, lengths, num_keys=35)
        )


@pytest.mark.parametrize("heads", [3, 5])
def test_rotation_of_heads_beyond_int32(heads):
    step = Step(0, 3, heads, heads, 48, 48, torch.float16)
    inputs = (*step.tables, step.positions)
    assert_bit_equal(rope(far(step.q, 1), *inputs), rope(step.q, *inputs))


@pytest.mark.parametrize("decode", [True, False])
def test_a_table_no_wider_than_its_keys(decode):
    """Whose last tile of keys goes on past the last page."""
    fields = arguments(replace(GQA, seq_lens=(42, 1, 48)), decode=decode)
    attention = attention_decode if decode else attention_prefill
    table = fields["block_table"][:, :3].contiguous()
    for one, other in zip(attention(**fields | {"block_table": table}), attention(**fields), strict=True):
        assert_bit_equal(one, other)


def test_pages_longer_than_a_block_are_copied_whole():
    pages = normal(np.random.default_rng(0), 3, 256, 2, 96)
    want = pages.clone()
    want[2] = want[0]
    copy_pages(pages, torch.tensor([0], device=DEVICE), torch.tensor([2], device=DEVICE))
    assert_bit_equal(pages, want)
