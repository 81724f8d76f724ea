"""A whole model's bits, with batch_invariant: the same alone, in a batch, and in chunks of any size."""

import pytest
import torch

import rooflama
from rooflama import ArgumentError, plan_memory
from rooflama.kernels import use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.testing.strategies import DEVICE
from running_models import decode_logits, prefill_logits, running
from small_checkpoint import write_small
from tiny_checkpoints import random_tokens, write_case

DTYPES = [torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]


@pytest.fixture(scope="module", params=["small", "qwen3"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "small":  # several quantised types, projections in two parts
        return write_small(folder / "small.gguf")
    return write_case(request.param, folder, "gguf")


@pytest.fixture(params=DTYPES, ids=str)
def runner(path, request):
    with (
        use_backend("triton"),
        read_gguf(path) as file,
        running(file, num_seqs=3, device=DEVICE.type, dtype=request.param, batch_invariant=True) as runner,
    ):
        yield runner


def bits(logits):
    return [part.view(torch.int32) for part in logits]


def test_prompts(runner):
    sequences = [random_tokens(length, runner.decoder.config.vocab_size) for length in (2, 9, 5)]
    whole = [prefill_logits(runner, [tokens], 64)[0] for tokens in sequences]
    for chunk in (1, 4, 64):
        together = prefill_logits(runner, sequences, chunk)
        assert all(map(torch.equal, bits(together), bits(whole))), f"chunks of {chunk}"


def test_decoding(runner):
    sequences = [random_tokens(length, runner.decoder.config.vocab_size) for length in (6, 9, 4)]
    prompts = [3, 5, 1]
    alone = [decode_logits(runner, [tokens], [length])[0] for tokens, length in zip(sequences, prompts, strict=True)]
    assert all(map(torch.equal, bits(decode_logits(runner, sequences, prompts)), bits(alone)))


def test_loading_promises_it_on_kernels_only(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    with use_backend("triton"), rooflama.load(path, batch_invariant=True, progress=False) as model:
        assert model.runner.decoder.batch_invariant
        assert all(
            part.batch_invariant
            for part in (model.runner.decoder.layers[0].qkv, model.runner.decoder.layers[1].ffn_down)
        )
        assert "dequantised rows" not in {line.name for line in model.plan.lines}
    with use_backend("numpy"), pytest.raises(ArgumentError, match="only the Triton kernels promise it"):
        rooflama.load(path, device="cpu", batch_invariant=True, progress=False)


def test_a_plan_without_dequantised_rows(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    lines = {
        flag: {line.name for line in plan_memory(path, device="cuda", batch_invariant=flag).lines}
        for flag in (True, False)
    }
    assert lines[False] - lines[True] == {"dequantised rows", "matmul library"}
