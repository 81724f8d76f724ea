"""Shares of ranks: together they are the model, each is cut at heads and blocks, and what cannot be cut is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo_oracle import checkpoint_path
from rooflama import ConfigError, plan_memory
from rooflama.kernels import dequantize, use_backend
from rooflama.kernels.all_reduce import peers_bytes
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.gguf.types import TYPE_SIZES
from rooflama.models import CheckpointReader, adapter_for, checkpoint_weights
from rooflama.models.share import ALONE, Share
from rooflama.testing.weights import TYPES, gguf_dequantize, random_blocks
from small_checkpoint import write_small
from tiny_checkpoints import Blocks, write_gguf

ranks = st.integers(1, 8)


def config_with(tmp_path, **changes):
    with read_gguf(write_small(tmp_path / "small.gguf")) as file:
        return dataclasses.replace(adapter_for("llama").read_config(CheckpointReader(file)), **changes)


@given(size=ranks, total=st.integers(0, 100))
def test_parts_follow_each_other_and_differ_by_one_at_most(size, total):
    parts = [Share(rank, size).part(total) for rank in range(size)]
    assert [row for part in parts for row in range(total)[part]] == list(range(total))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths)  # a plan is that of rank 0


@given(size=ranks, kv_heads=ranks, group=st.integers(1, 6), head_dim=st.integers(1, 3))
def test_heads_of_all_ranks_are_the_models(tmp_path, size, kv_heads, group, head_dim):
    heads = kv_heads * group
    config = config_with(tmp_path, num_heads=heads, num_kv_heads=kv_heads, head_dim=2 * head_dim)
    if heads % size or (kv_heads % size and size % kv_heads):
        with pytest.raises(ConfigError):
            Share(0, size).check(config, ())
        return
    seen = []
    for rank in range(size):
        share = Share(rank, size)
        mine = share.of(config)
        assert mine.num_heads * size == heads
        rows = share.qkv_rows(config).reshape(-1, config.head_dim)
        assert (rows == rows[:, :1] + np.arange(config.head_dim)).all()  # whole heads
        q, k, v = np.split(rows[:, 0] // config.head_dim, [mine.num_heads, mine.num_heads + mine.num_kv_heads])
        assert (v - k == kv_heads).all()
        for query, key in enumerate(np.repeat(k, mine.group_size)):  # each with the key that it has in the whole model
            assert q[query] // config.group_size == key - heads
        seen += [*q, *k, *v]
    copies = max(1, size // kv_heads)
    assert sorted(seen) == sorted([*range(heads), *np.repeat(np.arange(heads, heads + 2 * kv_heads), copies)])


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_cut_by_columns_at_its_blocks(kind, tmp_path):
    block = TYPE_SIZES[kind][0]
    columns = 6 * block
    raw = random_blocks(np.random.default_rng(0), kind, 5, columns)
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "llama"}, {"w": Blocks(raw, kind)})
    whole = gguf_dequantize(raw, kind).reshape(5, columns)
    with read_gguf(path) as file, use_backend("numpy"):
        for size in (2, 3):
            for rank in range(size):
                part = Share(rank, size).part(columns)
                cut = CheckpointReader(file).host_matrix("w", (5, columns), np.array([3, 0, 4]), part)
                assert cut.shape == (3, columns // size)
                np.testing.assert_array_equal(dequantize(cut).numpy(), whole[[3, 0, 4], part])


@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_shares_of_the_weights_sum_to_the_model(backend, tmp_path):
    """All but norms, which every rank has; the vocabulary of 260 is cut into 130 and 130."""
    with read_gguf(write_small(tmp_path / "small.gguf")) as file:
        reader, adapter = CheckpointReader(file), adapter_for("llama")
        config = adapter.read_config(reader)
        alone = checkpoint_weights(reader, config, adapter, backend)
        shares = [checkpoint_weights(reader, config, adapter, backend, Share(rank, 2)) for rank in (0, 1)]
    norms = 4 * config.hidden_size * (2 * config.num_layers + 1)
    assert sum(sum(share.resident.values()) for share in shares) == sum(alone.resident.values()) + norms
    assert all(sum(share.allocations) == sum(share.resident.values()) for share in shares)


def test_what_cannot_be_cut_is_refused_with_what_would_work(tmp_path):
    with pytest.raises(ConfigError, match=r"135M.* on 2 ranks: 9 query heads: .*Use 1 or 3 ranks\.$"):
        plan_memory(checkpoint_path(), device="cuda", tensor_parallel=2)
    config = config_with(tmp_path, num_heads=12, num_kv_heads=4, intermediate_size=96)
    for size, cuts, message in (
        (6, (), "4 key/value heads"),
        (4, {(96, 32)}, "rows of 3 quantisation blocks of 32: .*Use 1 rank"),
        (12, {(64, 1)}, "rows of 64 quantisation blocks of 1: .*Use 1, 2 or 4 ranks"),
    ):
        with pytest.raises(ConfigError, match=f"on {size} ranks: {message}"):
            Share(0, size).check(config, cuts)
    with pytest.raises(ConfigError, match="a feed-forward width of 95"):
        Share(0, 2).check(dataclasses.replace(config, intermediate_size=95), ())


def test_a_plan_of_ranks():
    plans = [plan_memory(checkpoint_path(), device="cuda", context=4096, tensor_parallel=n) for n in (1, 3)]
    alone, shared = plans
    assert shared.ranks == 3
    assert shared.bytes_of("keys and values") * 3 == alone.bytes_of("keys and values")
    assert alone.bytes_of("weights") / 3 < shared.bytes_of("weights") < alone.bytes_of("weights") / 2.98
    of = {line.name: line.nbytes for line in shared.lines}
    assert of["collectives library"]
    assert of["addends of ranks"] == peers_bytes(262_144, 2, 3)  # three ranks exchange 512 KiB in one launch
    assert shared.addend_elements == 2048 * 576
    assert {"sums over ranks", "logits of all ranks"} <= {
        line.name for line in shared.lines if line.group == "CUDA graph"
    }
    assert not {"sums over ranks", "addends of ranks", "collectives library"} & {line.name for line in alone.lines}
    assert ALONE.of(alone.config) == alone.config
