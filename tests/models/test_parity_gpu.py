"""Every family and edge case on a GPU: float32 against transformers, bfloat16 no further off than transformers is."""

import copy

import pytest
import torch

import rooflama
from rooflama.loaders.gguf import read_gguf
from running_models import assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import cases, module, random_tokens, reference_logits, write_case
from whole_checkpoints import write_file

pytestmark = pytest.mark.gpu

GGUF_CASES = [name for name, case in cases().items() if case.in_gguf]


def both_ways(path, tokens, dtype):
    """Logits of the last half of the tokens, prefilled and decoded."""
    half = len(tokens) // 2
    with read_gguf(path) as checkpoint, running(checkpoint, device="cuda", dtype=dtype) as runner:
        (prefilled,) = prefill_logits(runner, [tokens], 7)
        (decoded,) = decode_logits(runner, [tokens], [half])
    return {"prefilled": prefilled[half:], "decoded": decoded}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_float32_matches_transformers(name, tmp_path):
    tokens = random_tokens(max(cases()[name].lengths), cases()[name].config.vocab_size)
    expected = reference_logits(module(name), tokens)[len(tokens) // 2 :]
    for way, logits in both_ways(write_case(name, tmp_path, "gguf"), tokens, torch.float32).items():
        assert_parity(logits, expected, f"{name}, {way}")


@pytest.mark.parametrize("name", GGUF_CASES)
def test_bfloat16_is_no_further_off_than_transformers(name, tmp_path):
    """Distance to transformers in float32, against twice that of transformers in bfloat16, over all tokens."""
    tokens = random_tokens(max(cases()[name].lengths), cases()[name].config.vocab_size)
    exact = reference_logits(module(name), tokens)[len(tokens) // 2 :]
    with torch.no_grad():
        rounded = copy.deepcopy(module(name)).to(device="cuda", dtype=torch.bfloat16)
        same_dtype = rounded(torch.tensor([tokens], device="cuda")).logits[0, len(tokens) // 2 :].float().cpu()
    allowed = 2 * float((same_dtype - exact).norm())
    for way, logits in both_ways(write_case(name, tmp_path, "gguf"), tokens, torch.bfloat16).items():
        error = float((logits - exact).norm())
        assert error <= allowed, f"{name}, {way}: error {error:.3g}, allowed {allowed:.3g} of {float(exact.norm()):.3g}"


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_dynamic_scaling_rotates_as_on_the_cpu(kv_dtype, tmp_path):
    """Short and long plans, decoded through the captured graph, which computes the angles of each step anew."""
    path = write_file("llama3", tmp_path / "tiny.gguf")
    tokens = random_tokens(20)
    results = {}
    for device in ("cpu", "cuda"):
        options = {"dtype": "float32", "kv_dtype": kv_dtype, "max_context": 128, "progress": False}
        rope = "kind=dynamic,factor=4,original_context=32"
        with rooflama.load(path, device=device, rope=rope, **options) as model:
            drawn = [model.generate(tokens, max_new_tokens=count).token_ids for count in (8, 60)]
            results[device] = model.logits([*tokens, *drawn[1]]), drawn
    assert_parity(results["cuda"][0], results["cpu"][0], "80 tokens", 1e-4)
    assert results["cuda"][1] == results["cpu"][1]
