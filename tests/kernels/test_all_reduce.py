"""Sums over ranks against their definition, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, all_reduce, one_shot_sum, reference, sum_parts, use_backend
from rooflama.kernels.all_reduce import BLOCK, Peers
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.testing.strategies import DEVICE, dtypes, exact, guarded, normal, seeds

sizes = {"ranks": st.integers(1, 5), "num_tokens": st.integers(0, 3), "columns": st.integers(1, 1500)}
optional = {"biased": st.booleans(), "joined": st.booleans()}


def drawn(rng, ranks, num_tokens, columns, dtype=torch.float32, biased=True, joined=True):
    parts = normal(rng, ranks, num_tokens, columns, dtype=dtype)
    bias = normal(rng, columns) if biased else None
    return parts, bias, normal(rng, num_tokens, columns, dtype=dtype) if joined else None


def torch_sum(parts, bias, residual):
    total = parts.float().sum(0)
    for more in (bias, residual):
        total = total if more is None else total + more.float()
    return total.to(parts.dtype)


def arrived(parts, rank, capacity, launches=0):
    """Peers of ``rank`` whose addends for its next launch are in place, and their flags raised."""
    ranks, blocks = len(parts), capacity // BLOCK
    number, size = launches + 1, parts[0].numel()
    slots, flags = [], []
    for other in range(ranks):
        slots.append(torch.full((2, capacity), float("nan"), dtype=parts.dtype, device=DEVICE))
        flags.append(torch.zeros(2, blocks, ranks, dtype=torch.int32, device=DEVICE))
        if other != rank:
            slots[other][number % 2, :size] = parts[other].flatten()
    flags[rank][number % 2] = number
    flags[rank][number % 2, :, rank] = 0
    counts = torch.full((blocks,), launches, dtype=torch.int32, device=DEVICE)
    return Peers(tuple(slots), tuple(flags), counts, rank)


@given(**sizes, **optional, dtype=dtypes, seed=seeds)
def test_sum_parts_equals_definition(ranks, num_tokens, columns, biased, joined, dtype, seed):
    parts, bias, residual = drawn(np.random.default_rng(seed), ranks, num_tokens, columns, dtype, biased, joined)
    parts, buffer = guarded(parts)
    got = sum_parts(parts, bias, residual)
    wide = [None if one is None else exact(one) for one in (parts, bias, residual)]
    context = f"{ranks} x [{num_tokens}, {columns}] seed={seed}"
    assert_within_rounding(got, reference.sum_parts(*wide), torch_sum(parts, bias, residual), context=context)
    assert_guards_intact(buffer, context=context)


def test_definition_equals_torch():
    parts, bias, residual = (np.random.default_rng(0).standard_normal(s) for s in ((3, 2, 5), (5,), (2, 5)))
    np.testing.assert_allclose(reference.sum_parts(parts, bias, residual), parts.sum(0) + bias + residual, rtol=1e-14)


@given(ranks=st.integers(1, 4), num_tokens=st.integers(1, 3), columns=st.integers(1, 1200), seed=seeds, data=st.data())
def test_one_shot_gives_the_bits_of_sum_parts_on_every_rank(ranks, num_tokens, columns, seed, data):
    parts, bias, residual = drawn(np.random.default_rng(seed), ranks, num_tokens, columns)
    launches = data.draw(st.integers(0, 3) | st.just(2**31 - 1), label="launches before")
    capacity = -(-num_tokens * columns // BLOCK) * BLOCK
    for rank in range(ranks):
        peers = arrived(parts, rank, capacity, launches if launches < 2**31 - 1 else -(2**31))
        got = one_shot_sum(parts[rank].contiguous(), peers, bias, residual)
        assert_bit_equal(got, sum_parts(parts, bias, residual), context=f"rank {rank} of {ranks} seed={seed}")


@given(ranks=st.integers(2, 4), columns=st.integers(1, 2500), launches=st.integers(0, 5), seed=seeds)
def test_one_shot_tells_its_peers_and_leaves_them_its_addend(ranks, columns, launches, seed):
    parts, bias, residual = drawn(np.random.default_rng(seed), ranks, 1, columns)
    rank, number = seed % ranks, launches + 1
    peers = arrived(parts, rank, 4 * BLOCK, launches)
    before = [slots.clone() for slots in peers.slots]
    one_shot_sum(parts[rank].contiguous(), peers, bias, residual)
    used = -(-columns // BLOCK)
    assert_bit_equal(peers.slots[rank][number % 2, :columns], parts[rank, 0])
    assert peers.launches.tolist() == [number] * used + [launches] * (4 - used)
    for other in range(ranks):
        raised = peers.flags[other][number % 2, :, rank].tolist()
        assert raised == ([number] * used + [0] * (4 - used) if other != rank else [0] * 4)
        assert not peers.flags[other][launches % 2].any()
        assert_bit_equal(peers.slots[other][launches % 2], before[other][launches % 2])  # a peer may still read it
        if other != rank:
            assert_bit_equal(peers.slots[other], before[other])


def test_one_shot_by_its_definition():
    parts, bias, residual = drawn(np.random.default_rng(0), 3, 2, 100)
    for launches in (0, 1):
        with use_backend("numpy"):
            got = one_shot_sum(parts[1].contiguous(), arrived(parts, 1, BLOCK, launches), bias, residual)
        assert_within_rounding(got, exact(torch_sum(parts, bias, residual)))


def test_a_peer_that_does_not_come_gives_nan(monkeypatch):
    """Instead of a GPU that never ends its work."""
    monkeypatch.setattr(all_reduce, "MOST_TRIES", 3)
    one_shot_sum.forget()
    parts, *_ = drawn(np.random.default_rng(0), 2, 1, 10)
    peers = arrived(parts, 0, BLOCK)
    peers.flags[0].zero_()
    assert one_shot_sum(parts[0].contiguous(), peers).isnan().all()
    one_shot_sum.forget()


@given(ranks=st.integers(2, 4), num_tokens=st.integers(2, 4), columns=st.integers(1, 1200), dtype=dtypes, seed=seeds)
def test_batch_invariance(ranks, num_tokens, columns, dtype, seed):
    """A token's bits do not depend on the tokens beside it."""
    parts, bias, residual = drawn(np.random.default_rng(seed), ranks, num_tokens, columns, dtype)
    rows = [slice(i, i + 1) for i in range(num_tokens)]
    alone = torch.cat([sum_parts(parts[:, i].contiguous(), bias, residual[i]) for i in rows])
    assert_bit_equal(sum_parts(parts, bias, residual), alone)


def test_addends_are_summed_in_the_order_of_the_ranks():
    """1 + 2^24 rounds to 2^24 in float32, so only the order of the ranks gives 1."""
    parts = torch.tensor([[[2.0**24]], [[-(2.0**24)]], [[1.0]]], device=DEVICE)
    assert sum_parts(parts).item() == 1.0
    assert sum_parts(parts[[2, 0, 1]].contiguous()).item() == 0.0


def test_opcheck():
    parts = torch.randn(2, 3, 40, device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.sum_parts, (parts, torch.ones(40, device=DEVICE)))


PARTS = torch.zeros(2, 3, 8, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sum_parts(PARTS[0]), r"parts must have shape \[any, any, any\]"),
        (lambda: sum_parts(PARTS[:0]), "a sum over ranks has at least one addend"),
        (lambda: sum_parts(PARTS.transpose(1, 2)), "parts: must be contiguous"),
        (lambda: sum_parts(PARTS.int()), "parts is torch.int32"),
        (lambda: sum_parts(PARTS, bias=PARTS[0, 0, :7]), r"bias must have shape \[8\]"),
        (lambda: sum_parts(PARTS, residual=PARTS[0, :2]), r"residual must have shape \[3, 8\]"),
        (lambda: one_shot_sum(PARTS[0], PARTS), "peers is a Tensor"),
        (lambda: one_shot_sum(PARTS[0].half(), arrived(PARTS, 0, BLOCK)), "slots is torch.float32"),
        (lambda: one_shot_sum(torch.zeros(2, BLOCK, device=DEVICE), arrived(PARTS, 0, BLOCK)), "exchange at most 1024"),
        (lambda: one_shot_sum(PARTS[0, :, ::2], arrived(PARTS, 0, BLOCK)), "addend: must be contiguous"),
    ],
)
def test_bad_input_is_refused_before_a_launch(call, message):
    with pytest.raises(KernelInputError, match=message):
        call()
