"""A whole model's bits, with batch_invariant: the same alone, in a batch, in chunks of any size, and while decoding."""

import pytest
import torch
from torch import Tensor

import rooflama
from compiled_kernels import compiled
from model_shapes import config_of
from rooflama import ArgumentError, plan_memory
from rooflama.kernels import INTERPRETED, use_backend
from rooflama.kernels import kernel as kernels
from rooflama.kernels.quantized_wgmma_ends import SLICE_BYTES, scratch_bytes
from rooflama.kernels.weight import LAYOUTS
from rooflama.loaders.gguf import read_gguf
from rooflama.models.serving.sampler import Options, Sampler
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


def test_tokens_have_the_same_bits_decoded_and_read(runner):
    """So a preempted sequence may read what it had drawn. Longer than what decode attention cuts into splits."""
    tokens = random_tokens(68, runner.decoder.config.vocab_size)
    (read,) = prefill_logits(runner, [tokens], 64)
    (decoded,) = decode_logits(runner, [tokens], [len(tokens) - 2])
    assert all(map(torch.equal, bits([decoded]), bits([read[-2:]])))


@pytest.mark.skipif(not INTERPRETED, reason="records the launches of Triton's interpreter")
def test_every_pass_runs_the_same_kernels(runner, monkeypatch):
    """Each compiled the same way, so that the order of every sum is the same, which the interpreter would not show."""
    launched = []

    def record(one):
        launched.append(one)
        for tensor in (value for value in one.args if isinstance(value, Tensor)):
            tensor.zero_()

    monkeypatch.setattr(kernels, "run", record)
    found = {}
    for count in (1, 2, 5, 16, 33):
        prefill_logits(runner, [random_tokens(count, 90)], 64)
        found[f"a prompt of {count}"] = compiled(launched)
        launched.clear()
    for count in (1, 2, 3):
        decode_logits(runner, count * [[1, 2]], count * [1])
        found[f"a step of {count}"] = {name for name in compiled(launched) if name[0] != "_next_slots_kernel"}
        launched.clear()
    first = found.pop("a prompt of 1")
    assert len(first) > 5
    for which, kernels_of_it in found.items():
        assert kernels_of_it == first, which


def test_log_probabilities():
    """Of a row, whatever rows stand beside it."""
    logits = 4 * torch.randn(8, 5000, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    sampler, options = Sampler(8, num_rows=5000, num_tokens=None, device=DEVICE), Options(logprobs=4)
    sampler.prepare(options)
    drawn, _, top = (part.clone() for part in sampler.draw(logits, slice(0, 8), options)[1])
    torch.testing.assert_close(top, logits.log_softmax(-1).topk(4).values)
    for row in range(8):
        alone = sampler.draw(logits[row : row + 1], slice(0, 1), options)[1]
        assert torch.equal(alone[0], drawn[row : row + 1])
        assert torch.equal(alone[2], top[row : row + 1])


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


def test_a_plan_with_the_scratch_of_products():
    """Of a slice of a long prompt, and of a step's widest product in parts."""
    config = config_of("Llama-3-8B")
    plans = {
        flag: plan_memory(config, context=4096, device="cuda", weight_types="Q4_K", batch_invariant=flag)
        for flag in (True, False)
    }
    in_parts = {
        flag: [line.nbytes for line in plan.lines if line.name == "products in parts"] for flag, plan in plans.items()
    }
    assert in_parts[False] == []
    prompt, step = in_parts[True]
    assert 0.9 * SLICE_BYTES < prompt < 1.2 * SLICE_BYTES
    assert step == scratch_bytes(config.intermediate_size, config.hidden_size, 1, 1, LAYOUTS["Q4_K"], None)
