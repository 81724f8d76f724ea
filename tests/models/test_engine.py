"""The engine: whatever is added, preempted or cancelled beside it, a sequence draws the tokens that it draws alone."""

import asyncio
import itertools
import os
import time
from io import StringIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import rooflama
from engine_acts import acts_of, finish, play, run_in_threads
from failing import Failing
from rooflama import ArgumentError, Engine, ModelClosed
from rooflama.kernels import use_backend
from rooflama.loaders.device import DeviceOutOfMemory
from rooflama.loaders.gguf import read_gguf
from rooflama.models import NaNLogits, OutOfPages, Request, SamplingParams, Sequence, TokenEngine
from rooflama.models.serving.sampler import Readback
from rooflama.models.serving.scheduler import AHEAD, Scheduler
from running_models import running
from small_checkpoint import write_small

WAIT_S = 120
CONTEXT = 128
PROMPTS = [[7, 8, 9], [5] * 40, list(range(3, 73)), [20]]
DRAWS = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3, "logit_bias": {9: 2.0, 30: 1.0, 31: 1.0}},
    {"logprobs": 2, "logit_bias": {8: 1.0}},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("engine") / "small.gguf")


@pytest.fixture(scope="module")
def model(path):
    """With pages for one sequence of CONTEXT tokens: two of 64."""
    with use_backend("numpy"), rooflama.load(path, device="cpu", max_context=CONTEXT, progress=False) as model:
        yield model


def all_free(model):
    pool = model.runner.cache.pool
    return pool.num_free == len(pool.references)


@pytest.fixture(scope="module")
def alone(model):
    """The tokens of (prompt number, draw number, new tokens) on an engine of its own, computed once."""
    known = {}

    def tokens(prompt, draw, new):
        if (prompt, draw) not in known:
            longest = CONTEXT - len(PROMPTS[prompt])
            sequence = sequence_of(prompt, draw, longest)
            engine = TokenEngine(model.runner)
            engine.add(sequence)
            finish(engine, sequence)
            known[prompt, draw] = sequence.token_ids
        return known[prompt, draw][:new]

    return tokens


def sequence_of(prompt, draw, new):
    return Sequence(Request(PROMPTS[prompt], new, SamplingParams(**DRAWS[draw])))


requests = st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, len(DRAWS) - 1), st.integers(1, 40))
acts = acts_of(requests)


def check_batches(scheduler):
    """From now on, assert of each batch that all sequences decode that can."""
    schedule = scheduler.schedule

    def checked():
        before = scheduler.preemptions
        batch = schedule()
        if scheduler.preemptions == before:
            ready = [one for one in scheduler.running if one.row >= 0 and one.num_cached < one.limit]
            assert batch.decode == ready
        return batch

    scheduler.schedule = checked


@settings(max_examples=12)
@example(acts=[(0, 0, 30), (3, 0, 30), 3, "cancel", 2], budget=33, slots=2)  # ends one of two within a page
@given(
    acts=st.lists(acts, min_size=4, max_size=14), budget=st.sampled_from([5, 33, 1024]), slots=st.sampled_from([2, 8])
)
def test_a_sequence_draws_what_it_draws_alone(model, alone, acts, budget, slots):
    """In tight memory, with chunked prompts, among sequences that come, go, and lose their pages."""
    with use_backend("numpy"):
        engine = TokenEngine(model.runner, num_slots=slots, token_budget=budget)
        check_batches(engine.scheduler)
        added, cancelled = play(engine, acts, sequence_of)
        assert not engine.has_work
        assert all_free(model)
        for (prompt, draw, new), sequence in added:
            want = alone(prompt, draw, new)
            if sequence in cancelled:
                want = want[: len(sequence.token_ids)]
            assert sequence.token_ids == want
            assert sequence.finish_reason == ("cancelled" if sequence in cancelled else "length")
            assert len(sequence.logprobs) == (len(want) if DRAWS[draw].get("logprobs") else 0)


def test_bits_do_not_depend_on_the_company(path):
    """With batch_invariant, on the kernels: log probabilities in every bit, though the sequence is preempted twice."""

    def run(engine, *others):
        sequence = Sequence(Request(PROMPTS[0], 5, SamplingParams(temperature=1.0, seed=1, logprobs=3)))
        for each in (sequence, *others):
            engine.add(each)
        for _ in range(2 if others else 0):
            engine.step()
            engine.step()
            engine.scheduler.preempt(sequence)
        finish(engine, sequence)
        for other in others:
            engine.cancel(other)
        return sequence.token_ids, sequence.logprobs

    other = Sequence(Request([9, 4, 3, 5], 9, SamplingParams(top_k=3, temperature=2.0)))
    with use_backend("triton"), rooflama.load(path, max_context=128, batch_invariant=True, progress=False) as model:
        assert run(TokenEngine(model.runner, token_budget=3), other) == run(TokenEngine(model.runner))
    assert other.token_ids


def test_tokens_in_flight_of_a_preempted_sequence_are_drawn_again(model, alone):
    """They are read after it has lost its pages, perhaps after it has taken others; each must be counted once."""
    with use_backend("numpy"):
        engine = TokenEngine(model.runner)
        engine._reads_late = True
        first, second = sequence_of(0, 1, 12), sequence_of(1, 0, 12)
        engine.add(first)
        engine.add(second)
        for turn in range(3):
            engine.step()
            engine.scheduler.preempt(engine.scheduler.running[turn % len(engine.scheduler.running)])
            engine.step()
            engine.step()
        finish(engine, first, second)
        assert first.preemptions + second.preemptions >= 3
        assert (first.token_ids, second.token_ids) == (alone(0, 1, 12), alone(1, 0, 12))


def test_decoding_goes_on_beside_a_long_prompt(model):
    """A step's tokens are those of the budget: one decodes, the others read the prompt."""
    with use_backend("numpy"):
        engine = TokenEngine(model.runner, token_budget=8)
        first, second = sequence_of(0, 0, 30), sequence_of(1, 0, 2)
        engine.add(first)
        engine.advance(first, until=lambda: bool(first.token_ids))
        engine.add(second)
        counts = []
        while not second.token_ids:
            counts.append([token for _, token in engine.step()])
        assert len(counts) == 6  # 40 tokens, 7 in each step
        assert [len(tokens) for tokens in counts] == [1] * 5 + [2]
        finish(engine, first, second)


def test_a_sequence_begins_as_soon_as_there_is_room(model):
    """In the middle of a page, where the steps of the others are all alike."""
    with use_backend("numpy"):
        engine, cache = TokenEngine(model.runner), model.runner.cache
        first, second = sequence_of(0, 0, 30), sequence_of(0, 0, 2)
        engine.add(first)
        engine.advance(first, until=lambda: len(first.token_ids) == 3)
        taken = cache.add()
        cache.reserve(taken, cache.pool.num_free * cache.page_size)
        engine.add(second)
        engine.step()
        assert second in engine.scheduler.waiting
        cache.free(taken)
        engine.step()
        assert second in engine.scheduler.running
        finish(engine, first, second)


def test_pages_come_a_few_steps_ahead_for_several_sequences_at_once(path, alone):
    """While many are free; and what is drawn does not change."""
    with use_backend("numpy"), read_gguf(path) as file, running(file, num_seqs=8, max_context=CONTEXT) as runner:
        engine, cache, told = TokenEngine(runner, prefix_cache=False), runner.cache, []
        sequences = [sequence_of(row % len(PROMPTS), row % 3, 30 + row) for row in range(6)]
        for sequence in sequences:
            engine.add(sequence)
        schedule = engine.scheduler.schedule

        def watched():
            batch = schedule()
            told.append(len(batch.extended))
            for sequence in batch.decode:
                pages = len(cache.pages(sequence.cache_id))
                assert (pages - 1) * cache.page_size < sequence.num_cached + AHEAD
                assert sequence.num_cached < pages * cache.page_size
            return batch

        engine.scheduler.schedule = watched
        finish(engine, *sequences)
        assert sum(told) >= 9
        assert max(told) > 2
        for row, sequence in enumerate(sequences):
            assert sequence.token_ids == alone(row % len(PROMPTS), row % 3, 30 + row)


def test_first_come_first_served(model):
    with use_backend("numpy"):
        engine = TokenEngine(model.runner, num_slots=1)
        sequences = [sequence_of(0, 0, new) for new in (4, 2, 3)]
        for sequence in sequences:
            engine.add(sequence)
        ended = []
        while engine.has_work:
            engine.step()
            ended += [sequence for sequence in sequences if sequence.has_ended and sequence not in ended]
        assert ended == sequences


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_failed_pass_ends_the_newest_and_the_others_go_on(model, alone, monkeypatch, fails_at):
    """Whether the failure is one of prefill or of decoding."""
    logits, calls = model.runner.decoder.logits, []

    def broken(decoder, hidden):
        calls.append(len(hidden))
        if len(calls) == fails_at:
            raise ZeroDivisionError("broken")
        return logits(hidden)

    want = alone(0, 0, 8)
    with use_backend("numpy"), monkeypatch.context() as patch:
        patch.setattr(type(model.runner.decoder), "logits", broken)
        engine = TokenEngine(model.runner)
        old, new = sequence_of(0, 0, 8), sequence_of(3, 1, 8)
        engine.add(old)
        engine.add(new)
        finish(engine, old)
        with pytest.raises(ZeroDivisionError, match="broken"):
            finish(engine, new)
    assert old.token_ids == want
    assert new.finish_reason == "error"
    assert all_free(model)


def test_an_allocation_or_a_copy_that_fails_ends_one_sequence(path):
    """Each in turn, of a prompt, of a copied page, and of decoding beside it; and each is the only one that fails."""

    def run(model, fail_at):
        old, new = (Sequence(Request(list(range(3, 90)), 4, SamplingParams(seed=1, temperature=0.5))) for _ in "ab")
        with Failing(fail_at) as failing:
            model.tokens.add(old)
            model.tokens.step()
            model.tokens.add(new)
            while model.tokens.has_work:
                model.tokens.step()
        return old, new, failing.count

    with use_backend("numpy"), rooflama.load(path, device="cpu", max_sequences=2, progress=False) as model:
        old, new, count = run(model, 0)
        model.tokens.scheduler.prefixes.forget()
        want, held = old.token_ids, model.device.held_bytes
        assert new.token_ids == want
        assert count > 50
        for fail_at in range(1, count + 1, 3):
            *sequences, _ = run(model, fail_at)
            failed = [sequence for sequence in sequences if sequence.error is not None]
            assert all(isinstance(sequence.error, DeviceOutOfMemory) for sequence in failed)
            assert len(failed) <= 1
            assert [sequence.token_ids for sequence in sequences if sequence not in failed] == [want] * (
                2 - len(failed)
            )
            assert all_free(model)
            assert model.device.held_bytes == held
            model.tokens.scheduler.prefixes.forget()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["logits", "wait", "schedule"])
def test_an_interrupt_leaves_everything_as_it_was(model, alone, monkeypatch, where, late):
    """Whether it strikes on the way to a launch, while the host waits for tokens, or between sequences."""
    owner = {"logits": type(model.runner.decoder), "wait": Readback, "schedule": Scheduler}[where]
    with use_backend("numpy"):
        engine = TokenEngine(model.runner)
        engine._reads_late = late
        sequences = [sequence_of(0, 0, 8), sequence_of(1, 1, 8)]
        for sequence in sequences:
            engine.add(sequence)
        engine.advance(sequences[0], until=lambda: len(sequences[0].token_ids) == 3)

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        finish(engine, *sequences)
        assert [sequence.token_ids for sequence in sequences] == [alone(0, 0, 8), alone(1, 1, 8)]
        assert all_free(model)


def test_a_nan_ends_its_own_sequence_alone(model, alone, monkeypatch):
    logits, calls = model.runner.decoder.logits, []

    def with_nan(decoder, hidden):
        calls.append(len(hidden))
        found = logits(hidden)
        if len(calls) == 3:  # the second step
            found[bad.row, 7] = float("nan")
        return found

    want = alone(0, 0, 6)
    with use_backend("numpy"), monkeypatch.context() as patch:
        patch.setattr(type(model.runner.decoder), "logits", with_nan)
        engine, good, bad = TokenEngine(model.runner), sequence_of(0, 0, 6), sequence_of(1, 0, 6)
        engine.add(bad)
        engine.add(good)
        finish(engine, good)
        with pytest.raises(NaNLogits, match="token 3 after a prompt of 40"):
            finish(engine, bad)
    assert good.token_ids == want
    assert all_free(model)


def test_what_no_pool_serves_is_refused(model):
    with use_backend("numpy"), model.tokens.pages_for(CONTEXT) as sequence_id:
        model.runner.cache.reserve(sequence_id, CONTEXT)
        sequence = sequence_of(0, 0, 4)
        model.tokens.add(sequence)
        with pytest.raises(OutOfPages):
            finish(model.tokens, sequence)


# ---- the public face


def test_tokens_as_they_come(model):
    with use_backend("numpy"):
        engine = Engine(model)
        want = model.generate([7, 8, 9], max_new_tokens=6).token_ids
        first = engine.add([7, 8, 9], max_new_tokens=6)
        second = engine.add("ab", max_new_tokens=3, temperature=1.0, seed=2)
        assert list(engine.tokens(first)) == want == first.token_ids
        third = engine.add([7, 8, 9], max_new_tokens=6)
        taken = list(engine)
        assert [token for sequence, token in taken if sequence is third] == want
        assert len(second.token_ids) == 3
        assert second.finish_reason == "length"
        assert not engine.has_work


def test_a_stop_string_ends_a_sequence(model):
    with use_backend("numpy"):
        whole = model.generate([7, 8, 9], max_new_tokens=12)
        stop = whole.text[3:5]
        sequence = Engine(model).add([7, 8, 9], max_new_tokens=12, stop=stop)
        tokens = list(Engine(model).tokens(sequence))
        assert sequence.finish_reason == "stop"
        assert tokens == whole.token_ids[: len(tokens)]
        assert len(tokens) == len(model.generate([7, 8, 9], max_new_tokens=12, stop=stop).token_ids)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([7], {"n": 2}, "option n"),
        ([7], {"top": 2}, "option top: the options are frequency_penalty"),
        ([[7], [8]], {}, "a list of 2 prompts"),
        ([], {}, "an empty prompt"),
        ([7], {"max_new_tokens": 1000}, "context of 128 tokens"),
        ([7], {"temperature": -1}, "temperature -1"),
    ],
)
def test_what_is_no_request_is_refused(model, prompt, options, message):
    with pytest.raises(ArgumentError, match=message):
        Engine(model).add(prompt, **options)
    assert not Engine(model).has_work


def test_async_for(model):
    async def gather():
        engine = Engine(model)
        sequences = [engine.add([7, 8, 9], max_new_tokens=new, temperature=1.0, seed=1) for new in (5, 9, 7)]

        async def read(sequence):
            return [token async for token in engine.tokens(sequence)]

        async def text():
            return "".join([piece async for piece in model.stream([7, 8, 9], max_new_tokens=9)])

        return await asyncio.gather(text(), *map(read, sequences))

    with use_backend("numpy"):
        want = model.generate([7, 8, 9], max_new_tokens=9, temperature=1.0, seed=1).token_ids
        text, *read = asyncio.run(gather())
        assert read == [want[:5], want, want[:7]]
        assert text == model.generate([7, 8, 9], max_new_tokens=9).text


def test_threads_and_an_event_loop_share_one_engine(model, alone):
    """They add, read and cancel at the same time: for a minute in the deep profile."""
    failures = []
    end = time.monotonic() + (60 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 0)

    def hammer(worker):
        try:
            for turn in itertools.count():
                if turn >= 6 and time.monotonic() > end:
                    return
                prompt, draw = (worker + turn) % len(PROMPTS), turn % len(DRAWS)
                sequence = sequence_of(prompt, draw, 12)
                model.tokens.add(sequence)
                if turn % 3 == 2:
                    model.tokens.step()
                    model.tokens.cancel(sequence)
                else:
                    finish(model.tokens, sequence)
                drawn = sequence.token_ids
                want = alone(prompt, draw, 12)[: len(drawn)]
                if model.tokens.end_ids.isdisjoint(want):
                    assert drawn == want
        except Exception as error:
            failures.append(error)

    async def loop():
        await asyncio.gather(*(asyncio.to_thread(hammer, worker) for worker in (2, 3)))

    with use_backend("numpy"):
        for prompt in range(len(PROMPTS)):
            for draw in range(len(DRAWS)):
                alone(prompt, draw, 12)
        run_in_threads([lambda: hammer(0), lambda: hammer(1), lambda: asyncio.run(loop())], WAIT_S)
        assert not failures
        assert not model.tokens.has_work
        assert all_free(model)


def test_a_table_shows_pages_slots_and_sharing(path):
    """Two texts of a page and a half, of which the first page is the same; one that waits for pages."""
    with use_backend("numpy"), rooflama.load(path, device="cpu", max_sequences=2, progress=False) as model:
        engine, prompt = Engine(model), list(range(3, 99))
        first = engine.add(prompt, max_new_tokens=20)
        engine.step()
        second = engine.add(prompt, max_new_tokens=20)
        third = engine.add([5] * 100, max_new_tokens=20)
        engine.step()
        table = engine.table()
        assert [row[:7] for row in table.rows] == [
            (first.number, "running", 0, 96, 2, 97, 2),
            (second.number, "running", 1, 96, 1, 96, 2),
            (third.number, "waiting", "", 100, 0, 0, 0),
        ]
        assert [row[7] for row in table.rows] == [1, 1, 0]
        assert sorted(table.holders) == [0, 1, 1, 2]
        assert table.wasted_tokens == 2 * 128 - 97 - 96
        assert (table.prefixes.hits, table.prefixes.lookups, table.prefixes.tokens_saved) == (1, 2, 95)
        assert "3 of 4 pages of 64 tokens held, 1 of them shared" in table.facts()[0]
        console = Console(file=StringIO(), width=120)
        console.print(table)
        assert "waiting" in console.file.getvalue()
        assert "▪" in console.file.getvalue()
        assert table._repr_html_().count("<tr>") == 4
        assert table._repr_html_().count("<span") == 4
        for sequence in (first, second, third):
            engine.cancel(sequence)
        table = engine.table()
        assert table.rows == ()
        assert len(table.kept) == 2  # the other last page holds no more
    with pytest.raises(ModelClosed):
        engine.table()


def test_a_closed_model_ends_its_sequences(path):
    with use_backend("numpy"), rooflama.load(path, device="cpu", max_context=64, progress=False) as model:
        engine = Engine(model)
        sequence = engine.add([7, 8], max_new_tokens=20)
        next(iter(engine.tokens(sequence)))
        model.close()
        assert isinstance(sequence.error, ModelClosed)
        assert not engine.has_work
        for ask in (engine.step, lambda: engine.add([7])):
            with pytest.raises(ModelClosed):
                ask()
