"""Embedding: rows of the dequantised table, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, dequantize, embedding, reference
from rooflama.kernels.embedding import _embedding_kernel
from rooflama.kernels.quantized_tiles import planes_of
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.strategies import DEVICE, dtypes, guarded, seeds
from rooflama.testing.weights import TYPES, guarded_weight, random_weight, some_columns, virtual_rows


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


def test_the_same_call_gives_the_same_bits():
    rng = np.random.default_rng(0)
    table, token_ids = random_weight(rng, "Q4_K", 9, 768), torch.from_numpy(rng.integers(0, 9, 5)).to(DEVICE)
    assert_bit_equal(embedding(token_ids, table), embedding(token_ids, table))


@pytest.mark.parametrize(("ggml_type", "row"), [("F16", 2**25 + 1), ("Q8_0", 2**27 + 1)])
def test_rows_beyond_int32(ggml_type, row):
    """Row of 64 weights, or 16 words of codes, past 2^31; the storage is virtual, one row of it is touched."""
    table = virtual_rows(row + 1, 64, ggml_type)
    one = random_weight(np.random.default_rng(0), ggml_type, 1, 64)
    for plane, values in zip(table.planes, one.planes, strict=True):
        plane[row] = values[0]
    token_ids = torch.tensor([row], device=DEVICE)
    assert_bit_equal(embedding(token_ids, table, torch.float16), dequantize(one, torch.float16))


def test_output_beyond_int32():
    """Token 2's row starts past 2^31. Only the first program of each row runs; both storages are virtual."""
    columns = 2**30 + 32
    table, out = virtual_rows(3, columns), virtual_rows(3, columns).planes[0]
    table.planes[0][:, :32] = torch.arange(96, device=DEVICE).view(3, 32)
    token_ids = torch.tensor([2, 0, 1], device=DEVICE)
    _embedding_kernel[(3, 1)](token_ids, planes_of(table), out, 3, columns, columns, LAYOUT=table.layout, BLOCK_K=32)
    assert_bit_equal(out[:, :32], table.planes[0][:, :32][token_ids])


@pytest.mark.parametrize("token_id", [-1, 7, 2**31 - 1])
def test_a_token_outside_the_table_gives_nan_in_the_kernel(token_id):
    """Launched without the launcher, which looks at the ids where it can; nothing outside the table is read."""
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    out = torch.zeros(2, 64, device=DEVICE)
    token_ids = torch.tensor([token_id, 6], device=DEVICE)
    _embedding_kernel[(2, 1)](token_ids, planes_of(table), out, 7, 64, 2, LAYOUT=table.layout, BLOCK_K=64)
    assert bool(out[0].isnan().all())
    assert_bit_equal(out[1:], dequantize(table)[6:])


def test_opcheck():
    table = random_weight(np.random.default_rng(0), "Q6_K", 7, 256)
    arguments = (torch.tensor([3, 0], device=DEVICE), "Q6_K", list(table.planes), [7, 256], torch.float16)
    torch.library.opcheck(torch.ops.rooflama.embedding, arguments)


def test_compiles_into_one_graph():
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    token_ids = torch.tensor([3, 0], device=DEVICE)
    compiled = torch.compile(lambda ids: embedding(ids, table) + 1, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(token_ids), embedding(token_ids, table) + 1)


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


def test_a_table_that_does_not_fit_its_type_is_refused():
    table, token_ids = random_weight(np.random.default_rng(0), "Q4_1", 7, 64), torch.zeros(2, device=DEVICE).long()
    for broken, message in [
        (table._replace(ggml_type="IQ1_S"), "a type is one of F32, F16"),
        (table._replace(shape=(8, 64)), r"table has planes .* has contiguous planes on one device, low \[8, 8\]"),
    ]:
        with pytest.raises(KernelInputError, match=message):
            embedding(token_ids, broken)


def test_tensors_on_two_devices_are_refused():
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    with pytest.raises(KernelInputError, match=r"token_ids on meta.*all tensors of one call live on one device"):
        embedding(torch.zeros(2, dtype=torch.int64, device="meta"), table)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    table = random_weight(np.random.default_rng(0), "Q4_1", 7, 64)
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        embedding(torch.zeros(1, dtype=torch.int64), table, torch.bfloat16)
