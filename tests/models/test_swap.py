"""rooflama.swap: a caller's function runs in place of a kernel, inside loaded models, and only there."""

import contextvars
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import rooflama
from rooflama import KernelInputError, kernels, swap, trace
from rooflama.kernels import quantized_matmul, rms_norm, use_backend
from rooflama.testing.strategies import DEVICE
from rooflama.testing.weights import random_weight
from small_checkpoint import LAYERS, write_small

X, WEIGHT = torch.full((3, 32), 2.0), torch.ones(32)
PROMPT = "ab ab"


LIKELIEST = 10  # of tokens without logits of their own
TOKENS = {"max_new_tokens": 3, "logit_bias": {LIKELIEST: 1e-3}}


@pytest.fixture
def model(tmp_path):
    """Unfused, so that its blocks call rms_norm: twice per layer, and once before the logits."""
    with (
        nullcontext() if DEVICE.type == "cuda" else use_backend("numpy"),
        rooflama.load(write_small(tmp_path / "m.gguf"), device=DEVICE.type, fused=False, progress=False) as model,
    ):
        yield model


def no_numbers(x, weight, eps):
    """A norm after which all logits are 0, so that LIKELIEST is drawn."""
    return torch.zeros_like(x)


def plain(x, weight, eps):
    return (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def test_a_replacement_runs_with_the_arguments_of_the_call():
    seen = []

    def mine(*args, **kwargs):
        seen.append((args, kwargs))
        return "mine"

    with swap(rms_norm=mine):
        assert rms_norm(X, WEIGHT, eps=0.5) == "mine"
    assert seen == [((X, WEIGHT), {"eps": 0.5})]
    assert rms_norm(X, WEIGHT, 0.0).shape == X.shape


def test_an_unknown_kernel_is_refused_with_those_that_there_are():
    named = "no kernel is named rmsnorm: the kernels are .*rms_norm.*swiglu"
    with pytest.raises(KernelInputError, match=named), swap(rmsnorm=no_numbers):
        pass
    with pytest.raises(KernelInputError, match="rms_norm=None: a replacement is callable"), swap(rms_norm=None):
        pass


def test_the_inner_of_two_blocks_wins_by_name():
    with swap(rms_norm=lambda *args: "outer", swiglu=lambda *args: "outer"):
        with swap(rms_norm=lambda *args: "inner"):
            assert rms_norm(X, WEIGHT, 0.0) == "inner"
            assert kernels.swiglu(X, X) == "outer"
        assert rms_norm(X, WEIGHT, 0.0) == "outer"
    assert rms_norm(X, WEIGHT, 0.0).shape == X.shape


def test_an_error_inside_the_block_ends_the_swap():
    def broken(x, weight, eps):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), swap(rms_norm=broken):
        rms_norm(X, WEIGHT, 0.0)
    assert torch.equal(rms_norm(X, WEIGHT, 0.0), torch.ones_like(X))


def test_inside_its_replacement_a_kernel_is_itself_and_others_are_swapped():
    def twice(x, weight, eps):
        assert kernels.swiglu(x, x) == "mine"
        return 2 * rms_norm(x, weight, eps)

    with swap(rms_norm=twice, swiglu=lambda gate, up: "mine"):
        assert torch.equal(rms_norm(X, WEIGHT, 0.0), torch.full_like(X, 2.0))
        assert torch.equal(rms_norm(X, WEIGHT, 0.0), torch.full_like(X, 2.0))


def test_kernels_inside_a_kernel_are_not_replaced():
    """For nine tokens the norm of a product is a launch of rms_norm, for one it is not."""
    weight = random_weight(np.random.default_rng(0), "F32", 4, 32)
    x, norm_weight = torch.ones(9, 32, device=DEVICE), WEIGHT.to(DEVICE)
    with use_backend("triton"):
        want = quantized_matmul(x, weight, norm_weight=norm_weight)
        with swap(rms_norm=no_numbers):
            assert torch.equal(quantized_matmul(x, weight, norm_weight=norm_weight), want)


def test_another_thread_is_not_affected():
    results = {}

    def norm(name):
        results[name] = rms_norm(X, WEIGHT, 0.0)

    with swap(rms_norm=lambda *args: "mine"):
        threads = [
            threading.Thread(target=norm, args=["fresh"]),
            threading.Thread(target=contextvars.copy_context().run, args=[norm, "copied"]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(results["fresh"], torch.ones_like(X))
    assert results["copied"] == "mine"


def test_a_model_calls_a_replacement_in_every_layer_of_every_step(model):
    calls = []

    def counted(x, weight, eps):
        calls.append(len(x))
        return rms_norm(x, weight, eps)

    want = model.generate([5, 6, 7], **TOKENS).token_ids
    with swap(rms_norm=counted):
        assert model.generate([5, 6, 7], **TOKENS).token_ids == want
    assert calls == [3] * 2 * LAYERS + [1] + 2 * [1] * (2 * LAYERS + 1)  # on a GPU the second step is the captured one


@pytest.mark.gpu
def test_a_captured_step_holds_the_replacement(model):
    """The third token and those after it come from a captured graph."""
    options = TOKENS | {"max_new_tokens": 12}
    want = model.generate(PROMPT, **options).token_ids
    with swap(rms_norm=plain):
        assert model.generate(PROMPT, **options).token_ids == want
    with swap(rms_norm=no_numbers):
        assert model.generate(PROMPT, **options).token_ids == [LIKELIEST] * 12
    assert model.generate(PROMPT, **options).token_ids == want


def streamed(model):
    stream = model.stream(PROMPT, logprobs=0, **TOKENS)
    for _ in stream:
        pass
    return stream


def drawn(stream):
    return [entry.token_id for entry in stream.logprobs]


def test_generations_streams_chats_and_traces(model):
    """Each says something else under the swap, and the same as before after it."""
    calls = {
        "generate": lambda: model.generate(PROMPT, **TOKENS).token_ids,
        "several": lambda: model.generate([PROMPT, "a"], **TOKENS)[1].token_ids,
        "stream": lambda: drawn(streamed(model)),
        "chat": lambda: model.chat([{"role": "user", "content": "ab"}], **TOKENS).token_ids,
        "trace": lambda: trace(model, [5, 6], ["logits"])["logits"].abs().amax(-1).tolist(),
    }
    before = {name: call() for name, call in calls.items()}
    with swap(rms_norm=no_numbers):
        swapped = {name: call() for name, call in calls.items()}
    assert swapped == {**dict.fromkeys(["generate", "several", "stream", "chat"], [LIKELIEST] * 3), "trace": [0.0] * 2}
    assert {name: call() for name, call in calls.items()} == before
    assert all(before[name] != swapped[name] for name in calls)


def test_a_stream_keeps_the_swaps_under_which_it_was_opened(model):
    """Wherever it is read: so a captured step and one that is not agree."""
    want = drawn(streamed(model))
    outside = model.stream(PROMPT, logprobs=0, **TOKENS)
    with swap(rms_norm=no_numbers):
        inside = model.stream(PROMPT, logprobs=0, **TOKENS)
        list(outside)
        pieces = iter(inside)
        next(pieces)
        assert torch.equal(rms_norm(X, WEIGHT, 0.0), torch.zeros_like(X))
    assert torch.equal(rms_norm(X, WEIGHT, 0.0), torch.ones_like(X))
    list(pieces)
    assert drawn(inside) == [LIKELIEST] * 3
    assert drawn(outside) == want != [LIKELIEST] * 3
