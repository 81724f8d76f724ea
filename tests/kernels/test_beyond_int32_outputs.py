"""Outputs and workspaces whose offsets pass 2^31, of launches as they are: gigabytes, so on a GPU only.

Inputs repeat one row by a stride of 0. The other tests of offsets, which run everywhere, are beside each kernel's.
"""

import numpy as np
import pytest
import torch

from rooflama.kernels import add_rms_norm, attention_decode, attention_prefill, gather_kv, rms_norm, swiglu
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE, beyond_int32, normal

pytestmark = pytest.mark.gpu
COLUMNS = 32768
ROWS = 2**31 // COLUMNS + 2


def repeated(rows=ROWS, *shape):
    x = normal(np.random.default_rng(0), 1, *(shape or (COLUMNS,)), dtype=torch.float16)
    return x.expand(rows, *x.shape[1:])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_norm_beyond_int32():
    x, weight = repeated(), torch.ones(COLUMNS, device=DEVICE)
    out = rms_norm(x, weight, 1e-5)
    assert_bit_equal(out[-1], out[0])
    for out in add_rms_norm(x, x, weight, 1e-5):
        assert_bit_equal(out[-1], out[0])


def test_swiglu_beyond_int32():
    out = swiglu(repeated(), repeated())
    assert_bit_equal(out[-1], out[0])


def test_prefill_beyond_int32():
    """Every key lies in one page and each query sees its own key alone: the value of its place in the page."""
    heads, head_dim = 64, 256
    num_tokens = 2**31 // (heads * head_dim) + 16
    k, v = (normal(np.random.default_rng(seed), 1, 16, 1, head_dim, dtype=torch.float16) for seed in (1, 2))
    table = torch.zeros(1, num_tokens // 16, dtype=torch.int32, device=DEVICE)
    out, _ = attention_prefill(
        repeated(num_tokens, heads, head_dim), k, v, table, int32(num_tokens), int32(0, num_tokens),
        softmax_scale=0.1, sliding_window=1,
    )  # fmt: skip
    assert_bit_equal(out[-16:], v[0].expand(-1, heads, -1))


def test_decode_workspace_beyond_int32():
    """The last of many sequences alone has keys, and several splits."""
    num_seqs, heads, head_dim = 16385, 32, 128
    k, v = (normal(np.random.default_rng(seed), 32, 16, 1, head_dim, dtype=torch.float16) for seed in (1, 2))
    q = repeated(num_seqs, heads, head_dim)
    table = torch.arange(32, dtype=torch.int32, device=DEVICE).repeat(16).expand(num_seqs, -1)
    lens = torch.zeros(num_seqs, dtype=torch.int32, device=DEVICE)
    lens[-1] = 500
    together = attention_decode(q, k, v, table, lens, softmax_scale=0.1)
    alone = attention_decode(q[:1], k, v, table[:1], lens[-1:], softmax_scale=0.1)
    for one, other in zip(together, alone, strict=True):
        assert_bit_equal(one[-1:], other)


def test_gather_beyond_int32():
    """Into an output of that size, by a table whose last row lies that far away."""
    heads, head_dim = 64, 256
    num_keys = 2**31 // (heads * head_dim) // 16 * 16 + 32
    pages = normal(np.random.default_rng(0), 1, 16, heads, head_dim, dtype=torch.float16)
    table = beyond_int32(torch.zeros(3, num_keys // 16, dtype=torch.int32, device=DEVICE))
    out = gather_kv(pages, table, int32(0, 0, num_keys), num_keys=num_keys)
    assert_bit_equal(out[-16:], pages[0])
