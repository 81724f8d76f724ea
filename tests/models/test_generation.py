"""Generation as a user meets it: streaming, stops, seeds, batches, bad parameters; on a small checkpoint."""

import pytest
import torch

import rooflama
from rooflama import ArgumentError, ModelClosed, RooflamaError, kernels
from rooflama.models import NaNLogits
from small_checkpoint import write_small

PROMPT = "ab ab"
SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture
def model(tmp_path, numpy_backend):
    path = write_small(tmp_path / "small.gguf")
    with rooflama.load(path, device="cpu", max_context=96, progress=False) as model:
        yield model


@pytest.mark.parametrize("options", [{}, {"seed": 3, **SAMPLED}], ids=["greedy", "sampled"])
def test_streamed_pieces_are_the_generated_text(model, options):
    generation = model.generate(PROMPT, max_new_tokens=24, **options)
    stream = model.stream(PROMPT, max_new_tokens=24, **options)
    assert "".join(stream) == generation.text
    assert stream.finish_reason == generation.finish_reason


def test_a_seed_reproduces_and_another_does_not(model):
    first = model.generate(PROMPT, max_new_tokens=24, seed=1, **SAMPLED)
    assert first.token_ids == model.generate(PROMPT, max_new_tokens=24, seed=1, **SAMPLED).token_ids
    assert first.token_ids != model.generate(PROMPT, max_new_tokens=24, seed=2, **SAMPLED).token_ids
    unseeded = model.generate(PROMPT, max_new_tokens=24, **SAMPLED)
    assert unseeded.token_ids == model.generate(PROMPT, max_new_tokens=24, seed=unseeded.seed, **SAMPLED).token_ids


def test_random_draws_are_numbered_and_greedy_ones_are_not(model):
    seen = []

    def spy(*args, steps, **kwargs):
        seen.append(None if steps is None else steps.tolist())
        return kernels.sample(*args, steps=steps, **kwargs)

    with rooflama.swap(sample=spy):
        random = model.generate(PROMPT, max_new_tokens=4, seed=1, **SAMPLED)
        greedy = model.generate(PROMPT, max_new_tokens=4)
    assert len(random.token_ids) > 1
    assert seen == [*([draw] for draw in range(len(random.token_ids))), *[None] * len(greedy.token_ids)]


def test_a_sequence_does_not_depend_on_its_neighbours(model):
    prompts = [PROMPT, "b", "a b a b a b"]
    together = model.generate(prompts, max_new_tokens=12, seed=5, **SAMPLED)
    for prompt, generation in zip(prompts, together, strict=True):
        alone = model.generate(prompt, max_new_tokens=12, seed=generation.seed, **SAMPLED)
        assert generation.token_ids == alone.token_ids
    assert [generation.seed for generation in together] == [5, 6, 7]


def test_more_prompts_than_fit_run_in_groups(model):
    prompts = [PROMPT] * 5
    alone = model.generate(PROMPT, max_new_tokens=60)
    assert [g.token_ids for g in model.generate(prompts, max_new_tokens=60)] == [alone.token_ids] * 5


def test_a_stop_string_ends_the_text_before_it(model):
    whole = model.generate(PROMPT, max_new_tokens=24)
    stop = whole.text[4:6]
    generation = model.generate(PROMPT, max_new_tokens=24, stop=stop)
    assert generation.text == whole.text[: whole.text.index(stop)]
    assert generation.finish_reason == "stop"
    assert len(generation.token_ids) < len(whole.token_ids)


def test_max_new_tokens_ends_with_length(model):
    generation = model.generate(PROMPT, max_new_tokens=3)
    assert (len(generation.token_ids), generation.finish_reason) == (3, "length")


@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_padding_rows_are_never_drawn(model, monkeypatch, temperature):
    """Rows of the output beyond the tokenizer's tokens, as many models have them."""
    assert model.runner.num_tokens == model.tokenizer.vocab_size
    monkeypatch.setattr(model.runner, "num_tokens", 40)
    generated = model.generate([7, 8, 9], max_new_tokens=40, temperature=temperature, seed=3)
    assert max(generated.token_ids) < 40


def test_logits_that_are_no_numbers_are_named(model, monkeypatch):
    free = model.runner.cache.pool.num_free
    norm = model.runner.decoder.output_norm
    kept = norm.clone()
    norm.fill_(float("nan"))
    try:
        with pytest.raises(NaNLogits, match=r"a NaN among the logits of token 1 after a prompt of 3, .*float32"):
            model.generate([7, 8, 9], max_new_tokens=4)
    finally:
        norm.copy_(kept)
    assert model.runner.cache.pool.num_free == free


def test_an_abandoned_stream_gives_its_pages_back(model):
    free = model.runner.cache.pool.num_free
    stream = iter(model.stream(PROMPT, max_new_tokens=24))
    next(stream)
    assert model.runner.cache.pool.num_free < free
    stream.close()
    assert model.runner.cache.pool.num_free == free


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "an empty prompt"),
        ([], {}, "an empty prompt"),
        ([10**6], {}, "token id 1000000"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens 0"),
        (PROMPT, {"max_new_tokens": 1000}, "context of 96 tokens"),
        (PROMPT, {"temperature": -1.0}, "temperature -1.0"),
        (PROMPT, {"temperature": float("nan")}, "temperature nan"),
        (PROMPT, {"top_p": 0.0}, "top_p 0.0"),
        (PROMPT, {"top_k": -1}, "top_k -1"),
        (PROMPT, {"min_p": 2.0}, "min_p 2.0"),
        (PROMPT, {"seed": -1}, "seed -1"),
    ],
)
def test_bad_parameters_are_named(model, prompt, options, message):
    with pytest.raises(ArgumentError, match=message):
        model.generate(prompt, **options)


def test_a_closed_model_says_so(model):
    model.close()
    model.close()
    with pytest.raises(ModelClosed, match="is closed"):
        model.generate(PROMPT)
    assert "closed" in repr(model)
    assert model.max_context == 96
    assert "context 96" in model.describe()


def test_closing_a_model_ends_its_streams_and_frees_everything(model):
    stream = iter(model.stream(PROMPT, max_new_tokens=50))
    next(stream)
    model.close()
    assert model.device.held_bytes == 0
    with pytest.raises(ModelClosed, match="a closed generation: it ends with its model"):
        next(stream)


def test_a_closed_stream_ends_and_gives_its_pages_back(model):
    free = model.runner.cache.pool.num_free
    stream = model.stream(PROMPT, max_new_tokens=50)
    pieces = iter(stream)
    first = next(pieces)
    assert model.runner.cache.pool.num_free < free
    stream.close()
    stream.close()
    assert model.runner.cache.pool.num_free == free
    assert [*pieces] == [*stream] == []
    assert model.generate(PROMPT, max_new_tokens=50).text.startswith(first)
    assert (stream.finish_reason, stream.timings.decode_steps) == ("length", 0)


def test_a_limit_may_be_text(tmp_path, numpy_backend):
    path = write_small(tmp_path / "small.gguf")
    with rooflama.load(path, device="cpu", max_context=96, memory_limit="8GiB", progress=False) as model:
        assert model.plan.limit == 8 * 2**30
    with pytest.raises(RooflamaError, match="'much'"):
        rooflama.load(path, device="cpu", memory_limit="much", progress=False)


@pytest.mark.parametrize("inside", ["load", "first", "rest", "load and first"])
def test_inference_mode_may_begin_and_end_anywhere(tmp_path, numpy_backend, inside):
    path = write_small(tmp_path / "small.gguf")
    with torch.inference_mode("load" in inside):
        model = rooflama.load(path, device="cpu", max_context=96, progress=False)
    with model:
        want = model.generate(PROMPT, max_new_tokens=8).text
        stream = iter(model.stream(PROMPT, max_new_tokens=8))
        with torch.inference_mode("first" in inside):
            pieces = [next(stream)]
        with torch.inference_mode("rest" in inside):
            pieces += stream
        assert "".join(pieces) == want
