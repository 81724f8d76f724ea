"""Keys and values in a file: what is loaded is what was computed, and what does not fit is refused."""

import pytest
import torch
from safetensors.torch import save_file

import rooflama
from rooflama import ModelClosed
from rooflama.loaders.gguf import read_gguf
from rooflama.models import OutOfPages, Request, SamplingParams, Sequence, TokenEngine
from rooflama.states import StateError, load, save
from running_models import running
from small_checkpoint import Parts, write_small
from tiny_checkpoints import ORIGINAL, random_tokens, write_case

PROMPT = random_tokens(75, 90)
pytestmark = pytest.mark.usefixtures("numpy_backend")


def loaded(path, **options):
    return rooflama.load(path, device="cpu", progress=False, **options)


def cached(engine, prompt, new):
    sequence = Sequence(Request(prompt, new, SamplingParams()))
    engine.add(sequence)
    engine.advance(sequence, until=lambda: False)
    return sequence.timings.cached_tokens


@pytest.fixture
def path(tmp_path):
    return write_small(tmp_path / "small.gguf")


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_state_survives_the_model(path, tmp_path, kv_dtype):
    file = tmp_path / "prompt.state"
    with loaded(path, kv_dtype=kv_dtype, max_sequences=2) as model:
        model.save_state(PROMPT, file)
        want = model.generate(PROMPT, max_new_tokens=9).token_ids
        other = model.generate([*PROMPT[:50], 1, 2], max_new_tokens=9).token_ids
    with loaded(path, kv_dtype=kv_dtype, max_sequences=2) as model:
        free = model.runner.cache.pool.num_free
        assert model.load_state(file) == PROMPT
        assert model.runner.cache.pool.num_free == free
        got = model.generate(PROMPT, max_new_tokens=9)
        assert (got.token_ids, got.timings.cached_tokens) == (want, len(PROMPT) - 1)
        got = model.generate([*PROMPT[:50], 1, 2], max_new_tokens=9)
        assert (got.token_ids, got.timings.cached_tokens) == (other, 50)


def test_a_window_saves_what_it_sees(tmp_path):
    path, file = write_case("mistral-window", tmp_path, "gguf"), tmp_path / "prompt.state"
    with read_gguf(path) as checkpoint:
        with running(checkpoint, max_context=128) as runner:
            save(TokenEngine(runner), PROMPT, None, file)
        with running(checkpoint, max_context=128) as runner:
            engine = TokenEngine(runner)
            assert load(engine, file) == PROMPT
            assert cached(engine, [*PROMPT, 3], 2) == len(PROMPT)


def other_weights(path):
    parts = Parts()
    parts.weights = {
        name: value[::-1].copy() if name.endswith("ffn_up.weight") else value for name, value in parts.weights.items()
    }
    return parts.write(path)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (other_weights, {}, "keys that differ from this model's"),
        (write_small, {"kv_dtype": "int8"}, "another kv dtype: torch.float32, not torch.int8"),
        (write_small, {"rope": {"base": 500.0}}, "another model"),
        (write_small, {"prefix_cache": False}, "without a prefix cache"),
    ],
    ids=["weights", "dtype", "rotation", "switched off"],
)
def test_a_state_of_something_else_is_refused(path, tmp_path, make, options, message):
    file = tmp_path / "prompt.state"
    with loaded(path) as model:
        model.save_state(PROMPT, file)
    with loaded(make(tmp_path / "other.gguf"), **options) as model:
        with pytest.raises(StateError, match=message):
            model.load_state(file)
        assert model.generate(PROMPT, max_new_tokens=1).timings.cached_tokens == 0


def test_another_planned_length_may_mean_another_rotation(tmp_path):
    """LongRoPE: a state of a short plan, loaded where requests may fill the context, serves short plans only."""
    path, file = write_case("phi3-128k", tmp_path, "gguf"), tmp_path / "prompt.state"
    prompt = PROMPT[: ORIGINAL - 8]
    with read_gguf(path) as checkpoint, running(checkpoint) as runner:
        save(TokenEngine(runner), prompt, 2, file)
        for new, found in ((2, len(prompt) - 1), (ORIGINAL, 0)):
            engine = TokenEngine(runner)
            load(engine, file)
            assert cached(engine, prompt, new) == found


def test_what_is_no_state_is_refused(path, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors at all")
    with loaded(path) as model:
        for name in ("other.safetensors", "text", "absent"):
            with pytest.raises(StateError):
                model.load_state(tmp_path / name)
    with pytest.raises(ModelClosed):
        model.load_state(tmp_path / "text")


def test_a_state_beyond_the_pool_is_refused(path, tmp_path):
    file = tmp_path / "prompt.state"
    with loaded(path) as model:
        model.save_state(PROMPT, file)
    with loaded(path, max_context=76) as model:
        cache = model.runner.cache
        held = cache.add()
        cache.reserve(held, 70)
        with pytest.raises(OutOfPages):
            model.load_state(file)
        cache.free(held)
        assert model.load_state(file) == PROMPT
