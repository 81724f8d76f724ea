"""Several requests on one model: threads, open streams, closing while another thread generates."""

import contextvars
import threading
import time

import pytest

import rooflama
from rooflama import ModelClosed
from rooflama.models.kv_cache import OutOfPages
from rooflama.models.serving.turns import Turns
from small_checkpoint import write_small

PROMPT = "ab ab"
WAIT_S = 60


@pytest.fixture
def model(tmp_path, numpy_backend):
    """With pages for one sequence of 96 tokens."""
    with rooflama.load(write_small(tmp_path / "m.gguf"), device="cpu", max_context=96, progress=False) as model:
        yield model


def in_threads(*actions):
    """What each action returns or raises, each in a thread of its own with this thread's context."""
    results = [None] * len(actions)

    def run(index, action):
        try:
            results[index] = action()
        except Exception as error:
            results[index] = error

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, index, action), daemon=True)
        for index, action in enumerate(actions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    return results


def all_free(model):
    pool = model.runner.cache.pool
    return pool.num_free == len(pool.references)


@pytest.mark.parametrize("length", [80, 10], ids=["one fits", "several fit"])
def test_requests_of_several_threads_get_what_they_get_alone(model, length):
    want = model.generate(PROMPT, max_new_tokens=length)

    def generate():
        return model.generate(PROMPT, max_new_tokens=length).text

    def stream():
        return "".join(model.stream(PROMPT, max_new_tokens=length))

    got = in_threads(generate, stream, generate, lambda: model.logits([5] * 90).shape[0])
    assert got == [want.text, want.text, want.text, 90]
    assert all_free(model)


def test_a_request_beside_an_open_stream_of_the_same_thread(model):
    """Neither waits for the other; the stream goes on afterwards where it was."""
    whole = model.generate(PROMPT, max_new_tokens=80, temperature=1.0, seed=4, logprobs=1)
    stream = model.stream(PROMPT, max_new_tokens=80, temperature=1.0, seed=4, logprobs=1)
    text = ""
    for number, piece in enumerate(stream):
        text += piece
        if number in (0, 5):
            assert model.generate(PROMPT, max_new_tokens=80, temperature=1.0, seed=4).text == whole.text
            assert model.logits([5] * 96).shape[0] == 96
    assert text == whole.text
    assert [entry.token_id for entry in stream.logprobs] == whole.token_ids
    assert all_free(model)


def test_a_stream_that_nobody_reads_makes_way_for_another_thread(model):
    stream = iter(model.stream(PROMPT, max_new_tokens=80))
    pieces = [next(stream)]
    want = model.generate(PROMPT, max_new_tokens=80).text
    assert in_threads(lambda: model.generate(PROMPT, max_new_tokens=80).text) == [want]
    assert "".join([*pieces, *stream]) == want


def test_a_request_within_an_observer_finds_no_room_and_says_so(model):
    def observe(name, layer, tensor):
        model.generate(PROMPT, max_new_tokens=80)

    with pytest.raises(OutOfPages):
        model.logits([5] * 90, observe=observe)
    assert all_free(model)


def test_an_observer_that_closes_the_model_ends_the_request(model):
    seen = []

    def observe(name, layer, tensor):
        seen.append((name, layer))
        model.close()

    with pytest.raises(ModelClosed, match="is closed"):
        model.logits([5, 6, 7], observe=observe)
    assert seen == [("q", 0)]
    assert model.device.held_bytes == 0


def test_turns_are_taken_in_order():
    turns, order = Turns(), []

    def take(name):
        with turns.turn():
            order.append(name)

    threads = []
    with turns.turn():
        for name in range(5):
            threads.append(threading.Thread(target=take, args=(name,), daemon=True))
            threads[-1].start()
            while len(turns._queue) <= name:
                time.sleep(0.001)
    for thread in threads:
        thread.join(WAIT_S)
    assert order == list(range(5))


@pytest.mark.parametrize("waiting", [False, True], ids=["computing", "waiting for pages"])
def test_closing_ends_the_requests_of_other_threads(model, waiting):
    begun = threading.Event()

    def generate():
        begun.set()
        while True:
            model.generate(PROMPT, max_new_tokens=80)

    def close():
        begun.wait(WAIT_S)
        time.sleep(0.05)
        model.close()
        return model.device.held_bytes

    *ended, held = in_threads(*[generate] * (3 if waiting else 1), close)
    assert all(isinstance(error, ModelClosed) and "closed" in str(error) for error in ended)
    assert held == 0
    assert model.close() is None


def test_a_close_that_failed_is_completed_by_another(model, monkeypatch):
    stream = iter(model.stream(PROMPT, max_new_tokens=20))
    next(stream)

    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.device, "close", fail)
        with pytest.raises(KeyboardInterrupt):
            model.close()
    with pytest.raises(ModelClosed, match="is closed"):
        model.generate(PROMPT)
    model.close()
    assert model.device.held_bytes == 0
