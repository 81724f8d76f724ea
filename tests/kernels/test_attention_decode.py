"""attention_decode against its definition and against attention_prefill, and the laws it keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, attention_decode, attention_prefill, reference
from rooflama.kernels.attention_common import Attended
from rooflama.kernels.attention_decode import Splits, merge_splits
from rooflama.testing import attention_laws
from rooflama.testing.assertions import assert_bit_equal, assert_within_rounding
from rooflama.testing.attention import (
    GROUPS,
    HEAD_DIMS,
    PAGE_SIZES,
    Dense,
    Drawn,
    arguments,
    assert_attention,
    decodes,
    define,
    far_pages,
    far_scales,
    int32,
    paged,
    run_decode,
    run_prefill,
    sequences,
    spread,
    stacked,
    untouched,
    with_keys,
)
from rooflama.testing.attention_laws import DECODE
from rooflama.testing.strategies import DEVICE, exact, normal

LLAMA = Drawn(query_lens=(1,) * 4, seq_lens=(37, 0, 290, 130), num_kv_heads=2, group=4, head_dim=64)


@given(drawn=decodes())
@example(drawn=LLAMA)
@example(drawn=replace(LLAMA, group=7, head_dim=128, dtype=torch.float16, page_dtype=torch.float8_e4m3fn))
@example(drawn=replace(LLAMA, group=1, head_dim=96, page_size=64, sliding_window=100))
@example(drawn=replace(LLAMA, group=3, head_dim=80, softcap=5.0, page_dtype=torch.int8, page_size=256))
@example(drawn=replace(LLAMA, group=70, head_dim=16, num_kv_heads=1))
def test_attention_decode_equals_definition(drawn):
    attention_laws.equals_definition(DECODE, attention_decode, drawn)


@pytest.mark.parametrize(
    ("group", "head_dim"), [(group, 16) for group in GROUPS] + [(3, n) for n in HEAD_DIMS if n != 16]
)
def test_every_group_and_head_dim_equals_definition(group, head_dim):
    """What is drawn may leave some out. One sequence of one split and one of two."""
    drawn = Drawn(query_lens=(1, 1), seq_lens=(20, 70), group=group, head_dim=head_dim)
    attention_laws.equals_definition(DECODE, attention_decode, drawn)


@pytest.mark.usefixtures("numpy_backend")
@given(drawn=decodes())
@example(drawn=replace(LLAMA, dtype=torch.bfloat16, sliding_window=50))
def test_attention_decode_by_numpy_equals_definition(drawn):
    attention_laws.equals_definition(DECODE, attention_decode, drawn)


@given(drawn=decodes())
@example(drawn=LLAMA)
def test_decode_is_prefill_of_one_token(drawn):
    """The last row of a prefill, within rounding: the two cut the keys differently."""
    dense = sequences(drawn)
    want = run_prefill(attention_prefill, drawn, dense)
    assert_attention(run_decode(attention_decode, drawn, dense), tuple(map(exact, want)), drawn, dense)


@given(drawn=decodes())
def test_grouped_heads_equal_repeated_heads(drawn):
    """GQA is MHA over K/V heads written out once for each query head."""
    attention_laws.grouped_heads_equal_repeated_heads(DECODE, attention_decode, drawn)


@given(drawn=decodes(), page_size=st.sampled_from(PAGE_SIZES), seed=st.integers(0, 99))
@example(drawn=LLAMA, page_size=256, seed=1)
def test_placement_and_size_of_pages_change_no_bit(drawn, page_size, seed):
    attention_laws.placement_of_pages_changes_no_bit(DECODE, attention_decode, drawn, page_size, seed)


@pytest.mark.parametrize("page_dtype", [None, torch.int8])
def test_the_same_call_gives_the_same_bits(page_dtype):
    fields = arguments(replace(LLAMA, page_dtype=page_dtype), decode=True)
    for one, other in zip(attention_decode(**fields), attention_decode(**fields), strict=True):
        assert_bit_equal(one, other)


@given(drawn=decodes())
@example(drawn=LLAMA)
def test_batch_and_table_width_change_no_bit(drawn):
    """Alone, the table is narrower and so is the grid; a sequence is cut by its own length all the same."""
    attention_laws.neighbours_change_no_bit(DECODE, attention_decode, drawn)


@given(drawn=decodes(page_dtype=None, sliding_window=0), cut=st.integers(1, 399))
@example(drawn=replace(LLAMA, seq_lens=(290,), query_lens=(1,)), cut=64)
def test_parts_merge_into_the_whole(drawn, cut):
    """Attention over two parts of the keys, weighted by exp(lse), is attention over all of them."""
    s = sequences(drawn)[0]
    rest = Dense(s.q, s.k[cut:], s.v[cut:])
    (out, lse), (near, near_lse), (far, far_lse) = (
        tuple(map(exact, run_decode(attention_decode, drawn, part))) for part in ([s], with_keys([s], cut), [rest])
    )
    merged_lse = np.logaddexp(near_lse, far_lse)
    finite = np.where(np.isinf(merged_lse), 0.0, merged_lse)
    merged = near * np.exp(near_lse - finite)[..., None] + far * np.exp(far_lse - finite)[..., None]
    tolerance = 8 * torch.finfo(drawn.dtype).eps * max(1.0, float(np.abs(exact(s.v)).max(initial=0.0)))
    np.testing.assert_allclose(merged, out, rtol=0, atol=tolerance, err_msg=str(drawn))
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5, err_msg=str(drawn))


@given(drawn=decodes())
def test_order_of_keys_matters_only_to_rounding(drawn):
    """Softmax is a sum over keys: permuting them, K and V alike, changes nothing else."""
    attention_laws.order_of_keys_matters_only_to_rounding(DECODE, attention_decode, drawn)


@given(drawn=decodes(sliding_window=40))
@example(drawn=replace(LLAMA, sliding_window=1))
@example(drawn=replace(LLAMA, sliding_window=40))
@example(drawn=replace(LLAMA, sliding_window=150, seq_lens=(400, 290, 10, 151)))
def test_pages_before_the_window_may_be_gone(drawn):
    """Keys that the query cannot see are neither read nor looked up."""
    attention_laws.keys_out_of_sight_are_not_read(DECODE, attention_decode, drawn)


def test_sequence_without_keys_sits_out():
    drawn = replace(LLAMA, seq_lens=(0, 5, 0, 300))
    out, lse = run_decode(attention_decode, drawn, sequences(drawn))
    assert bool((out[[0, 2]] == 0).all())
    assert bool((lse[[0, 2]] == -torch.inf).all())
    assert bool(lse[[1, 3]].isfinite().all())


def test_large_scores_do_not_overflow():
    """Scores in the thousands, the largest at the front, in the middle and at the end of the splits."""
    drawn = replace(LLAMA, seq_lens=(290,) * 4)
    dense = sequences(drawn)
    for s, place in zip(dense, (0, 100, 200, 289), strict=True):
        s.k[place] *= 400
    want = define(reference.attention_decode, drawn, dense, decode=True)
    assert_attention(run_decode(attention_decode, drawn, dense), want, drawn, dense)


def test_strided_queries_and_pages():
    """q may be a slice of fused q, k, v; K and V may be halves of one pool."""
    dense = sequences(LLAMA)
    laid = paged(dense, LLAMA.page_size)
    fused = torch.cat([stacked(dense), torch.full((4, 3, 64), float("nan"), device=DEVICE)], dim=1)
    pool = torch.stack([laid.k_pages, laid.v_pages], dim=1)
    got = attention_decode(
        fused[:, :8], pool[:, 0], pool[:, 1], laid.block_table, int32(LLAMA.seq_lens), **LLAMA.options
    )
    for one, other in zip(got, run_decode(attention_decode, LLAMA, dense), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize(("far", "page_size"), [("pages", 16), ("pages", 64), ("sequences", 16), ("tables", 16)])
def test_offsets_beyond_int32(far, page_size):
    """The pages, or the last query or table row, start past 2^31 elements; the storage is virtual."""
    drawn = Drawn((1, 1, 1), (20, 5, 70), num_kv_heads=1, head_dim=16, page_size=page_size, dtype=torch.float16)
    dense = sequences(drawn)
    laid = paged(dense, drawn.page_size)
    q, k_pages, v_pages, table = stacked(dense), laid.k_pages, laid.v_pages, laid.block_table
    if far == "pages":
        (k_pages, moved), (v_pages, _) = far_pages(k_pages), far_pages(v_pages)
        table = table + moved
    elif far == "sequences":
        q = spread(q)
    else:
        table = spread(table)
    got = attention_decode(q, k_pages, v_pages, table, int32(drawn.seq_lens), **drawn.options)
    for one, other in zip(got, run_decode(attention_decode, drawn, dense), strict=True):
        assert_bit_equal(one, other)


def test_scales_beyond_int32():
    fields = arguments(Drawn((1,), (13,), num_kv_heads=1, head_dim=16, page_dtype=torch.int8), decode=True)
    for one, other in zip(attention_decode(**far_scales(fields)), attention_decode(**fields), strict=True):
        assert_bit_equal(one, other)


@triton.jit
def merge_kernel(splits, result, num_splits, room):
    merge_splits(splits, result, tl.program_id(0).to(tl.int64), 1, num_splits, room, 16, 4)


def test_merge_beyond_int32():
    """The partial results of the second sequence start past 2^31 elements, as those of hundreds of sequences do."""
    room, rng = 2**31 // 16 + 1, np.random.default_rng(0)
    values, sums = normal(rng, 3, 16), normal(rng, 3, scale=4.0)
    partial, partial_lse = untouched((room + 3) * 16, torch.float32), untouched(room + 3, torch.float32)
    partial[room * 16 :].view(3, 16).copy_(values)
    partial_lse[room:] = sums
    partial_lse[:3] = partial[: 3 * 16] = 0
    out, lse = torch.empty(2, 1, 16, device=DEVICE), torch.empty(2, 1, device=DEVICE)
    merge_kernel[(2,)](Splits(partial, partial_lse, None), Attended(out, lse), 3, room)
    weights = np.exp2(exact(sums))
    assert_within_rounding(out[1, 0], weights @ exact(values) / weights.sum())
    assert_within_rounding(lse[1], np.log(weights.sum(keepdims=True)))


@given(drawn=decodes())
@example(drawn=LLAMA)
@example(drawn=replace(LLAMA, group=70, head_dim=16, num_kv_heads=1))
def test_given_counters_change_no_bit_and_are_zero_again(drawn):
    fields = arguments(drawn, decode=True)
    expected = attention_decode(**fields)
    arrivals = torch.zeros(fields["q"].shape[:2], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        for one, other in zip(attention_decode(**fields, arrivals=arrivals), expected, strict=True):
            assert_bit_equal(one, other)
        assert not arrivals.any()


@pytest.mark.gpu
def test_two_graphs_run_at_the_same_time():
    """Each graph has counters of its own. Splits finish in any order, but they are added in theirs."""
    drawn = Drawn((1,) * 8, (9000, 5000, 300, 7777, 1, 4096, 600, 8191), num_kv_heads=4, group=7, head_dim=128)
    fields = arguments(replace(drawn, dtype=torch.float16), decode=True)
    expected = attention_decode(**fields)
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    found = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            found += [attention_decode(**fields) for _ in range(8)]
    arrivals = torch.zeros(fields["q"].shape[:2], dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        found.append(attention_decode(**fields, arrivals=arrivals))
    torch.cuda.synchronize()
    for results in found:
        for one, other in zip(results, expected, strict=True):
            assert_bit_equal(one, other)


def test_opcheck():
    small = replace(LLAMA, query_lens=(1,), seq_lens=(40,), num_kv_heads=1)
    for drawn in (small, replace(small, page_dtype=torch.int8)):
        fields = arguments(drawn, decode=True)
        for arrivals in (None, torch.zeros(fields["q"].shape[:2], dtype=torch.int32, device=DEVICE)):
            operator = torch.ops.rooflama.attention_decode
            torch.library.opcheck(operator, (), {**fields, "arrivals": arrivals})


def test_compiles_into_one_graph():
    fields = arguments(LLAMA, decode=True)
    q = fields.pop("q")

    def block(q):
        out, lse = attention_decode(q * 2, **fields)
        return out + 1, lse

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(q), block(q), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.gpu
def test_graph_is_replayed_with_other_lengths():
    """Lengths are read on the device: a captured graph serves any that fit its shapes."""
    fields = arguments(replace(LLAMA, seq_lens=(3000, 2000, 700, 1)), decode=True)
    attention_decode(**fields)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(**fields)
    for lens in ((3000, 2000, 700, 1), (1, 0, 256, 1), (257, 1999, 512, 0)):
        fields["seq_lens"].copy_(int32(lens))
        graph.replay()
        for one, other in zip(captured, attention_decode(**fields), strict=True):
            assert_bit_equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 7, 64)}, "7 query heads over 2 K/V heads"),
        ({"q": torch.zeros(3, 8, 64)}, "3 query tokens, 4 sequences"),
        ({"q": torch.zeros(4, 8, 32)}, r"k_pages must have shape \[any, any, any, 32\]"),
        ({"q": torch.zeros(4, 8)}, r"q must have shape \[any, any, any\]"),
        ({"q": torch.zeros(4, 8, 64, dtype=torch.float64)}, "q is torch.float64"),
        ({"q": torch.zeros(4, 8, 64, dtype=torch.float16)}, "pages of floats have the dtype of q"),
        ({"q": torch.zeros(4, 64, 8).transpose(1, 2)}, "last dimension of q must be contiguous"),
        ({"k_pages": torch.zeros(9, 24, 2, 64), "v_pages": torch.zeros(9, 24, 2, 64)}, "page_size is 24"),
        ({"k_pages": torch.zeros(9, 16, 2, 300)}, "head_dim is 300"),
        ({"v_pages": torch.zeros(9, 32, 2, 64)}, "v_pages must have shape"),
        ({"block_table": torch.zeros(4, 9, dtype=torch.int64)}, "block_table must be one of int32"),
        ({"block_table": torch.zeros(4, 9, dtype=torch.int32, device="meta")}, "all tensors of one call live on one"),
        (
            {"block_table": torch.zeros(4, 18, dtype=torch.int32, device=DEVICE)[:, ::2]},
            "last dimension of block_table must be contiguous",
        ),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, r"seq_lens must have shape \[4\]"),
        ({"seq_lens": torch.zeros(4, dtype=torch.int64)}, "seq_lens must be one of int32"),
        ({"seq_lens": torch.zeros(8, dtype=torch.int32, device=DEVICE)[::2]}, "dimension of seq_lens must be contig"),
        ({"v_scale": torch.zeros(1)}, "v_scale is given with torch.float32 pages"),
        ({"arrivals": torch.zeros(4, 7, dtype=torch.int32)}, r"arrivals must have shape \[4, 8\]"),
        ({"arrivals": torch.zeros(4, 8)}, "arrivals must be one of int32"),
        ({"arrivals": torch.zeros(8, 4, dtype=torch.int32, device=DEVICE).T}, "arrivals has strides"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
        ({"softcap": -1.0}, "softcap must be 0 or more"),
        ({"sliding_window": -1}, "sliding_window counts tokens"),
    ],
)
def test_bad_input_is_refused_before_a_launch(change, message):
    fields = arguments(LLAMA, decode=True)
    fields.update({n: x if getattr(x, "is_meta", True) else x.to(DEVICE) for n, x in change.items()})
    with pytest.raises(KernelInputError, match=message):
        attention_decode(**fields)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
@pytest.mark.parametrize(
    ("page_dtype", "names"),
    [(None, ("q", "k_pages", "v_pages")), (None, ("k_pages", "v_pages")), (torch.int8, ("q",))],
)
def test_bfloat16_is_refused_under_the_interpreter(page_dtype, names):
    fields = arguments(replace(LLAMA, page_dtype=page_dtype), decode=True)
    fields |= {name: fields[name].bfloat16() for name in names}
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        attention_decode(**fields)


def test_pages_of_unlike_layout_are_refused():
    fields = arguments(LLAMA, decode=True)
    fields["v_pages"] = fields["v_pages"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(KernelInputError, match="K and V pages must be laid out alike"):
        attention_decode(**fields)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the check would wait for the device")
def test_bad_lengths_and_pages_are_refused_on_the_cpu():
    with pytest.raises(KernelInputError, match="a sequence has 0 to"):
        attention_decode(**{**arguments(LLAMA, decode=True), "seq_lens": int32([1, 2, 3, 9000])})
    fields = arguments(LLAMA, decode=True)
    fields["block_table"][2, 1] = 99
    with pytest.raises(KernelInputError, match=r"block_table\[2\] names pages .* to 99: pages are numbered"):
        attention_decode(**fields)


def test_no_sequences():
    pages = normal(np.random.default_rng(0), 2, 16, 1, 32)
    out, lse = attention_decode(
        torch.zeros(0, 4, 32, device=DEVICE), pages, pages, int32([]).view(0, 3), int32([]), softmax_scale=1.0
    )
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)
