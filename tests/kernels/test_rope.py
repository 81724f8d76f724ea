"""RoPE, alone and fused with norms and the cache write, against its definition, and the laws it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, reference, rope, rope_and_cache_write, use_backend, write_kv
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.testing.attention import untouched
from rooflama.testing.rope import Step, angle_tables, random_positions
from rooflama.testing.strategies import DEVICE, beyond_int32, dtypes, exact, guarded, normal, seeds

head_dims = st.sampled_from([2, 16, 64, 80, 96, 100, 128, 256])
heads = st.integers(1, 5)
PAGE_DTYPES = [None, torch.int8, torch.float8_e4m3fn]  # None: that of k
page_dtypes = st.sampled_from(PAGE_DTYPES)
page_sizes = st.sampled_from([16, 32, 64, 128, 256])


@st.composite
def rotary_dims(draw):
    """(head_dim, rotary_dim)."""
    head_dim = draw(head_dims)
    return head_dim, draw(st.one_of(st.just(head_dim), st.integers(1, head_dim // 2).map(lambda half: 2 * half)))


def torch_rope(x, cos, sin, positions, interleaved):
    half = cos.shape[1]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    turned, tail = x[..., : 2 * half].float(), x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), tail], dim=-1)


@given(
    dims=rotary_dims(),
    num_tokens=st.integers(0, 4),
    num_heads=heads,
    interleaved=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example(dims=(128, 96), num_tokens=2, num_heads=3, interleaved=True, dtype=torch.float16, seed=0)
def test_rope_equals_definition(dims, num_tokens, num_heads, interleaved, dtype, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x, buffer = guarded(normal(rng, num_tokens, num_heads, head_dim, dtype=dtype))
    cos, sin = angle_tables(500, rotary_dim)
    positions = random_positions(rng, num_tokens)
    got = rope(x, cos, sin, positions, interleaved=interleaved)
    want = reference.rope(exact(x), exact(cos), exact(sin), positions.cpu().numpy(), interleaved=interleaved)
    context = f"{dims=} {num_tokens=} {num_heads=} {interleaved=} {seed=}"
    assert_within_rounding(got, want, torch_rope(x, cos, sin, positions, interleaved), c=2.0, context=context)
    assert_guards_intact(buffer, context=context)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 96), (128, 96)])
def test_definition_equals_transformers(head_dim, rotary_dim):
    """Half-split as Llama and Phi-3 (partial) have it, interleaved as GLM has it."""
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved_rope
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as half_split_rope

    rng = np.random.default_rng(0)
    q, k = torch.from_numpy(rng.standard_normal((2, 1, 3, 7, head_dim)))  # [batch, heads, tokens, head_dim]
    angles = np.outer(rng.integers(0, 4000, 7), 1e4 ** (-np.arange(0, rotary_dim, 2) / rotary_dim))
    cos, sin = np.cos(angles), np.sin(angles)
    whole = [torch.from_numpy(np.concatenate([t, t], axis=-1))[None] for t in (cos, sin)]
    for oracle, interleaved in ((half_split_rope, False), (interleaved_rope, True)):
        for x, want in zip((q, k), oracle(q, k, *whole), strict=True):
            rows = x[0].transpose(0, 1).numpy()
            got = reference.rope(rows, cos, sin, np.arange(7), interleaved=interleaved)
            np.testing.assert_allclose(got, want[0].transpose(0, 1).numpy(), atol=1e-12)


@given(dims=rotary_dims(), interleaved=st.booleans(), seed=seeds)
def test_rotation_keeps_norms(dims, interleaved, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x = normal(rng, 3, 2, head_dim)
    out = rope(x, *angle_tables(500, rotary_dim), random_positions(rng, 3), interleaved=interleaved)
    np.testing.assert_allclose(np.linalg.norm(exact(out), axis=-1), np.linalg.norm(exact(x), axis=-1), rtol=1e-6)


@given(dims=rotary_dims(), interleaved=st.booleans(), shift=st.integers(1, 250), seed=seeds)
def test_scores_depend_on_position_differences_only(dims, interleaved, shift, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    q, k = normal(rng, 4, 1, head_dim), normal(rng, 4, 1, head_dim)
    cos, sin = angle_tables(501, rotary_dim)
    q_positions, k_positions = random_positions(rng, 4, 250), random_positions(rng, 4, 250)

    def scores(offset):
        turned = [
            rope(x, cos, sin, p + offset, interleaved=interleaved) for x, p in ((q, q_positions), (k, k_positions))
        ]
        return np.sum(exact(turned[0]) * exact(turned[1]), axis=-1)

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-6 * head_dim)


@given(dims=rotary_dims(), interleaved=st.booleans(), seed=seeds)
def test_the_opposite_rotation_restores(dims, interleaved, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x, positions = normal(rng, 3, 2, head_dim), random_positions(rng, 3)
    cos, sin = angle_tables(500, rotary_dim)
    back = rope(rope(x, cos, sin, positions, interleaved=interleaved), cos, -sin, positions, interleaved=interleaved)
    assert_within_rounding(back, exact(x), c=8.0, context=f"{dims=} {seed=}")


@given(dims=rotary_dims(), dtype=dtypes, seed=seeds)
def test_interleaved_is_half_split_permuted(dims, dtype, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x, positions = normal(rng, 3, 2, head_dim, dtype=dtype), random_positions(rng, 3)
    tables = angle_tables(500, rotary_dim)
    order = (
        np.arange(rotary_dim).reshape(2, -1).T.reshape(-1)
    )  # half-split dimension that stands at each interleaved place
    order = torch.from_numpy(np.concatenate([order, np.arange(rotary_dim, head_dim)])).to(DEVICE)
    assert_bit_equal(rope(x[..., order], *tables, positions, interleaved=True), rope(x, *tables, positions)[..., order])


@given(dims=rotary_dims(), interleaved=st.booleans(), dtype=dtypes, seed=seeds)
def test_position_zero_and_the_tail_are_untouched(dims, interleaved, dtype, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x, tables = normal(rng, 3, 2, head_dim, dtype=dtype), angle_tables(500, rotary_dim)
    nowhere = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert_bit_equal(rope(x, *tables, nowhere, interleaved=interleaved), x)
    out = rope(x, *tables, random_positions(rng, 3), interleaved=interleaved)
    assert_bit_equal(out[..., rotary_dim:], x[..., rotary_dim:])


@given(dims=rotary_dims(), num_tokens=st.integers(2, 5), dtype=dtypes, seed=seeds)
def test_batch_invariance(dims, num_tokens, dtype, seed):
    head_dim, rotary_dim = dims
    rng = np.random.default_rng(seed)
    x, positions = normal(rng, num_tokens, 2, head_dim, dtype=dtype), random_positions(rng, num_tokens)
    tables = angle_tables(500, rotary_dim)
    alone = torch.cat([rope(x[i : i + 1], *tables, positions[i : i + 1]) for i in range(num_tokens)])
    assert_bit_equal(rope(x, *tables, positions), alone)


@given(
    dims=rotary_dims(), num_tokens=st.integers(0, 4), num_kv_heads=st.integers(1, 3), group=st.integers(1, 3),
    interleaved=st.booleans(), dtype=dtypes, page_dtype=page_dtypes, page_size=page_sizes, seed=seeds,
)  # fmt: skip
@example(
    dims=(128, 128), num_tokens=2, num_kv_heads=9, group=1, interleaved=False,
    dtype=torch.float32, page_dtype=torch.float8_e4m3fn, page_size=16, seed=0,
)  # fmt: skip
def test_fused_equals_rope_then_write(
    dims, num_tokens, num_kv_heads, group, interleaved, dtype, page_dtype, page_size, seed
):
    """Bit for bit. Into codes only from float32: the fused kernel spares a rounding that the two in turn make."""
    dtype = torch.float32 if page_dtype else dtype
    step = Step(seed, num_tokens, group * num_kv_heads, num_kv_heads, *dims, dtype, page_dtype, page_size)
    q, written = step.fused(interleaved=interleaved)
    pages = step.pages()
    k = rope(step.k, *step.tables, step.positions, interleaved=interleaved)
    write_kv(k, step.v, *pages[:2], step.slots, *pages[2:])
    assert_bit_equal(q, rope(step.q, *step.tables, step.positions, interleaved=interleaved))
    for got, want in zip(written, [t.float() for t in pages if t is not None], strict=True):
        assert_bit_equal(got, want, context=f"{dims=} {num_tokens=} {page_dtype=} {page_size=} {seed=}")


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("slots", [[0], [63], [0, -1, 15, 16, 63]])
def test_fused_at_the_first_and_last_slot_and_page(slots, page_dtype):
    """Four pages of 16, tokens at the first and the last position: where every index is 0 or as large as it can be."""
    step = Step(0, len(slots), 6, 3, 80, 64, torch.float32, page_dtype)
    step.slots.copy_(torch.tensor(slots))
    step.positions.copy_(torch.tensor([0, 499, 499, 0, 499][-len(slots) :]))
    q, written = step.fused()
    assert_bit_equal(q, rope(step.q, *step.tables, step.positions))
    pages = step.pages()
    write_kv(rope(step.k, *step.tables, step.positions), step.v, *pages[:2], step.slots, *pages[2:])
    for got, want in zip(written, [t.float() for t in pages if t is not None], strict=True):
        assert_bit_equal(got, want)
    filled = (written[2] if page_dtype else written[0][..., 0]).flatten(0, 1).isfinite().all(-1)
    assert filled.nonzero().flatten().tolist() == [slot for slot in slots if slot >= 0]


@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("place", [3, 40, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fused_writes_what_is_no_number_as_the_two_do(page_dtype, place, value):
    """Wherever in a head it stands, the half that turns, the other, or the tail: its codes say that all is lost."""
    step = Step(0, 1, 2, 2, 80, 64, torch.float32, page_dtype)
    step.slots.fill_(5)
    step.k[0, 1, place] = value
    _, written = step.fused()
    pages = step.pages()
    write_kv(rope(step.k, *step.tables, step.positions), step.v, *pages[:2], step.slots, *pages[2:])
    for got, want in zip(written, [t.float() for t in pages], strict=True):
        assert_bit_equal(got, want)
    assert written[2][0, 5].isnan().tolist() == [False, True]


@given(
    dims=rotary_dims(), num_tokens=st.integers(1, 4), interleaved=st.booleans(), dtype=dtypes, page_size=page_sizes,
    seed=seeds,
)  # fmt: skip
@example(dims=(80, 60), num_tokens=2, interleaved=True, dtype=torch.float16, page_size=256, seed=0)
def test_fused_with_norms_equals_definition(dims, num_tokens, interleaved, dtype, page_size, seed):
    step = Step(seed, num_tokens, 3, 1, *dims, dtype, page_size=page_size)
    q, (k_pages, v_pages) = step.fused(*step.norms, eps=1e-5, interleaved=interleaved)
    arrays = [np.full(step.shape, np.nan) for _ in range(2)]
    want = reference.rope_and_cache_write(
        *(exact(t) for t in (step.q, step.k, step.v, *step.tables)),
        *(step.positions.cpu().numpy(), step.slots.cpu().numpy(), *arrays, *(exact(t) for t in step.norms)),
        eps=1e-5,
        interleaved=interleaved,
    )
    context = f"{dims=} {num_tokens=} {interleaved=} {dtype} {page_size=} {seed=}"
    assert_within_rounding(q, want, context=context)
    for got, array in zip((k_pages, v_pages), arrays, strict=True):
        unwritten = np.isnan(array)
        np.testing.assert_array_equal(exact(got)[unwritten], array[unwritten], err_msg=context)
        if not unwritten.all():
            assert_within_rounding(
                got[torch.from_numpy(~unwritten).to(DEVICE)].to(dtype), array[~unwritten], context=context
            )


@pytest.mark.parametrize("norms", [(True, False), (False, True)])
def test_one_norm_alone(norms):
    step = Step(0, 3, 4, 2, 64, 64, torch.float32)
    q, pages = step.fused(*(norm if given else None for norm, given in zip(step.norms, norms, strict=True)), eps=1e-5)
    for normed, got, both, none in zip(norms, (q, pages[0]), *(((r[0], r[1][0])) for r in (
        step.fused(*step.norms, eps=1e-5), step.fused(eps=1e-5))), strict=True):  # fmt: skip
        assert_bit_equal(got, both if normed else none)


@given(num_tokens=st.integers(2, 4), dtype=dtypes, page_dtype=page_dtypes, seed=seeds)
def test_fused_batch_invariance(num_tokens, dtype, page_dtype, seed):
    """A token's query and its slot's bits do not depend on the tokens beside it."""
    step = Step(seed, num_tokens, 4, 2, 64, 64, dtype, page_dtype)
    q, together = step.fused(*step.norms, eps=1e-5)
    pages = step.pages()
    for i in range(num_tokens):
        row = slice(i, i + 1)
        inputs = (step.q[row], step.k[row], step.v[row], *step.tables, step.positions[row], step.slots[row])
        alone = rope_and_cache_write(*inputs, *pages[:2], *step.norms, *pages[2:], eps=1e-5)
        assert_bit_equal(q[row], alone)
    for got, want in zip(together, [t.float() for t in pages if t is not None], strict=True):
        assert_bit_equal(got, want)


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
def test_the_same_call_gives_the_same_bits(page_dtype):
    step = Step(0, 5, 6, 2, 80, 64, torch.float32, page_dtype)
    first, second = (rope(step.q, *step.tables, step.positions) for _ in range(2))
    assert_bit_equal(first, second)
    (q, pages), (same_q, same_pages) = (step.fused(*step.norms, eps=1e-5) for _ in range(2))
    for one, other in zip((q, *pages), (same_q, *same_pages), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("backend", ["triton", "numpy"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(0, 2), (2, 0)])
def test_no_query_heads_or_no_key_heads(num_heads, num_kv_heads, backend):
    step = Step(0, 5, num_heads, num_kv_heads, 16, 16, torch.float32)
    pages = step.pages()
    with use_backend(backend):
        q, (k_pages, v_pages) = step.fused()
        assert_bit_equal(q, rope(step.q, *step.tables, step.positions))
        write_kv(rope(step.k, *step.tables, step.positions), step.v, *pages[:2], step.slots)
    assert_bit_equal(k_pages, pages[0])
    assert_bit_equal(v_pages, pages[1])


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
def test_numpy_route_equals_kernel(page_dtype):
    """What runs on a machine without a GPU. Float32 rounds differently, which may turn a code near a tie."""
    step = Step(0, 5, 6, 2, 80, 64, torch.float32, page_dtype)
    q, (k_pages, v_pages, *scales) = step.fused(*step.norms, eps=1e-5)
    with use_backend("numpy"):
        q_numpy, (k_pages_numpy, v_pages_numpy, *scales_numpy) = step.fused(*step.norms, eps=1e-5)
    torch.testing.assert_close(q, q_numpy, atol=2e-6, rtol=1e-5)
    assert_bit_equal(v_pages, v_pages_numpy)
    next_code = {None: (2e-6, 1e-5), torch.int8: (1.0, 0.0), torch.float8_e4m3fn: (2.0**-9, 0.13)}[page_dtype]
    torch.testing.assert_close(k_pages, k_pages_numpy, atol=next_code[0], rtol=next_code[1], equal_nan=True)
    for got, want in zip(scales, scales_numpy, strict=True):
        torch.testing.assert_close(got, want, atol=0.0, rtol=1e-5, equal_nan=True)
    if page_dtype:
        written = ~scales[0].isnan()
        assert written.sum() > 4
        assert (k_pages[written] == k_pages_numpy[written]).float().mean() > 0.98


def test_strides_of_tokens_and_heads():
    """x may be a transposed [num_heads, num_tokens, head_dim]."""
    rng = np.random.default_rng(0)
    x = normal(rng, 3, 5, 64).transpose(0, 1)
    tables, positions = angle_tables(500, 64), random_positions(rng, 5)
    assert_bit_equal(rope(x, *tables, positions), rope(x.contiguous(), *tables, positions))


def test_offsets_beyond_int32():
    """Tokens and pages whose offsets pass 2^31."""
    step = Step(0, 3, 3, 3, 64, 64, torch.float16)
    step.slots = torch.tensor([0, 16 + 5, 32 + 3], device=DEVICE)
    far = [beyond_int32(t) for t in (step.q, step.k, step.v)]
    assert_bit_equal(rope(far[0], *step.tables, step.positions), rope(step.q, *step.tables, step.positions))
    q, (k_near, v_near) = step.fused()
    k_pages, v_pages = (beyond_int32(pages[:3]) for pages in step.pages()[:2])
    assert_bit_equal(rope_and_cache_write(*far, *step.tables, step.positions, step.slots, k_pages, v_pages), q)
    assert_bit_equal(k_pages.float(), k_near[:3])
    assert_bit_equal(v_pages.float(), v_near[:3])


def test_the_last_row_of_tables_beyond_int32():
    """Of 24 columns, so that the padding of its row lies beyond the ends of the tables."""
    step = Step(0, 3, 2, 2, 48, 48, torch.float16)
    rows = 2**31 // 24 + 2
    far = [untouched(rows * 24, torch.float32).view(rows, 24) for _ in step.tables]
    for table, near in zip(far, step.tables, strict=True):
        table[-1] = near[-1]
    last = torch.full_like(step.positions, len(step.tables[0]) - 1)
    want = rope(step.q, *step.tables, last)
    assert_bit_equal(rope(step.q, *far, torch.full_like(step.positions, rows - 1)), want)


def test_scales_beyond_int32():
    """The pages all lie in one place, so that only the scales are many."""
    step, num_pages = Step(0, 1, 4, 4, 16, 16, torch.float32, torch.int8), 2**31 // (16 * 4) + 2
    step.slots = torch.tensor([3], device=DEVICE)
    q, near = step.fused(*step.norms, eps=1e-5)
    scales = beyond_int32(torch.zeros(3, 256, device=DEVICE))
    k_scale, v_scale = (scales.as_strided((num_pages, 16, 4), (64, 4, 1), offset) for offset in (0, 64))
    k_pages, v_pages = (pages[:1].expand(num_pages, -1, -1, -1) for pages in step.pages()[:2])
    step.slots += (num_pages - 1) * 16
    got = rope_and_cache_write(*step.inputs(), k_pages, v_pages, *step.norms, k_scale, v_scale, eps=1e-5)
    assert_bit_equal(got, q)
    for far, want in zip((k_pages, v_pages, k_scale, v_scale), near, strict=True):
        assert_bit_equal(far[-1, 3].float(), want[0, 3])


def test_opcheck():
    step = Step(0, 2, 4, 2, 16, 16, torch.float32, torch.int8)
    torch.library.opcheck(torch.ops.rooflama.rope, (step.q, *step.tables, step.positions))
    pages = step.pages()
    torch.library.opcheck(
        torch.ops.rooflama.rope_and_cache_write, (*step.inputs(), *pages[:2], *step.norms, *pages[2:]), {"eps": 1e-5}
    )


def test_compiles_into_one_graph():
    step = Step(0, 2, 4, 2, 16, 16, torch.float32)

    def attention_input(k_pages, v_pages):
        return rope_and_cache_write(*step.inputs(), k_pages, v_pages) + rope(step.q, *step.tables, step.positions)

    eager_pages, compiled_pages = step.pages()[:2], step.pages()[:2]
    want = attention_input(*eager_pages)
    got = torch.compile(attention_input, fullgraph=True, backend="aot_eager")(*compiled_pages)
    assert_bit_equal(got, want)
    for compiled, eager in zip(compiled_pages, eager_pages, strict=True):
        assert_bit_equal(compiled, eager)


GOOD = {
    "q": torch.zeros(2, 4, 16),
    "k": torch.zeros(2, 2, 16),
    "v": torch.zeros(2, 2, 16),
    "cos": torch.zeros(9, 8),
    "sin": torch.zeros(9, 8),
    "positions": torch.zeros(2, dtype=torch.int32),
    "slot_mapping": torch.zeros(2, dtype=torch.int64),
    "k_pages": torch.zeros(3, 16, 2, 16),
    "v_pages": torch.zeros(3, 16, 2, 16),
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": torch.zeros(2, 4, 300)}, "head_dim is 300"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float64)}, "q is torch.float64"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, "last dimension of q must be contiguous"),
        ({"k": torch.zeros(2, 2, 16, dtype=torch.float16)}, "v must be one of float16"),
        ({"k": torch.zeros(3, 2, 16)}, r"v must have shape \[3, 2, 16\]"),
        ({"cos": torch.zeros(9, 9), "sin": torch.zeros(9, 9)}, "the tables turn 18 of 16 dimensions"),
        ({"sin": torch.zeros(9, 7)}, r"sin must have shape \[9, 8\]"),
        ({"cos": torch.zeros(9, 8, dtype=torch.float16)}, "cos must be one of float32"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions must have shape \[2\]"),
        ({"positions": torch.zeros(2)}, "positions must be one of int32, int64"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int32)}, "slot_mapping must be one of int64"),
        ({"positions": torch.zeros(4, dtype=torch.int32, device=DEVICE)[::2]}, "of positions must be contiguous"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64, device=DEVICE)[::2]}, "of slot_mapping must be contiguous"),
        ({"cos": torch.zeros(9, 16, device=DEVICE)[:, ::2]}, "cos has strides .* tables are contiguous"),
        ({"q_norm": torch.zeros(32, device=DEVICE)[::2]}, "of q_norm must be contiguous"),
        ({"k_pages": torch.zeros(3, 24, 2, 16)}, "page_size is 24"),
        ({"v_pages": torch.zeros(4, 16, 2, 16)}, r"v_pages must have shape \[3, 16, 2, 16\]"),
        ({"q_norm": torch.zeros(15)}, r"q_norm must have shape \[16\]"),
        ({"k_scale": torch.zeros(3, 16, 2)}, "float pages without"),
    ],
)
def test_bad_input_is_refused_before_a_launch(bad, message):
    arguments = {name: tensor.to(DEVICE) for name, tensor in (GOOD | bad).items()}
    with pytest.raises(KernelInputError, match=message):
        rope_and_cache_write(**arguments)
    assert not any(arguments[name].any() for name in ("k_pages", "v_pages"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's indices are not read back for a check")
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"positions": torch.tensor([0, 9], dtype=torch.int32)}, "the tables hold positions 0 to 8"),
        ({"positions": torch.tensor([-1, 0], dtype=torch.int32)}, "positions run from -1 to 0"),
        ({"slot_mapping": torch.tensor([48, 0])}, "slots are numbered 0 to 47"),
    ],
)
def test_indices_out_of_range_are_refused(bad, message):
    with pytest.raises(KernelInputError, match=message):
        rope_and_cache_write(**(GOOD | bad))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
@pytest.mark.parametrize("names", [("q", "k", "v"), ("k_pages", "v_pages"), ("q_norm",), ("k_norm",)])
def test_bfloat16_is_refused_under_the_interpreter(names):
    arguments = {**GOOD, "q_norm": torch.zeros(16), "k_norm": torch.zeros(16)}
    arguments |= {name: arguments[name].bfloat16() for name in names}
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        rope_and_cache_write(**arguments)
    if "q" in names:
        with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
            rope(*(arguments[name] for name in ("q", "cos", "sin", "positions")))
