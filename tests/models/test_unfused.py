"""A model whose blocks run their parts as kernels of their own equals the fused one up to rounding."""

import copy
from contextlib import contextmanager

import pytest
import torch

import rooflama
from rooflama import ArgumentError
from rooflama.kernels import use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.testing.strategies import DEVICE
from running_models import assert_parity, decode_logits, prefill_logits, running
from small_checkpoint import write_small
from tiny_checkpoints import cases, module, random_tokens, reference_logits, write_case

GGUF_CASES = [name for name, case in cases().items() if case.in_gguf]
ON_GPU = DEVICE.type == "cuda"  # the interpreter needs seconds for one pass
KERNEL_CASES = ["llama-biases", "qwen3", "phi4-mini"] if ON_GPU else ["qwen3"]
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]


@contextmanager
def unfused(path, **options):
    with read_gguf(path) as checkpoint, running(checkpoint, fused=False, **options) as runner:
        yield runner


@pytest.mark.parametrize("name", GGUF_CASES)
@pytest.mark.usefixtures("numpy_backend")
def test_definitions_match_transformers(name, tmp_path):
    tokens = random_tokens(max(cases()[name].lengths), cases()[name].config.vocab_size)
    expected, half = reference_logits(module(name), tokens), len(tokens) // 2
    with unfused(write_case(name, tmp_path, "gguf")) as runner:
        (prefilled,) = prefill_logits(runner, [tokens], 7)
        assert_parity(prefilled, expected, f"{name}, prefilled")
        (decoded,) = decode_logits(runner, [tokens], [half])
        assert_parity(decoded, expected[half:], f"{name}, decoded")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernels_are_no_further_off_than_transformers(name, dtype, tmp_path):
    """Distance to transformers in float32, against twice that of transformers in the same dtype, over all tokens."""
    tokens = random_tokens(4)
    exact = reference_logits(module(name), tokens)
    with torch.no_grad():
        rounded = copy.deepcopy(module(name)).to(device=DEVICE, dtype=dtype)
        same_dtype = rounded(torch.tensor([tokens], device=DEVICE)).logits[0].float().cpu()
    allowed = 2 * float((same_dtype - exact).norm())
    path = write_case(name, tmp_path, "gguf")
    with use_backend("triton"), unfused(path, device=DEVICE.type, dtype=dtype) as runner:
        (logits,) = prefill_logits(runner, [tokens], len(tokens))
    error = float((logits - exact).norm())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} of {float(exact.norm()):.3g}"


@pytest.mark.usefixtures("numpy_backend")
def test_loading_unfused(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    with (
        rooflama.load(path, device="cpu", progress=False) as fused,
        rooflama.load(path, device="cpu", fused=False, progress=False) as model,
    ):
        assert fused.runner.decoder.fused
        assert not model.runner.decoder.fused
        assert_parity(model.logits([5, 6, 7]), fused.logits([5, 6, 7]), "unfused against fused")
    with pytest.raises(ArgumentError, match="fused is True or False"):
        rooflama.load(path, fused="no", progress=False)
