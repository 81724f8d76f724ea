"""attention_prefill against its definition, the definition against torch and transformers, and the laws it keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, attention_prefill, reference
from rooflama.testing import attention_laws
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.attention import (
    GROUPS,
    HEAD_DIMS,
    NAN,
    PAGE_SIZES,
    Drawn,
    arguments,
    define,
    far_pages,
    far_scales,
    int32,
    paged,
    prefills,
    run_prefill,
    sequences,
    spread,
    stacked,
    starts,
    visible,
)
from rooflama.testing.attention_laws import PREFILL
from rooflama.testing.strategies import DEVICE, exact, normal

LLAMA = Drawn(query_lens=(37, 0, 70), seq_lens=(37, 5, 133), num_kv_heads=2, group=4, head_dim=64)

# first queries on both sides of a tile's edge, wherever it is among powers of two
EDGES = Drawn(query_lens=(5,) * 6, seq_lens=(66, 67, 68, 69, 132, 133), num_kv_heads=1, group=1, head_dim=16)


@given(drawn=prefills())
@example(drawn=LLAMA)
@example(drawn=replace(LLAMA, group=7, head_dim=128, dtype=torch.float16, page_dtype=torch.float8_e4m3fn))
@example(drawn=replace(LLAMA, group=1, head_dim=96, page_size=64, sliding_window=40))
@example(drawn=replace(LLAMA, group=3, head_dim=80, softcap=5.0, page_dtype=torch.int8, page_size=256))
@example(drawn=replace(LLAMA, group=2, dtype=torch.float32, page_dtype=torch.float16))
@example(drawn=EDGES)
@example(drawn=replace(EDGES, sliding_window=36))
def test_attention_prefill_equals_definition(drawn):
    attention_laws.equals_definition(PREFILL, attention_prefill, drawn)


@pytest.mark.parametrize(
    ("group", "head_dim"), [(group, 16) for group in GROUPS] + [(3, n) for n in HEAD_DIMS if n != 16]
)
def test_every_group_and_head_dim_equals_definition(group, head_dim):
    """What is drawn may leave some out."""
    drawn = Drawn(query_lens=(3, 2), seq_lens=(3, 35), group=group, head_dim=head_dim)
    attention_laws.equals_definition(PREFILL, attention_prefill, drawn)


@pytest.mark.usefixtures("numpy_backend")
@given(drawn=prefills())
@example(drawn=replace(LLAMA, dtype=torch.bfloat16))
@example(drawn=replace(LLAMA, page_dtype=torch.float8_e4m3fn, sliding_window=20))
def test_attention_prefill_by_numpy_equals_definition(drawn):
    attention_laws.equals_definition(PREFILL, attention_prefill, drawn)


def test_definition_over_several_chunks_of_rows(monkeypatch):
    """The definition holds the scores of a few rows at a time; how many changes nothing but rounding."""
    drawn = replace(LLAMA, sliding_window=50)
    dense = sequences(drawn)
    whole = define(reference.attention_prefill, drawn, dense, decode=False)
    monkeypatch.setattr("rooflama.kernels.reference.attention.ROWS", 8)
    for one, other in zip(define(reference.attention_prefill, drawn, dense, decode=False), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


@given(drawn=prefills(softcap=0.0, page_dtype=None))
@example(drawn=replace(LLAMA, sliding_window=20))
def test_definition_equals_torch_sdpa(drawn):
    """scaled_dot_product_attention in float64, its own grouping of heads, the mask made explicit."""
    dense = sequences(drawn)
    out, lse = define(reference.attention_prefill, drawn, dense, decode=False)
    row = 0
    for s in dense:
        queries, keys = len(s.q), len(s.k)
        seen = visible(drawn, queries, keys)
        if queries and keys:
            q, k, v = (x.double().transpose(0, 1)[None] for x in (s.q, s.k, s.v))
            want = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=drawn.options["softmax_scale"], enable_gqa=True
            )[0].transpose(0, 1)
            some = seen.any(1).cpu().numpy()
            np.testing.assert_allclose(out[row : row + queries][some], exact(want)[some], rtol=1e-10, atol=1e-12)
            scores = q @ k.repeat_interleave(drawn.group, 1).transpose(-1, -2) * drawn.options["softmax_scale"]
            sums = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), -1)[0].T
            np.testing.assert_allclose(lse[row : row + queries], exact(sums), rtol=1e-10, atol=1e-10)
        row += queries


@given(drawn=prefills(page_dtype=None))
@example(drawn=replace(LLAMA, softcap=5.0, sliding_window=30))
def test_definition_equals_transformers_eager_attention(drawn):
    """Gemma 2's attention, the one with a softcap; its softmax is in float32."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    dense = sequences(drawn)
    out, _ = define(reference.attention_prefill, drawn, dense, decode=False)
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = drawn.group, False
    row = 0
    for s in dense:
        seen = visible(drawn, len(s.q), len(s.k))
        if seen.numel():
            q, k, v = (x.double().transpose(0, 1)[None] for x in (s.q, s.k, s.v))
            mask = torch.zeros_like(seen, dtype=torch.float64).masked_fill(~seen, -1e30)[None, None]
            want, _ = gemma.eager_attention_forward(
                module, q, k, v, mask, scaling=drawn.options["softmax_scale"], softcap=drawn.softcap or None
            )
            some = seen.any(1).cpu().numpy()
            np.testing.assert_allclose(out[row : row + len(s.q)][some], exact(want[0])[some], rtol=1e-5, atol=1e-5)
        row += len(s.q)


@given(drawn=prefills())
def test_grouped_heads_equal_repeated_heads(drawn):
    """GQA is MHA over K/V heads written out once for each query head."""
    attention_laws.grouped_heads_equal_repeated_heads(PREFILL, attention_prefill, drawn)


@given(drawn=prefills(), page_size=st.sampled_from(PAGE_SIZES), seed=st.integers(0, 99))
@example(drawn=LLAMA, page_size=256, seed=1)
def test_placement_and_size_of_pages_change_no_bit(drawn, page_size, seed):
    attention_laws.placement_of_pages_changes_no_bit(PREFILL, attention_prefill, drawn, page_size, seed)


@pytest.mark.parametrize("page_dtype", [None, torch.int8])
def test_the_same_call_gives_the_same_bits(page_dtype):
    fields = arguments(replace(LLAMA, page_dtype=page_dtype))
    for one, other in zip(attention_prefill(**fields), attention_prefill(**fields), strict=True):
        assert_bit_equal(one, other)


@given(drawn=prefills())
@example(drawn=LLAMA)
def test_batch_changes_no_bit(drawn):
    attention_laws.neighbours_change_no_bit(PREFILL, attention_prefill, drawn)


@given(drawn=prefills(), chunk=st.integers(1, 40))
@example(drawn=LLAMA, chunk=16)
@example(drawn=replace(LLAMA, sliding_window=33, group=3), chunk=23)
def test_chunks_change_no_bit(drawn, chunk):
    """Each chunk runs when only its own keys and those before it exist."""
    attention_laws.chunks_change_no_bit(PREFILL, attention_prefill, drawn, chunk)


@given(drawn=prefills(page_dtype=None), cut=st.integers(0, 160))
@example(drawn=replace(LLAMA, query_lens=(60,), seq_lens=(60,)), cut=31)
def test_a_finite_future_changes_no_bit_of_the_past(drawn, cut):
    """A NaN in V may: the kernel and the definition multiply it by a weight of 0."""
    attention_laws.a_finite_future_changes_no_bit_of_the_past(PREFILL, attention_prefill, drawn, cut)


@given(drawn=prefills(page_dtype=None), value=st.floats(-8, 8, width=16))
def test_equal_values_come_out_unchanged(drawn, value):
    """Weights sum to one: a mean of equal numbers is that number.

    To the rounding of the weights and of the result, half an eps each, and of a float32 sum of 160 keys at most;
    bfloat16 is held to half of that, as seen on a GPU: its weights do not all err one way.
    """
    dense = [replace(s, v=torch.full_like(s.v, value)) for s in sequences(drawn)]
    out, lse = run_prefill(attention_prefill, drawn, dense)
    seen = lse.isfinite()[..., None].expand_as(out)
    rounding = min(4e-3, torch.finfo(out.dtype).eps + 160 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], value), rtol=rounding, atol=0)
    assert bool((out[~seen] == 0).all())


@pytest.mark.parametrize("page_size", [16, 64])
def test_rows_without_keys_and_tokens_of_no_sequence(page_size):
    """More queries than keys, no key at all, and padding tokens after the last sequence: 0 and -inf."""
    dense = sequences(Drawn(query_lens=(5, 3, 4), seq_lens=(2, 0, 4)))
    laid = paged(dense, page_size)
    q = torch.cat([stacked(dense), torch.ones(40, 4, 32, device=DEVICE)])
    out, lse = attention_prefill(
        q, laid.k_pages, laid.v_pages, laid.block_table, int32([2, 0, 4]), starts([5, 3, 4]), softmax_scale=0.2
    )
    empty = [*range(3), *range(5, 8), *range(12, 52)]
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == -torch.inf).all())
    assert bool(lse[[3, 4, 8, 9, 10, 11]].isfinite().all())


@given(drawn=prefills(sliding_window=17))
@example(drawn=replace(LLAMA, sliding_window=17, query_lens=(3, 2, 1)))
def test_pages_before_the_window_may_be_gone(drawn):
    """Keys that no query can see are neither read nor looked up."""
    attention_laws.keys_out_of_sight_are_not_read(PREFILL, attention_prefill, drawn)


def test_strided_queries_and_pages():
    """q may be a slice of fused q, k, v; K and V may be halves of one pool."""
    drawn = LLAMA
    dense = sequences(drawn)
    laid = paged(dense, drawn.page_size)
    fused = torch.cat([stacked(dense), torch.full((107, 3, 64), NAN, device=DEVICE)], dim=1)
    pool = torch.stack([laid.k_pages, laid.v_pages], dim=1)
    lens = (int32(drawn.seq_lens), starts(drawn.query_lens))
    got = attention_prefill(fused[:, :8], pool[:, 0], pool[:, 1], laid.block_table, *lens, **drawn.options)
    for one, other in zip(got, run_prefill(attention_prefill, drawn, dense), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize(("far", "page_size"), [("pages", 16), ("pages", 64), ("tokens", 16), ("tables", 16)])
def test_offsets_beyond_int32(far, page_size):
    """The pages, or the last token or table row, start past 2^31 elements; the storage is virtual."""
    drawn = Drawn((20, 2, 3), (20, 21, 70), num_kv_heads=1, head_dim=16, page_size=page_size, dtype=torch.float16)
    dense = sequences(drawn)
    laid = paged(dense, drawn.page_size)
    q, lens = stacked(dense), (int32(drawn.seq_lens), starts(drawn.query_lens))
    want = attention_prefill(q, laid.k_pages, laid.v_pages, laid.block_table, *lens, **drawn.options)
    k_pages, v_pages, table = laid.k_pages, laid.v_pages, laid.block_table
    if far == "pages":
        (k_pages, moved), (v_pages, _) = far_pages(k_pages), far_pages(v_pages)
        table = table + moved
    elif far == "tokens":
        q = spread(q)
    else:
        table = spread(table)
    for one, other in zip(attention_prefill(q, k_pages, v_pages, table, *lens, **drawn.options), want, strict=True):
        assert_bit_equal(one, other)


def test_scales_beyond_int32():
    fields = arguments(Drawn((2,), (13,), num_kv_heads=1, head_dim=16, page_dtype=torch.int8))
    for one, other in zip(attention_prefill(**far_scales(fields)), attention_prefill(**fields), strict=True):
        assert_bit_equal(one, other)


def test_opcheck():
    small = replace(LLAMA, query_lens=(3,), seq_lens=(7,), num_kv_heads=1)
    for drawn in (small, replace(small, page_dtype=torch.int8)):
        torch.library.opcheck(torch.ops.rooflama.attention_prefill, (), arguments(drawn))


def test_compiles_into_one_graph():
    fields = arguments(LLAMA)
    q = fields.pop("q")

    def block(q):
        out, lse = attention_prefill(q * 2, **fields)
        return out + 1, lse

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(q), block(q), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.gpu
def test_graph_is_replayed_with_other_lengths():
    """Lengths are read on the device: a captured graph serves any that fit its shapes."""
    large = replace(LLAMA, query_lens=(60, 40, 7), seq_lens=(60, 90, 133))
    fields = arguments(large)
    attention_prefill(**fields)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_prefill(**fields)
    for query_lens, seq_lens in (
        (LLAMA.query_lens, LLAMA.seq_lens),
        ((30, 1, 9), (36, 5, 100)),
        ((0, 5, 0), (0, 5, 9)),
    ):
        fields["seq_lens"].copy_(int32(seq_lens))
        fields["query_start_loc"].copy_(starts(query_lens))
        graph.replay()
        for one, other in zip(captured, attention_prefill(**fields), strict=True):
            assert_bit_equal(one, other)


def table_entry(value):
    def change(fields):
        fields["block_table"][0, 0] = value

    return change


REFUSED = [
    ({"q": torch.zeros(107, 7, 64)}, "7 query heads over 2 K/V heads"),
    ({"q": torch.zeros(107, 8, 32)}, r"k_pages must have shape \[any, any, any, 32\]"),
    ({"q": torch.zeros(107, 8)}, r"q must have shape \[any, any, any\]"),
    ({"q": torch.zeros(107, 8, 64, dtype=torch.float64)}, "q is torch.float64"),
    ({"q": torch.zeros(107, 8, 64, dtype=torch.float16)}, "pages of floats have the dtype of q"),
    ({"q": torch.zeros(107, 64, 8).transpose(1, 2)}, "last dimension of q must be contiguous"),
    ({"k_pages": torch.zeros(9, 24, 2, 64), "v_pages": torch.zeros(9, 24, 2, 64)}, "page_size is 24"),
    ({"k_pages": torch.zeros(9, 8, 2, 64), "v_pages": torch.zeros(9, 8, 2, 64)}, "power of two from 16 to 256"),
    ({"v_pages": torch.zeros(9, 32, 2, 64)}, "v_pages must have shape"),
    ({"seq_lens": torch.zeros(2, dtype=torch.int32)}, r"seq_lens must have shape \[3\]"),
    ({"seq_lens": torch.zeros(3, dtype=torch.int64)}, "seq_lens must be one of int32"),
    ({"query_start_loc": torch.zeros(3, dtype=torch.int32)}, r"query_start_loc must have shape \[4\]"),
    ({"k_scale": torch.zeros(1)}, "k_scale is given with torch.float32 pages"),
    (
        {"block_table": torch.zeros(3, 18, dtype=torch.int32, device=DEVICE)[:, ::2]},
        "last dimension of block_table must be contiguous",
    ),
    ({"seq_lens": torch.zeros(6, dtype=torch.int32, device=DEVICE)[::2]}, "dimension of seq_lens must be contiguous"),
    (
        {"query_start_loc": torch.zeros(8, dtype=torch.int32, device=DEVICE)[::2]},
        "last dimension of query_start_loc must be contiguous",
    ),
    ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
    ({"softcap": -1.0}, "softcap must be 0 or more"),
    ({"sliding_window": -1}, "sliding_window counts tokens"),
    (
        {"block_table": torch.zeros(3, 9, dtype=torch.int32, device="meta")},
        "all tensors of one call live on one device",
    ),
]
REFUSED_ON_THE_HOST = [
    ({"seq_lens": int32([37, 5, 9000])}, "a sequence has 0 to"),
    ({"query_start_loc": int32([0, 37, 30, 107])}, "never falls"),
    ({"query_start_loc": int32([0, 37, 37, 200])}, "ends within the tokens of q"),
    (table_entry(-1), r"block_table\[0\] names pages -1"),
    (table_entry(99), "pages are numbered 0 to"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_input_is_refused_before_a_launch(change, message):
    fields = arguments(LLAMA)
    fields.update({n: x if getattr(x, "is_meta", True) else x.to(DEVICE) for n, x in change.items()})
    with pytest.raises(KernelInputError, match=message):
        attention_prefill(**fields)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
@pytest.mark.parametrize(
    ("page_dtype", "names"),
    [(None, ("q", "k_pages", "v_pages")), (None, ("k_pages", "v_pages")), (torch.int8, ("q",))],
)
def test_bfloat16_is_refused_under_the_interpreter(page_dtype, names):
    fields = arguments(replace(LLAMA, page_dtype=page_dtype))
    fields |= {name: fields[name].bfloat16() for name in names}
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        attention_prefill(**fields)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the check would wait for the device")
@pytest.mark.parametrize(("change", "message"), REFUSED_ON_THE_HOST)
def test_bad_lengths_and_pages_are_refused_on_the_cpu(change, message):
    fields = arguments(LLAMA)
    change(fields) if callable(change) else fields.update(change)
    with pytest.raises(KernelInputError, match=message):
        attention_prefill(**fields)


def test_codes_without_scales_are_refused():
    fields = arguments(replace(LLAMA, page_dtype=torch.int8))
    with pytest.raises(KernelInputError, match=r"v_scale is None with torch\.int8 pages"):
        attention_prefill(**{**fields, "v_scale": None})


def test_no_tokens_and_no_sequences():
    pages = normal(np.random.default_rng(0), 2, 16, 1, 32)
    out, lse = attention_prefill(
        torch.zeros(0, 4, 32, device=DEVICE), pages, pages, int32([]).view(0, 3), int32([]), int32([0]), softmax_scale=1
    )
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)
