"""The vLLM backend: its registration, what it declares, and a layer's attention over vLLM's cache.

Where vLLM is not installed, its classes are those of ``tests/fake_vllm``.
"""

import math
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import swap
from rooflama.kernels.kernel import KERNELS
from rooflama.models import ArgumentError
from rooflama.testing.assertions import assert_within_rounding
from rooflama.testing.attention import NAN, int32, score_span, starts, units
from rooflama.testing.strategies import DEVICE, dtypes, exact, normal, seeds

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def vllm():
    if find_spec("vllm") is not None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "fake_vllm"))
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.pop("rooflama.integrations.vllm.backend", None)


def backend():
    return import_module("rooflama.integrations.vllm.backend")


def test_the_entry_point_registers_the_backend():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = entry["rooflama"].partition(":")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register = getattr(import_module(module), name)
    custom = AttentionBackendEnum.CUSTOM
    custom.clear_override()
    register()
    register()
    assert custom.get_class() is backend().RooflamaBackend
    assert custom.get_class().get_name() == "CUSTOM"
    register_backend(custom, "another.plugin.Backend")
    register()
    assert custom.get_path() == "another.plugin.Backend"
    custom.clear_override()


def test_what_it_declares():
    declared = backend().RooflamaBackend
    assert [size for size in (1, 64, 80, 100, 128, 256, 257, 576) if declared.supports_head_size(size)][-2:] == [
        128,
        256,
    ]
    assert declared.supports_dtype(torch.bfloat16)
    assert declared.supports_kv_cache_dtype("auto")
    assert not declared.supports_kv_cache_dtype("fp8")
    assert not declared.supports_attn_type("encoder_only")
    assert not declared.supports_sink()
    assert not declared.supports_non_causal()
    assert [size for size in (8, 16, 24, 48, 256) if declared.supports_block_size(size)] == [16, 48, 256]
    assert [major for major in (7, 8, 9) if declared.supports_compute_capability(SimpleNamespace(major=major))] == [
        8,
        9,
    ]
    support = declared.get_builder_cls().get_cudagraph_support(None, None)
    assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE"


@dataclass(frozen=True)
class Drawn:
    lens: tuple[tuple[int, int], ...]  # queries and keys of each sequence, the new ones included
    padding: int  # tokens behind the last sequence
    group: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    sliding_window: int | None
    soft_cap: float | None
    order: tuple[int, int, int, int]  # of the cache's axes in memory
    seed: int

    def impl(self):
        scale = 1 / math.sqrt(self.head_size)
        options = {"sliding_window": self.sliding_window, "logits_soft_cap": self.soft_cap}
        return backend().RooflamaImpl(2 * self.group, self.head_size, scale, 2, **options)


@st.composite
def batches(draw, queries=None):
    lens = []
    for _ in range(draw(st.integers(1, 2))):
        count = draw(st.integers(1, 8)) if queries is None else queries
        lens.append((count, count + draw(st.integers(0, 10) | st.integers(0, 60))))
    return Drawn(
        lens=tuple(lens),
        padding=draw(st.integers(0, 3)),
        group=draw(st.sampled_from([1, 3, 4])),
        head_size=draw(st.sampled_from([16, 80])),
        block_size=draw(st.sampled_from([16, 32])),
        dtype=draw(dtypes),
        sliding_window=draw(st.none() | st.integers(1, 30)),
        soft_cap=draw(st.sampled_from([None, 5.0])),
        order=draw(st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])),
        seed=draw(seeds),
    )


def run(drawn):
    """(output, the formula in float64 and in the drawn dtype, ``units``): old keys, then a step as vLLM runs it."""
    rng = np.random.default_rng(drawn.seed)
    size, heads = drawn.head_size, 2 * drawn.group
    counts = [-(-keys // drawn.block_size) for _, keys in drawn.lens]
    blocks = rng.permutation(sum(counts) + 1)
    shape = (len(blocks), 2, drawn.block_size, 2 * size)
    memory = torch.full([shape[axis] for axis in drawn.order], NAN, dtype=drawn.dtype, device=DEVICE)
    kv_cache = memory.permute([drawn.order.index(axis) for axis in range(4)])
    table = np.zeros((len(counts), max(counts) + 1), dtype=int)
    queries, new_keys, new_values, new_slots, wide, same, whole = [], [], [], [], [], [], []
    impl, layer = drawn.impl(), torch.nn.Module()
    for row, (count, (length, keys)) in enumerate(zip(counts, drawn.lens, strict=True)):
        table[row, :count], blocks = blocks[:count], blocks[count:]
        q, k, v = (normal(rng, n, h, size, dtype=drawn.dtype) for n, h in ((length, heads), (keys, 2), (keys, 2)))
        slots = table[row, np.arange(keys) // drawn.block_size] * drawn.block_size + np.arange(keys) % drawn.block_size
        slots = torch.from_numpy(slots).to(DEVICE)
        old = keys - length
        impl.do_kv_cache_update(layer, k[:old], v[:old], kv_cache, slots[:old])
        for parts, part in ((queries, q), (new_keys, k[old:]), (new_values, v[old:]), (new_slots, slots[old:])):
            parts.append(part)
        wide.append(formula(drawn, q.double(), k.double(), v.double()))
        same.append(formula(drawn, q, k, v))
        whole.append((q, k, v))
    padding = torch.full((drawn.padding, heads, size), NAN, dtype=drawn.dtype, device=DEVICE)
    new_slots.append(torch.full((drawn.padding,), -1, dtype=torch.int64, device=DEVICE))
    query, key, value = (
        torch.cat([*queries, padding]),
        *(torch.cat([*parts, padding[:, :2]]) for parts in (new_keys, new_values)),
    )
    from vllm.v1.attention.backend import CommonAttentionMetadata

    ends = starts(length for length, _ in drawn.lens)
    common = CommonAttentionMetadata(
        query_start_loc=ends,
        query_start_loc_cpu=ends.cpu(),
        seq_lens=int32(keys for _, keys in drawn.lens),
        num_reqs=len(drawn.lens),
        num_actual_tokens=len(query),
        max_query_len=max(length for length, _ in drawn.lens),
        max_seq_len=max(keys for _, keys in drawn.lens),
        block_table_tensor=int32(table),
        slot_mapping=torch.cat(new_slots),
    )
    builder = backend().RooflamaBackend.get_builder_cls()(None, ["layer"], None, DEVICE)
    metadata = builder.build(0, common)
    impl.do_kv_cache_update(layer, key, value, kv_cache, common.slot_mapping)
    output = torch.full((len(query) + 1, heads * size), NAN, dtype=drawn.dtype, device=DEVICE)
    assert impl.forward(layer, query, key, value, kv_cache, metadata, output) is output
    assert output[-1].isnan().all()
    assert (output[len(query) - drawn.padding : -1] == 0).all()
    q, k, v = zip(*whole, strict=True)
    c = units(score_span(q, k, size**-0.5), v, exact(torch.cat(wide)), drawn.dtype)
    return output[: len(query) - drawn.padding].view(-1, heads, size), torch.cat(wide), torch.cat(same), c


def formula(drawn, q, k, v):
    """[queries, heads, head_size] by the definition, in the dtype of q."""
    queries, keys = len(q), len(k)
    position = torch.arange(keys - queries, keys)[:, None]
    visible = torch.arange(keys) <= position
    if drawn.sliding_window:
        visible &= torch.arange(keys) > position - drawn.sliding_window
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = q @ k.repeat_interleave(drawn.group, 0).mT / math.sqrt(drawn.head_size)
    if drawn.soft_cap:
        scores = drawn.soft_cap * torch.tanh(scores / drawn.soft_cap)
    weights = scores.masked_fill(~visible.to(DEVICE), -math.inf).softmax(-1)
    return (weights @ v.repeat_interleave(drawn.group, 0)).transpose(0, 1)


@pytest.mark.parametrize("queries", [None, 1], ids=["mixed", "decode"])
@given(data=st.data())
def test_a_step_equals_the_formula(queries, data):
    drawn = data.draw(batches(queries=queries))
    output, wide, same, c = run(drawn)
    assert_within_rounding(output, exact(wide), same, c=c, context=repr(drawn))


@pytest.mark.parametrize(
    ("lens", "padding", "kernel"),
    [
        (((1, 5), (1, 40)), 0, "attention_decode"),
        (((1, 5), (1, 40)), 2, "attention_prefill"),  # more tokens than sequences
        (((1, 5), (3, 40)), 0, "attention_prefill"),
    ],
)
def test_which_kernel_serves_a_batch(lens, padding, kernel):
    calls = Counter()

    def counted(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return KERNELS[name](*args, **kwargs)

        return call

    with swap(**{name: counted(name) for name in KERNELS}):
        run(Drawn(lens, padding, 2, 16, 16, torch.float32, None, None, (0, 1, 2, 3), 0))
    assert calls == {kernel: 1, "write_kv": len(lens) + 1}


def test_measuring_memory_computes_nothing():
    impl = backend().RooflamaImpl(4, 16, 0.25, 2)
    q = torch.full((3, 4, 16), NAN, device=DEVICE)
    output = torch.full((3, 64), NAN, device=DEVICE)
    impl.forward(torch.nn.Module(), q, q, q, torch.empty(0, device=DEVICE), None, output)
    assert (output == 0).all()


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("alibi_slopes", {"alibi_slopes": [0.5] * 4}),
        ("sinks", {"sinks": torch.zeros(4)}),
        ("encoder_only", {"attn_type": "encoder_only"}),
        ("fp8", {"kv_cache_dtype": "fp8"}),
    ],
)
def test_what_is_not_served_is_refused(what, options):
    with pytest.raises(ArgumentError, match=what):
        backend().RooflamaImpl(4, 16, 0.25, 2, **options)


def test_other_caches_are_refused():
    impl = backend().RooflamaImpl(4, 16, 0.25, 2)
    k = torch.zeros(3, 2, 16, device=DEVICE)
    slots = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ArgumentError, match=r"\[2, 5, 16, 2, 16\].*vLLM 0.33"):
        impl.do_kv_cache_update(torch.nn.Module(), k, k, torch.zeros(2, 5, 16, 2, 16, device=DEVICE), slots)
    builder = backend().RooflamaMetadataBuilder(None, [], None, DEVICE)
    with pytest.raises(ArgumentError, match="causal=False"):
        builder.build(0, SimpleNamespace(causal=False))
    with pytest.raises(ArgumentError, match="quantised output"):
        impl.forward(torch.nn.Module(), k, k, k, k, None, k, output_scale=torch.ones(1))
