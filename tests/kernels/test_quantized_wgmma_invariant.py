"""The wgmma regime under batch_invariant: a token's bits do not depend on how many tokens there are, nor on tuning."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compiled_kernels import compiled
from gluon_in_numpy import run_launches
from rooflama.kernels import LAYOUTS, Weight, quantized_matmul, quantized_wgmma_ends, reference
from rooflama.kernels.backend import INTERPRETED
from rooflama.kernels.gpu import GPUTarget
from rooflama.kernels.launch import override
from rooflama.kernels.quantized_tiles import Input, Output
from rooflama.kernels.quantized_wgmma import _wgmma_kernel, launch_wgmma, serves
from rooflama.kernels.quantized_wgmma_ends import Plan, scratch_bytes
from rooflama.kernels.rehearsal import rehearsal, without_gpu
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE, exact, normal
from rooflama.testing.weights import random_weight

HOPPER = DEVICE.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="wgmma exists on compute capability 9.x alone")
in_numpy = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernel itself runs")

QUANTISED = [name for name, layout in LAYOUTS.items() if not layout.is_float]
ENDINGS = ("plain", "bias and residual", "norm and residual", "norm and bias and swiglu", "norm to float32")


def options_of(rng, ending, num_tokens, rows, columns, dtype):
    options = {"swiglu": "swiglu" in ending, "out_dtype": torch.float32 if "float32" in ending else dtype}
    if "bias" in ending:
        options["bias"] = normal(rng, rows)
    if "residual" in ending:
        options["residual"] = normal(rng, num_tokens, rows, dtype=dtype)
    if "norm" in ending:
        options |= {"norm_weight": normal(rng, columns, scale=2.0**-6), "eps": 1e-5}
    return options


def tokens_of(options, chosen):
    """The options of a product of some of the tokens."""
    return options | ({"residual": options["residual"][chosen].contiguous()} if "residual" in options else {})


def in_float64(x, weight, options):
    """The definition's product."""
    given = {name: exact(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    del given["out_dtype"]
    return reference.quantized_matmul(exact(x), weight.numpy(), **given)


def assert_close(got, expected, rounding):
    """Every token by itself: none may be wrong behind the others."""
    off = np.linalg.norm(exact(got) - expected, axis=1)
    assert (off <= 4 * rounding * np.linalg.norm(expected, axis=1)).all()


def on_the_cpu(x, weight, *, bias=None, residual=None, norm_weight=None, eps=0.0, swiglu=False, out_dtype=None):
    """The regime's launches, that of Gluon with NumPy. Copies arrive as late as they may."""
    rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.full((len(x), rows), float("nan"), dtype=out_dtype)
    output = Output(bias, residual, 0 if residual is None else residual.stride(0), out)
    run_launches(launch_wgmma(Input(x, x.stride(0), norm_weight, eps), weight, output, swiglu, True), late=True)
    return out


@in_numpy
@pytest.mark.parametrize(
    ("ggml_type", "ending"),
    [
        ("Q4_K", "norm to float32"),
        ("Q6_K", "norm and residual"),
        ("Q4_1", "norm and bias and swiglu"),
    ],
)
def test_neither_tokens_nor_tiles_change_a_bit(ggml_type, ending, monkeypatch):
    """Of one, two and no scaled terms, with minima and without. All that may be tuned changes with the tokens."""
    rng = np.random.default_rng(0)
    columns, dtype = 768, torch.float16
    weight, x = random_weight(rng, ggml_type, 70, columns), normal(rng, 70, columns, dtype=dtype)
    options = options_of(rng, ending, len(x), 70, columns, dtype)
    with override("wgmma", SPLITS=2, ROWS=64, FLIGHT=1, REGISTERS=168):
        whole = on_the_cpu(x, weight, **options)
    assert_close(whole, in_float64(x, weight, options), 1e-5 if "float32" in ending else 2.0**-10)
    monkeypatch.setattr(quantized_wgmma_ends, "MOST_COLUMNS", 64)
    monkeypatch.setattr(quantized_wgmma_ends, "SLICE_BYTES", 1)  # each tile is a slice
    for chosen, tile, flight in (([69], 128, 2), ([*range(20, 31)], 64, 2), ([*range(66)], 128, 1)):
        with override("wgmma", SPLITS=2, ROWS=tile, FLIGHT=flight, REGISTERS=255):
            some = on_the_cpu(x[chosen], weight, **tokens_of(options, chosen))
        assert_bit_equal(some, whole[chosen], context=f"tokens {chosen}, ROWS={tile}, FLIGHT={flight}")


def launches_of(ggml_type, num_tokens, rows, columns, dtype=torch.float16, **options):
    """Those of a batch-invariant product on a Hopper GPU, which need not be there."""
    planes = (
        torch.empty(rows, columns // plane.elements, dtype=getattr(torch, plane.dtype), device="meta")
        for plane in LAYOUTS[ggml_type].planes
    )
    weight = Weight.make(ggml_type, planes, (rows, columns))
    with rehearsal(GPUTarget("cuda", 90, 32)) as found:
        x = torch.empty(num_tokens, columns, dtype=dtype, device="meta")
        quantized_matmul(x, weight, batch_invariant=True, **options)
    return found.launches


def print_sums(ggml_type, num_tokens, swiglu):
    """Of the compiled product, as JSON: additions and fused ones per eight tokens, and products on tensor cores."""
    gpu, rows = GPUTarget("cuda", 90, 32), 28672
    options = {"bias": torch.empty(rows, device="meta"), "swiglu": swiglu}
    if not swiglu:
        options["residual"] = torch.empty(num_tokens, rows, dtype=torch.float16, device="meta")
    launches = launches_of(ggml_type, num_tokens, rows, 4096, **options)
    (one,) = (one for one in launches if one.kernel is _wgmma_kernel)
    with without_gpu(gpu):
        ptx = one.kernel.warmup(*one.args, grid=one.grid, **one.options).asm["ptx"]
    added, fused = (len(re.findall(what, ptx)) for what in (r"\b(?:add|sub)(?:\.\w+)*\.f32", r"\bfma\.rn\.f32"))
    eights = one.options["N"] // 8
    print(json.dumps([added / eights, fused / eights, ptx.count("wgmma.mma_async.")]))


@pytest.mark.parametrize(("ggml_type", "swiglu"), [("Q4_K", False), ("Q5_0", True)])
def test_sums_are_the_same_instructions(ggml_type, swiglu):
    """Compiled for Hopper: per token as many sums, of which as many are fused with a product, in tiles of 8 and of 128.

    Else ptxas, or LLVM before it, would fuse a product and a sum here and not there.
    """
    calls = "; ".join(f"t.print_sums({ggml_type!r}, {num_tokens}, {swiglu})" for num_tokens in (1, 128))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(  # in a process of its own, since the interpreter changes Triton's language
        [sys.executable, "-P", "-c", f"import test_quantized_wgmma_invariant as t; {calls}"],
        env=environment | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
        check=True,
    )
    of_one, of_many = map(json.loads, done.stdout.splitlines())
    assert of_one == of_many
    assert min(of_one[1:]) > 0


TUNED = {"N", "ROWS", "FLIGHT", "num_warps", "maxnreg"}  # no bit depends on these


def without_tuning(one):
    """A product's launch without what is tuned, and without the number of tiles, by which addresses are computed."""
    names = one.kernel.arg_names
    args = tuple(2 if name == "tiles" else value for name, value in zip(names, one.args, strict=False))
    return one._replace(args=args, options={name: v for name, v in one.options.items() if name not in TUNED})


@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q6_K", "Q5_0"])
@pytest.mark.parametrize(("rows", "columns"), [(28672, 4096), (6144, 4096), (4096, 14336), (128256, 4096)])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_every_number_of_tokens_runs_the_same_kernels(ggml_type, rows, columns, out_dtype):
    """Compiled the same way, but for what is tuned; and sums have the same splits."""
    norm = torch.empty(columns, device="meta")
    found = set()
    for num_tokens in (1, 2, 3, 8, 9, 17, 64, 65, 130, 512, 2048):
        launches = launches_of(ggml_type, num_tokens, rows, columns, norm_weight=norm, out_dtype=out_dtype)
        products = [one for one in launches if one.kernel is _wgmma_kernel]
        others = [one for one in launches if one.kernel is not _wgmma_kernel]
        (splits,) = {
            (one.grid[1], dict(zip(one.kernel.arg_names, one.args, strict=False))["blocks_per_split"])
            for one in products
        }
        found.add((splits, frozenset(compiled([*map(without_tuning, products), *others]))))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("ggml_type", "columns", "dtype"),
    [("Q4_0", 576, torch.float16), ("Q4_K", 4096, torch.float32), ("F16", 4096, torch.float16)],
)
def test_other_products_keep_dot(ggml_type, columns, dtype):
    """Without whole blocks of 256 columns, of float32 activations, of float weights."""
    for num_tokens in (1, 3, 64, 65):
        (one,) = launches_of(ggml_type, num_tokens, 96, columns, dtype)
        assert one.kernel.fn.__name__ == "_dot_kernel"
        assert one.options["BLOCK_M"] == 16


@pytest.mark.parametrize(("num_tokens", "parts"), [*itertools.product((1, 64, 65, 513, 2048, 100_000), (1, 2))])
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (28672, 4096), (4096, 14336), (128256, 4096)])
def test_slices(num_tokens, parts, rows, columns):
    """Together they hold every token, none is empty, and each has scratch for one tile or within the limit."""
    layout = LAYOUTS["Q4_K"]
    plan = Plan.of(rows, columns, num_tokens, parts, layout, DEVICE)
    assert (plan.slices - 1) * plan.padded < num_tokens <= plan.slices * plan.padded
    assert plan.tiles * plan.n == plan.parts * plan.padded
    taken = scratch_bytes(rows, columns, num_tokens, parts, layout, DEVICE)
    assert plan.padded <= 64 or taken <= 1.2 * quantized_wgmma_ends.SLICE_BYTES
    assert plan.slices * plan.padded - num_tokens < max(8, num_tokens, 64 * plan.slices)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ggml_type", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_tokens_gives_the_same_bits(ggml_type, dtype):
    """Alone, in companies and in prompts; each type with an ending of its own."""
    rng = np.random.default_rng(0)
    rows, columns = 322, 1280
    ending = ENDINGS[(QUANTISED.index(ggml_type) + (dtype == torch.float16)) % len(ENDINGS)]
    assert_invariant(rng, ggml_type, ending, rows, columns, dtype)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rows", [200, 4098])  # a few splits, and one
def test_every_ending_gives_the_same_bits(ending, rows):
    assert_invariant(np.random.default_rng(1), "Q4_K", ending, rows, 4096, torch.bfloat16)


def assert_invariant(rng, ggml_type, ending, rows, columns, dtype):
    weight, x = random_weight(rng, ggml_type, rows, columns), normal(rng, 130, columns, dtype=dtype)
    options = options_of(rng, ending, len(x), rows, columns, dtype) | {"batch_invariant": True, "resident": True}
    assert serves(Input(x, x.stride(0), None, 0.0), weight)
    whole = quantized_matmul(x, weight, **options)
    assert_close(whole, in_float64(x, weight, options), 1e-5 if "float32" in ending else torch.finfo(dtype).eps)
    companies = [range(count) for count in (1, 2, 3, 8, 9, 17, 64, 65)]
    companies += [rng.permutation(130)[:count] for count in (1, 2, 5, 8, 33, 64, 65, 130)]
    for chosen in map(list, companies):
        got = quantized_matmul(x[chosen], weight, **tokens_of(options, chosen))
        assert_bit_equal(got, whole[chosen], context=f"{ggml_type} {ending} {dtype} tokens {chosen}")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q6_K", "Q5_0"])
@pytest.mark.parametrize(("tile", "flight", "registers"), [(64, 1, 255), (64, 2, 168), (128, 2, 255), (128, 4, 168)])
def test_tuning_changes_no_bit(ggml_type, tile, flight, registers):
    rng = np.random.default_rng(2)
    weight, x = random_weight(rng, ggml_type, 200, 2048), normal(rng, 17, 2048, dtype=torch.bfloat16)
    with override("wgmma", SPLITS=2, ROWS=128, FLIGHT=1, REGISTERS=168):
        first = quantized_matmul(x, weight, batch_invariant=True)
    with override("wgmma", SPLITS=2, ROWS=tile, FLIGHT=flight, REGISTERS=registers):
        assert_bit_equal(quantized_matmul(x, weight, batch_invariant=True), first)
        assert_bit_equal(quantized_matmul(x[5:6], weight, batch_invariant=True), first[5:6])


@pytest.mark.gpu
@on_hopper
def test_slices_share_scratch_and_change_no_bit(monkeypatch):
    rng = np.random.default_rng(3)
    weight, x = random_weight(rng, "Q4_K", 512, 2048), normal(rng, 600, 2048, dtype=torch.bfloat16)
    options = options_of(rng, "norm and residual", 600, 512, 2048, x.dtype) | {"batch_invariant": True}
    whole = quantized_matmul(x, weight, **options)
    with monkeypatch.context() as patch, override("embedding", BLOCK_K=1024, num_warps=4):  # bound anew
        patch.setattr(quantized_wgmma_ends, "SLICE_BYTES", 4 << 20)
        assert Plan.of(512, 2048, 600, 1, weight.layout, DEVICE).slices > 2
        for _ in range(3):
            assert_bit_equal(quantized_matmul(x, weight, **options), whole)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = quantized_matmul(x, weight, **options)
        taken = torch.cuda.max_memory_allocated() - before - out.nbytes
        stated = scratch_bytes(512, 2048, 600, 1, weight.layout, DEVICE)
        assert stated <= taken <= stated + 2**20  # blocks of torch's may be that much larger
