"""SwiGLU and GEGLU against their definitions, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, geglu, reference, swiglu, use_backend
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from rooflama.testing.strategies import DEVICE, beyond_int32, dtypes, exact, guarded, normal, seeds

sizes = {"num_tokens": st.integers(0, 5), "intermediate": st.integers(1, 2500)}


def torch_swiglu(gate, up):
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


@given(**sizes, dtype=dtypes, seed=seeds)
@example(num_tokens=2, intermediate=1536, dtype=torch.float16, seed=0)
def test_swiglu_equals_definition(num_tokens, intermediate, dtype, seed):
    rng = np.random.default_rng(seed)
    gate, gate_buffer = guarded(normal(rng, num_tokens, intermediate, dtype=dtype, scale=10 ** rng.uniform(-3, 1)))
    up, up_buffer = guarded(normal(rng, num_tokens, intermediate, dtype=dtype))
    got = swiglu(gate, up)
    context = f"num_tokens={num_tokens} intermediate={intermediate} seed={seed}"
    assert_within_rounding(got, reference.swiglu(exact(gate), exact(up)), torch_swiglu(gate, up), context=context)
    assert_guards_intact(gate_buffer, context=context)
    assert_guards_intact(up_buffer, context=context)


def torch_geglu(gate, up):
    return (torch.nn.functional.gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)


@given(**sizes, dtype=dtypes, seed=seeds)
@example(num_tokens=2, intermediate=1536, dtype=torch.float16, seed=0)
def test_geglu_equals_definition(num_tokens, intermediate, dtype, seed):
    rng = np.random.default_rng(seed)
    gate, gate_buffer = guarded(normal(rng, num_tokens, intermediate, dtype=dtype, scale=10 ** rng.uniform(-3, 0)))
    up, up_buffer = guarded(normal(rng, num_tokens, intermediate, dtype=dtype))
    got = geglu(gate, up)
    context = f"num_tokens={num_tokens} intermediate={intermediate} seed={seed}"
    assert_within_rounding(got, reference.geglu(exact(gate), exact(up)), torch_geglu(gate, up), context=context)
    assert_guards_intact(gate_buffer, context=context)
    assert_guards_intact(up_buffer, context=context)


def test_definition_equals_torch():
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 7, 300)) * 20
    want = torch.nn.functional.silu(torch.from_numpy(gate)) * torch.from_numpy(up)
    np.testing.assert_allclose(reference.swiglu(gate, up), want.numpy(), rtol=1e-13)
    want = torch.nn.functional.gelu(torch.from_numpy(gate), approximate="tanh") * torch.from_numpy(up)
    np.testing.assert_allclose(reference.geglu(gate, up), want.numpy(), rtol=1e-12, atol=1e-13)


both = pytest.mark.parametrize("gated", [swiglu, geglu])


@both
@given(**sizes, seed=seeds)
def test_the_activation_is_a_line_plus_an_even_function(gated, num_tokens, intermediate, seed):
    """act(x) - act(-x) = x."""
    gate = normal(np.random.default_rng(seed), num_tokens, intermediate, scale=3.0)
    one = torch.ones_like(gate)
    difference = gated(gate, one) - gated(-gate, one)
    assert_within_rounding(difference, exact(gate), context=f"seed={seed}")


@both
@given(num_tokens=st.integers(2, 5), intermediate=st.integers(1, 300), dtype=dtypes, seed=seeds)
def test_batch_invariance(gated, num_tokens, intermediate, dtype, seed):
    """A row's bits do not depend on the rows beside it."""
    rng = np.random.default_rng(seed)
    gate, up = (normal(rng, num_tokens, intermediate, dtype=dtype) for _ in range(2))
    alone = torch.cat([gated(gate[i : i + 1], up[i : i + 1]) for i in range(num_tokens)])
    assert_bit_equal(gated(gate, up), alone)


@both
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), intermediate=st.integers(1, 200), seed=seeds)
def test_leading_dimensions_are_rows(gated, shape, intermediate, seed):
    gate, up = normal(np.random.default_rng(seed), *shape, 2 * intermediate).chunk(2, dim=-1)
    got = gated(gate, up)
    assert got.shape == gate.shape
    assert_bit_equal(got.flatten(0, -2), gated(gate.flatten(0, -2), up.flatten(0, -2)))


def test_rows_at_unequal_distances_are_refused():
    rows, apart = torch.zeros(2, 2, 8, device=DEVICE), torch.zeros(2, 3, 8, device=DEVICE)[:, :2]
    for name, arguments in (("gate", (apart, rows)), ("up", (rows, apart))):
        with pytest.raises(KernelInputError, match=f"rows of {name} must lie at one distance"):
            swiglu(*arguments)


def test_the_same_call_gives_the_same_bits():
    gate, up = (normal(np.random.default_rng(seed), 3, 1500) for seed in (0, 1))
    assert_bit_equal(swiglu(gate, up), swiglu(gate, up))


@both
@given(num_tokens=st.integers(1, 4), intermediate=st.integers(1, 300), dtype=dtypes, seed=seeds)
def test_halves_of_one_projection(gated, num_tokens, intermediate, dtype, seed):
    projected = normal(np.random.default_rng(seed), num_tokens, 2 * intermediate, dtype=dtype)
    gate, up = projected.chunk(2, dim=1)
    want = gated(gate.contiguous(), up.contiguous())
    assert_bit_equal(gated(gate, up), want)
    assert_bit_equal(gated(gate.contiguous(), up), want)


@both
@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_large_gates_reach_the_limits(backend, gated):
    """exp and the cube overflow on the way: act(-large) is 0, act(large) is large."""
    gate = torch.tensor([[-1e30, -1e4, -200.0, 200.0, 1e4, 1e30]], device=DEVICE)
    with use_backend(backend):
        got = gated(gate, torch.ones_like(gate))
    assert torch.equal(got, gate.clamp(min=0))


def test_offsets_beyond_int32():
    rng = np.random.default_rng(0)
    gate, up = normal(rng, 3, 64, dtype=torch.float16), normal(rng, 3, 64, dtype=torch.float16)
    assert_bit_equal(swiglu(beyond_int32(gate), beyond_int32(up)), swiglu(gate, up))


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_opcheck(name):
    gate = torch.randn(3, 40, device=DEVICE)
    torch.library.opcheck(getattr(torch.ops.rooflama, name), (gate, gate.clone()))


def test_compiles_into_one_graph():
    gate, up = torch.randn(2, 3, 40, device=DEVICE)
    compiled = torch.compile(lambda gate, up: swiglu(gate, up) + 1, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(gate, up), swiglu(gate, up) + 1)


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 9), r"up has shape \[2, 9\]: up must have shape \[2, 8\]"),
        (torch.zeros(8), torch.zeros(8), r"gate must have shape \[\.\.\., columns\]"),
        (torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float16), "up is torch.float16"),
        (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 8), "gate is torch.int32"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), "last dimension of gate must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(8, 2).T, "last dimension of up must be contiguous"),
    ],
)
def test_bad_input_is_refused_before_a_launch(gate, up, message):
    for gated in (swiglu, geglu):
        with pytest.raises(KernelInputError, match=message):
            gated(gate.to(DEVICE), up.to(DEVICE))


def test_tensors_on_two_devices_are_refused():
    gate = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(KernelInputError, match="up on meta: all tensors of one call live on one device"):
        swiglu(gate, gate.to("meta"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        swiglu(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 8, dtype=torch.bfloat16))
