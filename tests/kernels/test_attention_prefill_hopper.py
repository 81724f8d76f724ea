"""attention_prefill by its kernel for Hopper: the definition, and the laws of the plain kernel, where it is chosen."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget

from gluon_roles_in_numpy import Deadlock, Schedule, run_hopper
from rooflama.kernels import attention_prefill, reference
from rooflama.kernels.attention_common import result_like_q, score_rule
from rooflama.kernels.attention_prefill_blocks import Sequences
from rooflama.kernels.attention_prefill_hopper import launch_hopper, serves
from rooflama.kernels.gpu import standing_for
from rooflama.kernels.launch import override
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.attention import (
    Drawn,
    arguments,
    assert_attention,
    define,
    int32,
    paged,
    prefills,
    run_prefill,
    sequences,
    starts,
    with_keys,
)
from rooflama.testing.strategies import DEVICE, seeds

HOPPER = DEVICE.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="wgmma exists on compute capability 9.x alone")


def launched(fields, configuration):
    """(results, what to launch) of a call, on a chip of three multiprocessors."""
    fields = dict(fields)
    rule = score_rule(*(fields.pop(name) for name in ("softmax_scale", "sliding_window", "softcap")))
    pages = (fields[name] for name in ("q", "k_pages", "v_pages"))
    sequences = Sequences(*(fields[name] for name in ("query_start_loc", "block_table", "seq_lens")))
    results = [result.fill_(torch.nan) for result in result_like_q(**fields)]
    chip = SimpleNamespace(multi_processor_count=3)
    with (
        override("attention_prefill_hopper", **configuration),
        mock.patch("torch.cuda.get_device_properties", return_value=chip),
    ):
        return results, launch_hopper(tuple(results), *pages, sequences, rule)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="NumPy works on the CPU's memory")
@given(
    drawn=prefills(
        dtype=st.just(torch.float16), page_dtype=st.just(None), head_dim=st.sampled_from([40, 64, 80, 96, 104, 128])
    ),
    block_n=st.sampled_from([16, 32, 64]),
    stages=st.integers(2, 4),
    consumers=st.sampled_from([2, 3]),
    schedule=seeds,
)
def test_equals_definition_in_numpy(drawn, block_n, stages, consumers, schedule):
    """Whoever runs first, and whenever copies arrive."""
    chosen = {"BLOCK_N": block_n, "STAGES": stages, "CONSUMERS": consumers}
    results, launch = launched(arguments(drawn), chosen)
    run_hopper(launch, schedule)
    dense = sequences(drawn)
    want = define(reference.attention_prefill, drawn, dense, decode=False)
    assert_attention(tuple(results), want, drawn, dense)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="NumPy works on the CPU's memory")
@pytest.mark.parametrize("consumers", [2, 3])
def test_what_no_row_sees_in_numpy(consumers):
    """Keys before the window are NaN. Tokens of no sequence get 0 and -inf. A tile takes four pages."""
    drawn = replace(RAGGED, query_lens=(65, 10), seq_lens=(165, 10), head_dim=80, sliding_window=40)
    dense = sequences(replace(drawn, dtype=torch.float16))
    fields = arguments(replace(drawn, dtype=torch.float16)) | vars(paged(dense, 16, base=165 - 65 - 40 + 1))
    fields["query_start_loc"] = int32([0, 65, 65])
    fields["seq_lens"] = int32([165, 0])
    (out, lse), launch = launched(fields, {"BLOCK_N": 64, "STAGES": 2, "CONSUMERS": consumers})
    run_hopper(launch, 0)
    one = replace(drawn, query_lens=(65,), seq_lens=(165,), dtype=torch.float16)
    want = define(reference.attention_prefill, one, dense[:1], decode=False)
    assert_attention((out[:65], lse[:65]), want, one, dense[:1])
    assert (out[65:] == 0).all()
    assert (lse[65:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("version", "head_dim", "dtype", "chosen"),
    [
        (90, 64, torch.bfloat16, True),
        (90, 32, torch.bfloat16, False),
        (90, 136, torch.bfloat16, False),
        (90, 64, torch.float32, False),
        (80, 64, torch.bfloat16, False),
        (100, 64, torch.bfloat16, False),
    ],
)
def test_chip_and_pages_choose_the_kernel(version, head_dim, dtype, chosen):
    pages = torch.empty(4, 16, 2, head_dim, dtype=dtype, device="meta")
    with standing_for(GPUTarget("cuda", version, 32)):
        assert serves(pages[0], pages, pages) == chosen


def test_partitions_that_wait_for_each_other_are_noticed():
    schedule = Schedule(0)
    with pytest.raises(Deadlock):
        schedule.run([lambda: None, lambda: schedule.pause(lambda: False)])


# ragged; a sequence without queries; one whose queries are all it has; keys that end within a tile, or at its end
RAGGED = Drawn(query_lens=(300, 0, 37, 1, 50), seq_lens=(700, 5, 37, 261, 384), num_kv_heads=2, group=3)
DRAWN = [
    replace(RAGGED, head_dim=128, page_size=64, dtype=torch.bfloat16),
    replace(RAGGED, head_dim=64, page_size=16, dtype=torch.float16, sliding_window=40),
    replace(RAGGED, head_dim=96, page_size=256, dtype=torch.bfloat16, softcap=5.0),
    replace(RAGGED, head_dim=80, page_size=128, dtype=torch.float16, sliding_window=200, softcap=30.0),
]
each = pytest.mark.parametrize("drawn", DRAWN, ids=lambda drawn: f"d{drawn.head_dim}")


def attend(drawn, dense, **pages):
    fields = arguments(drawn)
    assert serves(fields["q"], fields["k_pages"], fields["v_pages"])
    return run_prefill(attention_prefill, drawn, dense, **pages)


@on_hopper
@each
def test_equals_definition(drawn):
    """Slots that no sequence owns, and pages beyond a table's end, hold NaN or do not exist."""
    dense = sequences(drawn)
    want = define(reference.attention_prefill, drawn, dense, decode=False)
    assert_attention(attend(drawn, dense), want, drawn, dense)


@on_hopper
@each
def test_pages_chunks_and_batch_change_no_bit(drawn):
    dense = sequences(drawn)
    whole = attend(drawn, dense)
    for page_size, seed in ((16, 1), (64, 2), (256, 3)):
        for one, other in zip(attend(replace(drawn, page_size=page_size), dense, seed=seed), whole, strict=True):
            assert_bit_equal(one, other, context=f"page_size={page_size}")
    alone = [attend(drawn, [one]) for one in dense]
    for one, others in zip(whole, zip(*alone, strict=True), strict=True):
        assert_bit_equal(one, torch.cat(others))
    context = len(dense[0].k) - len(dense[0].q)
    for start, end in ((0, 1), (1, 130), (130, 259), (259, 300)):
        part = [replace(with_keys(dense[:1], context + end)[0], q=dense[0].q[start:end])]
        for one, other in zip(attend(drawn, part), whole, strict=True):
            assert_bit_equal(one, other[start:end], context=f"chunk {start}:{end}")


@on_hopper
def test_keys_before_the_window_are_not_read():
    drawn = replace(DRAWN[1], query_lens=(300,), seq_lens=(700,))
    dense = sequences(drawn)
    gone = attend(drawn, dense, base=700 - 300 - 40 + 1)
    for one, other in zip(gone, attend(drawn, dense), strict=True):
        assert_bit_equal(one, other)


@on_hopper
def test_programs_that_take_many_blocks_and_a_replayed_graph():
    """More blocks than multiprocessors, then other lengths in the same captured graph; equal to the plain kernel."""
    drawn = replace(DRAWN[0], query_lens=(2000, 900, 7), seq_lens=(2000, 1700, 133), num_kv_heads=4, group=4)
    fields = arguments(drawn)
    attention_prefill(**fields)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_prefill(**fields)
    for query_lens, seq_lens in (
        (drawn.query_lens, drawn.seq_lens),
        ((1, 2000, 30), (36, 1700, 100)),
        ((0, 500, 0), (0, 900, 9)),
    ):
        fields["seq_lens"].copy_(int32(seq_lens))
        fields["query_start_loc"].copy_(starts(query_lens))
        graph.replay()
        for one, other in zip(captured, attention_prefill(**fields), strict=True):
            assert_bit_equal(one, other)
        with override("attention_prefill_hopper", STAGES=0):
            plain = attention_prefill(**fields)
        torch.testing.assert_close(captured[0], plain[0], rtol=2e-2, atol=4e-3)
        torch.testing.assert_close(captured[1], plain[1], rtol=1e-4, atol=1e-4)


@on_hopper
def test_bound_launches_follow_their_pages():
    """The second call has the signature of the first and other addresses."""
    one, other = (arguments(replace(DRAWN[0], seed=seed)) for seed in (1, 2))
    first = attention_prefill(**one)
    second = attention_prefill(**other)
    for was, now in zip(first, attention_prefill(**one), strict=True):
        assert_bit_equal(was, now)
    assert not torch.equal(first[0], second[0])
