"""Embedding: rows of the dequantised table, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assertions import assert_bit_equal, assert_guards_intact
from quant_blocks import TYPES, guarded_weight, random_weight, some_columns, virtual_rows
from rooflama.kernels import KernelInputError, dequantize, embedding, reference
from strategies import DEVICE, dtypes, guarded, seeds


@pytest.mark.parametrize("ggml_type", TYPES)
@given(
    num_tokens=st.integers(0, 9),
    vocab=st.integers(1, 20),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    data=st.data(),
    dtype=dtypes,
    seed=seeds,
)
def test_embedding_equals_dequantised_rows(ggml_type, num_tokens, vocab, id_dtype, data, dtype, seed):
    columns = data.draw(st.sampled_from(some_columns(ggml_type)))
    rng = np.random.default_rng(seed)
    table, buffers = guarded_weight(random_weight(rng, ggml_type, vocab, columns))
    token_ids, _ = guarded(torch.from_numpy(rng.integers(0, vocab, num_tokens)).to(device=DEVICE, dtype=id_dtype))
    context = f"{ggml_type} [{vocab}, {columns}] num_tokens={num_tokens} {dtype} seed={seed}"
    got = embedding(token_ids, table, dtype)
    assert_bit_equal(got, dequantize(table, dtype)[token_ids.long()], context=context)
    for buffer in buffers:
        assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_definition_reads_rows_of_the_dequantised_table(ggml_type, numpy_backend):
    table = random_weight(np.random.default_rng(0), ggml_type, 7, 256)
    token_ids = torch.tensor([6, 0, 6], device=DEVICE)
    expected = torch.from_numpy(reference.dequantize(table.numpy())).to(DEVICE)[token_ids]
    assert_bit_equal(embedding(token_ids, table), expected)


def test_rows_beyond_int32():
    """Row 2^25 + 1 of 64 columns starts past 2^31; the storage is virtual, only one row of it is touched."""
    table = virtual_rows(2**25 + 2, 64)
    row = torch.arange(64, dtype=torch.float16, device=DEVICE)
    table.planes[0][2**25 + 1] = row
    token_ids = torch.tensor([2**25 + 1], device=DEVICE)
    assert_bit_equal(embedding(token_ids, table, torch.float16)[0], row)


@pytest.mark.gpu
@pytest.mark.parametrize("token_id", [-1, 7, 2**31 - 1])
def test_a_token_outside_the_table_gives_nan_on_a_gpu(token_id):
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    assert bool(embedding(torch.tensor([token_id], device=DEVICE), table).isnan().all())


def test_opcheck():
    table = random_weight(np.random.default_rng(0), "Q6_K", 7, 256)
    arguments = (torch.tensor([3, 0], device=DEVICE), list(table.planes), "Q6_K", 7, 256, torch.float16)
    torch.library.opcheck(torch.ops.rooflama.embedding_planes, arguments)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the ids are not looked at")
@pytest.mark.parametrize("token_id", [-1, 7])
def test_a_token_outside_the_table_is_refused_on_a_cpu(token_id):
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    with pytest.raises(KernelInputError, match="below the 7 rows of the table"):
        embedding(torch.tensor([0, token_id]), table)


@pytest.mark.parametrize(
    ("token_ids", "dtype", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.float32, r"token_ids must have shape \[any\]"),
        (torch.zeros(2), torch.float32, "token_ids is torch.float32"),
        (torch.zeros(4, device=DEVICE).long()[::2], torch.float32, "last dimension of token_ids must be contiguous"),
        (torch.zeros(2, dtype=torch.int64), torch.int32, "dtype is torch.int32"),
    ],
)
def test_bad_input_is_refused_before_a_launch(token_ids, dtype, message):
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    with pytest.raises(KernelInputError, match=message):
        embedding(token_ids.to(DEVICE), table, dtype)
