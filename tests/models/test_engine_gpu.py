"""The engine on a GPU, with batch_invariant: no neighbour, preemption or cancellation changes a bit of a sequence."""

import itertools
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rooflama
from engine_acts import acts_of, finish, play, run_in_threads
from rooflama.models import Request, SamplingParams, Sequence, TokenEngine
from small_checkpoint import write_small

pytestmark = pytest.mark.gpu

CONTEXT, NEW = 128, 24
PROMPTS = [[7, 8, 9], [5] * 40, list(range(3, 73)), [20], [11, 4] * 50]
DRAWS = [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 4}]
SECONDS = 10

requests = st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, len(DRAWS) - 1))
acts = acts_of(requests, requests)


def sequence_of(prompt, draw):
    return Sequence(Request(PROMPTS[prompt], NEW, SamplingParams(**DRAWS[draw], logprobs=2)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, tmp_path_factory):
    """With pages for two sequences of CONTEXT tokens."""
    path = write_small(tmp_path_factory.mktemp("engine") / "small.gguf")
    options = {"dtype": request.param, "max_context": CONTEXT, "max_sequences": 2, "batch_invariant": True}
    with rooflama.load(path, progress=False, **options) as model:
        yield model


@pytest.fixture(scope="module")
def alone(model):
    """(tokens, log probabilities) of each request, computed on engines of their own."""
    found = {}
    for request in itertools.product(range(len(PROMPTS)), range(len(DRAWS))):
        sequence, engine = sequence_of(*request), TokenEngine(model.runner, prefix_cache=False)
        engine.add(sequence)
        finish(engine, sequence)
        found[request] = (sequence.token_ids, sequence.logprobs)
    return found.get  # hypothesis prints arguments


def assert_as_alone(sequence, wanted):
    count = len(sequence.token_ids)
    assert sequence.token_ids == wanted[0][:count]
    assert sequence.logprobs == wanted[1][:count]


@settings(max_examples=40, deadline=None)
@given(
    acts=st.lists(acts, min_size=6, max_size=25), budget=st.sampled_from([5, 33, 1024]), slots=st.sampled_from([2, 8])
)
def test_bits_do_not_depend_on_the_company(model, alone, acts, budget, slots):
    engine = TokenEngine(model.runner, num_slots=slots, token_budget=budget)
    added, _ = play(engine, acts, sequence_of)
    for request, sequence in added:
        assert sequence.finish_reason in ("length", "cancelled")
        assert_as_alone(sequence, alone(request))
    engine.forget_prefixes()
    assert model.runner.cache.pool.num_free == len(model.runner.cache.pool.references)


def test_threads_share_one_engine(model, alone):
    """Four threads add, read and cancel for some seconds."""
    failures, end = [], time.monotonic() + SECONDS

    def hammer(worker):
        try:
            for turn in itertools.count(worker):
                if time.monotonic() > end:
                    return
                request = (turn % len(PROMPTS), turn % len(DRAWS))
                sequence = sequence_of(*request)
                model.tokens.add(sequence)
                if turn % 3 == 2:
                    model.tokens.step()
                    model.tokens.cancel(sequence)
                else:
                    finish(model.tokens, sequence)
                assert_as_alone(sequence, alone(request))
        except Exception as error:
            failures.append(error)

    run_in_threads([partial(hammer, worker) for worker in range(4)], 10 * SECONDS)
    assert not failures
    assert not model.tokens.has_work
