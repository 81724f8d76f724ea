"""Whole models over int8 and fp8 pages: the kernels make the definition's errors, and no others."""

import pytest
import torch

from rooflama.kernels import use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.testing.strategies import DEVICE
from running_models import decode_logits, prefill_logits, running
from tiny_checkpoints import cases, random_tokens, write_case

NUM_TOKENS, DECODED = 19, 2  # more than a page


def both_ways(path, tokens, backend, kv_dtype):
    """Logits of the last tokens: prefilled in two passes, and decoded."""
    device = DEVICE.type if backend == "triton" else "cpu"
    with (
        use_backend(backend),
        read_gguf(path) as checkpoint,
        running(checkpoint, device=device, kv_dtype=kv_dtype) as runner,
    ):
        (prefilled,) = prefill_logits(runner, [tokens], NUM_TOKENS // 2 + 1)
        (decoded,) = decode_logits(runner, [tokens], [NUM_TOKENS - DECODED])
    return {"prefilled": prefilled[-DECODED:], "decoded": decoded}


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        ("llama3.1", torch.int8),
        ("qwen3", torch.float8_e4m3fn),
        pytest.param("mistral-window", torch.int8, marks=pytest.mark.gpu),
        pytest.param("phi3-128k", torch.float8_e4m3fn, marks=pytest.mark.gpu),
    ],
)
def test_kernels_follow_the_definition(name, kv_dtype, tmp_path):
    """A code that rounds the other way, since sums differ in their last bits, is a small part of what codes move."""
    path = write_case(name, tmp_path, "gguf")
    tokens = random_tokens(NUM_TOKENS, cases()[name].config.vocab_size)
    exact, expected = (both_ways(path, tokens, "numpy", dtype) for dtype in (None, kv_dtype))
    for way, logits in both_ways(path, tokens, "triton", kv_dtype).items():
        moved = float((expected[way] - exact[way]).norm())
        off = float((logits - expected[way]).norm())
        assert moved > 0
        assert off <= moved / 10, f"{name}, {kv_dtype}, {way}: off by {off:.3g}, where the codes move {moved:.3g}"
