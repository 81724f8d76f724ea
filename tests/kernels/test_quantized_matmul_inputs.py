"""What quantized_matmul takes and refuses, eagerly and under torch.compile."""

import numpy as np
import pytest
import torch

from rooflama.kernels import KernelInputError, Weight, quantized_matmul
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE, normal
from rooflama.testing.weights import random_weight


def test_opcheck():
    rng = np.random.default_rng(0)
    for ggml_type, num_tokens in (("Q4_K", 2), ("IQ4_XS", 20), ("F16", 70)):
        weight, x = random_weight(rng, ggml_type, 6, 256), normal(rng, num_tokens, 256)
        arguments = (x, ggml_type, list(weight.planes), [6, 256], normal(rng, 6))
        options = {"eps": 1e-5, "swiglu": True, "resident": True, "out_dtype": torch.float16}
        for added, named in (((normal(rng, num_tokens, 6), None), {}), ((None, normal(rng, 256)), options)):
            torch.library.opcheck(torch.ops.rooflama.quantized_matmul, (*arguments, *added), named)


def test_torch_compile_traces_through():
    rng = np.random.default_rng(0)
    weight, x = random_weight(rng, "Q4_1", 6, 64), normal(rng, 3, 64)

    def block(x, weight):
        return torch.relu(quantized_matmul(x, weight, residual=x[:, :6], norm_weight=x[0], eps=1e-6))

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(x, weight), block(x, weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 32)}, r"x must have shape \[any, 64\]"),
        ({"x": torch.zeros(64)}, r"x must have shape \[any, 64\]"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(64, 2).T}, "last dimension of x must be contiguous"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[3\]"),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, "bias is torch.int32"),
        ({"bias": torch.zeros(6, device=DEVICE)[::2]}, "last dimension of bias must be contiguous"),
        ({"residual": torch.zeros(1, 3)}, r"residual must have shape \[2, 3\]"),
        ({"residual": torch.zeros(2, 3, dtype=torch.int32)}, "residual is torch.int32"),
        ({"residual": torch.zeros(3, 2).T}, "last dimension of residual must be contiguous"),
        ({"norm_weight": torch.zeros(32)}, r"norm_weight must have shape \[64\]"),
        ({"norm_weight": torch.zeros(64, dtype=torch.int8)}, "norm_weight is torch.int8"),
        ({"norm_weight": torch.zeros(128, device=DEVICE)[::2]}, "last dimension of norm_weight must be contiguous"),
        ({"swiglu": True}, "weight has 3 rows"),
        ({"out_dtype": torch.float64}, "out_dtype torch.float64"),
    ],
)
def test_bad_input_is_refused_before_a_launch(changes, message):
    weight = random_weight(np.random.default_rng(0), "Q4_1", 3, 64)
    arguments = {"x": torch.zeros(2, 64), **changes}
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(KernelInputError, match=message):
        quantized_matmul(weight=weight, **arguments)


def test_swiglu_with_a_residual_is_refused():
    weight, x = random_weight(np.random.default_rng(0), "Q4_1", 4, 64), torch.zeros(2, 64, device=DEVICE)
    with pytest.raises(KernelInputError, match="swiglu with a residual"):
        quantized_matmul(x, weight, residual=torch.zeros(2, 4, device=DEVICE), swiglu=True)


def test_a_norm_of_no_columns_is_refused():
    weight = Weight.make("F32", (torch.zeros(3, 0, device=DEVICE),), (3, 0))
    x, norm_weight = torch.zeros(2, 0, device=DEVICE), torch.zeros(0, device=DEVICE)
    with pytest.raises(KernelInputError, match=r"x \[2, 0\]: a mean needs at least one column"):
        quantized_matmul(x, weight, norm_weight=norm_weight)
    assert quantized_matmul(x, weight).tolist() == [[0.0] * 3] * 2


def test_a_weight_that_does_not_fit_its_type_is_refused():
    weight, x = random_weight(np.random.default_rng(0), "Q4_1", 3, 64), torch.zeros(2, 64, device=DEVICE)
    with pytest.raises(KernelInputError, match="a type is one of F32, F16"):
        quantized_matmul(x, weight._replace(ggml_type="IQ1_S"))
    with pytest.raises(KernelInputError, match=r"has contiguous planes on one device, low \[4, 8\]"):
        quantized_matmul(x, weight._replace(shape=(4, 64)))
    with pytest.raises(KernelInputError, match="268435456 columns: a row of Q4_1 has at most 268435455 columns"):
        quantized_matmul(x, weight._replace(shape=(3, 2**28)))


@pytest.mark.parametrize(
    ("name", "shape"), [("x", (2, 64)), ("bias", (3,)), ("residual", (2, 3)), ("norm_weight", (64,))]
)
def test_tensors_on_two_devices_are_refused(name, shape):
    weight, x = random_weight(np.random.default_rng(0), "Q4_1", 3, 64), torch.zeros(2, 64, device=DEVICE)
    with pytest.raises(KernelInputError, match=f"{name} on meta.*: all tensors of one call live on one device"):
        quantized_matmul(**{"x": x, name: torch.zeros(shape, device="meta")}, weight=weight)


def test_rows_of_different_types_do_not_join():
    rng = np.random.default_rng(0)
    weights = [random_weight(rng, "Q4_K", 2, 256), random_weight(rng, "Q6_K", 2, 256)]
    with pytest.raises(KernelInputError, match="rows of Q4_K with 256 columns and Q6_K with 256 columns"):
        Weight.concat_rows(weights)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
@pytest.mark.parametrize(
    ("name", "shape"), [("x", (2, 64)), ("bias", (3,)), ("residual", (2, 3)), ("norm_weight", (64,))]
)
def test_bfloat16_is_refused_under_the_interpreter(name, shape):
    weight = random_weight(np.random.default_rng(0), "BF16", 3, 64)
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        quantized_matmul(**{"x": torch.zeros(2, 64), name: torch.zeros(shape, dtype=torch.bfloat16)}, weight=weight)
