"""Dense K/V as pages: equality with a plain float64 formula, what is copied, and what torch.compile sees."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.integrations.dense import PAGE_SIZE, as_pages, dense_attention
from rooflama.kernels import KernelInputError, swap
from rooflama.testing.assertions import assert_bit_equal, assert_within_rounding
from rooflama.testing.attention import score_span, units
from rooflama.testing.strategies import DEVICE, dtypes, exact, normal, seeds

NAN = float("nan")


def heads_first(values):
    """As a dynamic cache holds them."""
    return values.contiguous()


def tokens_first(values):
    """As a projection makes them."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def beginning(values):
    """The first keys of a longer, poisoned cache."""
    batch, heads, keys, dim = values.shape
    longer = torch.full((batch, heads, keys + PAGE_SIZE, dim), NAN, dtype=values.dtype, device=values.device)
    longer[:, :, :keys] = values
    return longer[:, :, :keys]


def inside_qkv(values):
    """Between other heads of the same tokens."""
    wide = torch.full((*values.transpose(1, 2).shape[:2], values.shape[1] + 3, values.shape[3]), NAN)
    wide = wide.to(values)
    wide[:, :, 2:-1] = values.transpose(1, 2)
    return wide[:, :, 2:-1].transpose(1, 2)


LAYOUTS = [heads_first, tokens_first, beginning, inside_qkv]


@dataclass(frozen=True)
class Drawn:
    spans: tuple[tuple[int, int], ...]  # of each sequence: keys that are not its own before it, keys that are
    queries: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int
    softcap: float
    layouts: tuple
    seed: int

    def problem(self):
        """(query, key, value, seen, visible [batch, queries, keys]), NaN in every key that is not a sequence's own."""
        rng = np.random.default_rng(self.seed)
        batch, num_keys = len(self.spans), max(sum(span) for span in self.spans) + 3
        query = normal(rng, batch, self.num_kv_heads * self.group, self.queries, self.head_dim, dtype=self.dtype)
        shape = (batch, self.num_kv_heads, num_keys, self.head_dim)
        key, value = (normal(rng, *shape, dtype=self.dtype) for _ in range(2))
        keys, visible = np.arange(num_keys), np.zeros((batch, self.queries, num_keys), dtype=bool)
        for row, (first, count) in enumerate(self.spans):
            key[row, :, :first] = key[row, :, first + count :] = NAN
            value[row, :, :first] = value[row, :, first + count :] = NAN
            positions = first + count - self.queries + np.arange(self.queries)[:, None]
            visible[row] = (keys >= first) & (keys <= positions)
            if self.sliding_window:
                visible[row] &= keys > positions - self.sliding_window
        seen = torch.tensor(self.spans, dtype=torch.int32, device=DEVICE)[:, None, None]
        return query, self.layouts[0](key), self.layouts[1](value), seen, torch.from_numpy(visible)

    @property
    def options(self):
        scale = 1.5 / math.sqrt(self.head_dim)
        return {"softmax_scale": scale, "sliding_window": self.sliding_window, "softcap": self.softcap}


def plain(query, key, value, visible, softmax_scale, softcap, **_):
    """The formula, in the dtype of query: [batch, queries, heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.nan_to_num(0.0).repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None].to(scores.device), -math.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


@st.composite
def problems(draw, most_queries=12):
    counts = st.integers(0, 20) | st.integers(0, 150)
    spans = draw(st.lists(st.tuples(st.integers(0, 40), counts), min_size=1, max_size=2))
    return Drawn(
        spans=tuple(spans),
        queries=draw(st.integers(1, most_queries)),
        num_kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 3, 7])),
        head_dim=draw(st.sampled_from([8, 10, 64, 80])),
        dtype=draw(dtypes),
        sliding_window=draw(st.just(0) | st.integers(1, 60)),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=2))),
        seed=draw(seeds),
    )


def check(out, wide, drawn, problem, options):
    """``out`` against the formula in float64."""
    query, key, value, _ = problem
    c = units(score_span([query], [key], options["softmax_scale"]), [value], exact(wide), out.dtype)
    assert_within_rounding(out, exact(wide), plain(*problem, **options), c=c, context=repr(drawn))


@given(drawn=problems())
def test_equals_the_formula(drawn):
    query, key, value, seen, visible = drawn.problem()
    out = dense_attention(query, key, value, seen, **drawn.options)
    wide = plain(query.cpu().double(), key.cpu().double(), value.cpu().double(), visible, **drawn.options)
    check(out, wide, drawn, (query, key, value, visible), drawn.options)


@given(drawn=problems(most_queries=1), hidden=st.data())
def test_one_query_sees_exactly_the_keys_that_are_named(drawn, hidden):
    query, key, value, _, visible = drawn.problem()
    chosen = torch.tensor(
        hidden.draw(st.lists(st.booleans(), min_size=visible[0].numel(), max_size=visible[0].numel()))
    )
    visible = visible & chosen
    options = drawn.options | {"sliding_window": 0}
    key, value = (x.masked_fill(~visible[:, 0, None, :, None].to(DEVICE), NAN) for x in (key, value))
    out = dense_attention(query, key, value, visible[:, None].to(DEVICE), **options)
    wide = plain(query.cpu().double(), key.cpu().double(), value.cpu().double(), visible, **options)
    check(out, wide, drawn, (query, key, value, visible), options)


@given(drawn=problems())
def test_a_view_and_a_copy_give_the_same_bits(drawn):
    query, key, value, seen, _ = drawn.problem()
    viewed = dense_attention(query, beginning(key), beginning(value), seen, **drawn.options)
    copied = dense_attention(query, beginning(key), tokens_first(value), seen, **drawn.options)
    assert_bit_equal(viewed, copied)


@pytest.mark.parametrize(
    ("layouts", "viewed"),
    [
        ([beginning, beginning], True),
        ([heads_first, heads_first], DEVICE.type == "cuda"),  # the last page ends beyond the tensor
        ([tokens_first, tokens_first], DEVICE.type == "cuda"),
        ([beginning, heads_first], False),  # unlike strides
        ([lambda x: x.mT.contiguous().mT] * 2, False),  # rows that are not contiguous
    ],
)
def test_what_is_copied(layouts, viewed):
    key, value = (layout(torch.randn(2, 3, 2 * PAGE_SIZE + 5, 16, device=DEVICE)) for layout in layouts)
    k_pages, v_pages, _ = as_pages(key, value)
    assert (k_pages.data_ptr() == key.data_ptr(), v_pages.data_ptr() == value.data_ptr()) == (viewed, viewed)


def test_a_replacement_gets_whole_pages():
    """A function in place of the kernel may index the pages, so none of them ends beyond the tensor."""
    query, key, value = (torch.randn(2, 2, keys, 16, device=DEVICE) for keys in (1, 300, 300))

    def mine(q, k_pages, v_pages, block_table, seq_lens, **options):
        keys, values = (
            pages[block_table.long()].flatten(1, 2)[:, : int(seq_lens[0])].transpose(1, 2)
            for pages in (k_pages, v_pages)
        )
        return plain(q[:, :, None], keys, values, torch.ones(2, 1, keys.shape[2], dtype=torch.bool), **options)[
            :, 0
        ], None

    with swap(attention_decode=mine):
        out = dense_attention(query, key, value, softmax_scale=0.25)
    assert_within_rounding(out, exact(dense_attention(query, key, value, softmax_scale=0.25)), c=16)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("spans", [None, [[2, 9], [0, 12]]])
def test_the_operator_that_is_traced(queries, spans):
    """Its schema, its fake and its dispatch; and no page overlaps in what a traced graph holds."""
    query, key, value = (torch.randn(2, h, n, 16, device=DEVICE) for h, n in ((4, queries), (2, 12), (2, 12)))
    seen = None if spans is None else torch.tensor(spans, dtype=torch.int32, device=DEVICE)[:, None, None]
    torch.library.opcheck(torch.ops.rooflama.dense_attention.default, (query, key, value, seen, 0.25, 0, 0.0))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: dense_attention(*x, softmax_scale=0.25))(
        query, key, value, seen
    )
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.rooflama.dense_attention.default]
    assert_bit_equal(traced(query, key, value, seen), dense_attention(query, key, value, seen, softmax_scale=0.25))


def test_gradients_are_refused():
    query, key, value = (torch.randn(1, 2, 3, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with pytest.raises(KernelInputError, match=r"requires grad.*torch\.no_grad"):
        dense_attention(query, key, value, softmax_scale=0.25)
