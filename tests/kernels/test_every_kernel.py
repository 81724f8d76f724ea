"""What holds for every launcher: which device it runs on, what it refuses, and that tracing it is no snapshot."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rooflama.kernels import (
    KernelInputError,
    attention_decode,
    dequantize,
    gather_kv,
    quantized_matmul,
    rms_norm,
    sample,
)
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE
from rooflama.testing.weights import random_weight

X, WEIGHT = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.ones(32, device=DEVICE)

MOST_PARAMETERS = 15  # what belongs together is one NamedTuple
# Kernels in Gluon that have more: descriptors are arguments of their own, and form and tile are one constexpr each.
MORE_PARAMETERS = {"_attention_prefill_hopper_kernel": 17, "_wgmma_kernel": 19}


def norm(x):
    return rms_norm(x, WEIGHT, 1e-5)


def test_tensors_that_want_a_gradient_are_refused():
    wanting = X.clone().requires_grad_()
    weight = random_weight(np.random.default_rng(0), "Q4_1", 4, 32)
    for call in (
        lambda: norm(wanting),
        lambda: quantized_matmul(wanting, weight),
        lambda: rms_norm(X, wanting[0], 0.0),
    ):
        with pytest.raises(KernelInputError, match="requires grad: kernels compute no gradients"):
            call()
    with torch.no_grad():
        assert_bit_equal(norm(wanting), norm(X))


@pytest.mark.parametrize("trace", [make_fx(norm), lambda x: torch.jit.trace(norm, x)], ids=["make_fx", "jit"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_what_is_traced_serves_other_tensors(trace):
    assert_bit_equal(trace(X)(2 + X), norm(2 + X))


def test_other_devices_are_refused():
    with pytest.raises(KernelInputError, match="tensors on meta: kernels run on CUDA and HIP devices and on the CPU"):
        rms_norm(X.to("meta"), WEIGHT.to("meta"), 1e-5)


def test_a_dequantised_weight_is_new_memory():
    weight = random_weight(np.random.default_rng(0), "F32", 4, 32)
    kept = weight.planes[0].clone()
    dequantize(weight).zero_()
    assert_bit_equal(weight.planes[0], kept)


@pytest.mark.usefixtures("numpy_backend")
def test_a_dequantised_weight_is_new_memory_by_numpy():
    test_a_dequantised_weight_is_new_memory()


def test_more_sequences_than_a_grid_holds_are_refused():
    count = 65536
    table, lens = (
        torch.zeros(count, 1, dtype=torch.int32, device=DEVICE),
        torch.ones(count, dtype=torch.int32, device=DEVICE),
    )
    pages = torch.zeros(1, 16, 1, 16, device=DEVICE)
    for call in (
        lambda: sample(torch.zeros(count, 8, device=DEVICE)),
        lambda: attention_decode(
            torch.zeros(count, 1, 16, device=DEVICE), pages, pages, table, lens, softmax_scale=1.0
        ),
        lambda: gather_kv(pages, table, lens, num_keys=count),
    ):
        with pytest.raises(KernelInputError, match="65536 sequences: one call takes at most 65535"):
            call()


@pytest.mark.parametrize("eps", [-1e-5, torch.nan, torch.inf])
def test_an_epsilon_that_is_none_is_refused(eps):
    weight = random_weight(np.random.default_rng(0), "Q4_1", 4, 32)
    for call in (lambda: rms_norm(X, WEIGHT, eps), lambda: quantized_matmul(X, weight, norm_weight=WEIGHT, eps=eps)):
        with pytest.raises(KernelInputError, match="eps must be 0 or more, and finite"):
            call()


def test_rows_that_no_program_holds_are_refused(monkeypatch):
    monkeypatch.setattr("triton.language.TRITON_MAX_TENSOR_NUMEL", 32)
    norm(X)
    rms_norm.forget()  # on a GPU, another test may have passed the same signature
    with pytest.raises(KernelInputError, match=r"x has shape \[1, 33\]: one program holds a row: at most 32 columns"):
        rms_norm(torch.zeros(1, 33, device=DEVICE), torch.ones(33, device=DEVICE), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    """Whichever device is current."""
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            x, weight = X.to(f"cuda:{other}"), WEIGHT.to(f"cuda:{other}")
            out = rms_norm(x, weight, 1e-5)
            compiled = torch.compile(lambda x: rms_norm(x, weight, 1e-5), fullgraph=True, backend="aot_eager")  # noqa: B023 (called in the same turn)
            assert out.device == x.device
            assert_bit_equal(out.to(X.device), norm(X))
            assert_bit_equal(compiled(x), out)


JIT_FUNCTIONS = [
    (node, [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)])
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list)
]


def test_jit_functions_take_few_parameters():
    assert len(JIT_FUNCTIONS) > 50
    many = {node.name: len(names) for node, names in JIT_FUNCTIONS if len(names) > MOST_PARAMETERS}
    assert many == MORE_PARAMETERS


def test_no_kernel_converts_an_integer_argument():
    """An argument of 1 is a Python int in a compiled kernel, which has no ``to``. The interpreter does not show it."""
    kernels = [(node, names) for node, names in JIT_FUNCTIONS if node.name.endswith("_kernel")]
    assert len(kernels) > 20
    for kernel, names in kernels:
        numbers = [name for name in names if not name.endswith("_ptr")]
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and node.attr == "to":
                assert ast.unparse(node.value).split(".")[0] not in numbers, f"{kernel.name}: {ast.unparse(node)}"
