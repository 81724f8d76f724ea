"""The interpreter's tl.dot sums in order, and an access beyond a tensor's ends fails."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + n * K + tl.arange(0, K)[:, None])  # [N, K], read transposed
    tl.store(out_ptr + m * N + n, tl.dot(a, b, input_precision="ieee"))


def dot(a, b):
    out = torch.empty(a.shape[0], b.shape[0], device=DEVICE)
    _dot_kernel[(1,)](a, b, out, *out.shape, a.shape[1])
    return out


def operands(m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, k, generator=generator).to(DEVICE) for size in (m, n))


sizes = st.sampled_from([16, 32, 64])


@given(m=sizes, n=sizes, k=sizes, seed=st.integers(0, 99))
def test_an_element_depends_on_its_row_and_column_alone(m, n, k, seed):
    a, b = operands(m, n, k, seed)
    whole = dot(a, b)
    assert_bit_equal(dot(a.flip(0), b.roll(1, 0)), whole.flip(0).roll(1, 1), context="moved")
    assert_bit_equal(dot(a[-16:].contiguous(), b[:16].contiguous()), whole[-16:, :16], context="in a smaller tile")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, shift, read, written, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + shift + offs, mask=offs < read, other=0.0)
    tl.store(out_ptr + shift + offs, x, mask=offs < written)


class Copied(NamedTuple):
    x: torch.Tensor
    read: int


@triton.jit
def _copy_of_tuple_kernel(copied, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(copied.x + offs, mask=offs < copied.read, other=0.0), mask=offs < 4)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU compute-sanitizer watches")
def test_a_tensor_within_a_tuple_is_watched():
    x, out = torch.ones(2, 12)[:, 4:8]
    _copy_of_tuple_kernel[(1,)](Copied(x, 4), out, BLOCK=8)
    assert out.tolist() == [1.0] * 4
    with pytest.raises(Exception, match="an access beyond the tensors' ends"):
        _copy_of_tuple_kernel[(1,)](Copied(x, 5), out, BLOCK=8)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU compute-sanitizer watches")
@pytest.mark.parametrize(("shift", "read", "written"), [(0, 5, 4), (0, 4, 5), (-1, 4, 1)])
def test_an_access_beyond_a_tensor_is_refused(shift, read, written):
    """Even where memory goes on: x and out are parts of larger buffers, and what is read beyond is thrown away."""
    x, out = torch.ones(2, 12)[:, 4:8]
    _copy_kernel[(1,)](x, out, 0, 4, 4, BLOCK=8)
    assert out.tolist() == [1.0] * 4
    with pytest.raises(Exception, match="an access beyond the tensors' ends"):
        _copy_kernel[(1,)](x, out, shift, read, written, BLOCK=8)
