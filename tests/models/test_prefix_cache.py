"""Shared beginnings: they save work, are found by what changes keys and values, and never change a result."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rooflama
from rooflama import swap
from rooflama.kernels import rms_norm, use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.models import Request, SamplingParams, Sequence, TokenEngine
from running_models import running
from small_checkpoint import write_small
from tiny_checkpoints import ORIGINAL, random_tokens, write_case

PAGE = 16  # of ``running``
STEM = random_tokens(3 * PAGE + 5, 90)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("prefixes") / "small.gguf")


def run(engine, prompt, new=3, **params):
    sequence = Sequence(Request(list(prompt), new, SamplingParams(**params)))
    engine.add(sequence)
    engine.advance(sequence, until=lambda: False)
    return sequence


def cached(engine, prompt, new=3):
    return run(engine, prompt, new).timings.cached_tokens


prompts = st.tuples(st.integers(1, len(STEM)), st.lists(st.integers(0, 3), max_size=20))  # of the stem, and more


@settings(max_examples=15)
@given(asked=st.lists(st.tuples(prompts, st.integers(1, 30)), min_size=2, max_size=6), together=st.booleans())
@pytest.mark.parametrize("case", ["mistral-no-window", "mistral-window"])
def test_results_are_those_without_sharing(tmp_path_factory, case, asked, together):
    """In a pool that is too small to keep everything; one after the other, and side by side."""
    path = write_case(case, tmp_path_factory.mktemp(case), "gguf")
    with use_backend("numpy"), read_gguf(path) as file, running(file, max_context=128, prefill_chunk=24) as runner:
        results = []
        for prefix_cache in (True, False):
            engine = TokenEngine(runner, prefix_cache=prefix_cache)
            sequences = []
            for (count, more), new in asked:
                sequences.append(Sequence(Request(STEM[:count] + more, new, SamplingParams(temperature=1, seed=2))))
                engine.add(sequences[-1])
                if not together:
                    engine.advance(sequences[-1], until=lambda: False)
            for sequence in sequences:
                engine.advance(sequence, until=lambda: False)
            results.append([sequence.token_ids for sequence in sequences])
            assert runner.cache.pool.num_free == 128 // PAGE
        assert results[0] == results[1]


def test_bits_are_those_without_sharing(path):
    """With batch_invariant, on the kernels: also of pages that were written while decoding."""
    with use_backend("triton"), read_gguf(path) as file, running(file, batch_invariant=True) as runner:
        bits = []
        for prefix_cache in (True, False):
            engine = TokenEngine(runner, prefix_cache=prefix_cache)
            first = run(engine, STEM[:12], 7, logprobs=2)
            text = STEM[:12] + first.token_ids
            second = run(engine, [*text, 7], 2, logprobs=2)
            assert second.timings.cached_tokens == (len(text) - 1 if prefix_cache else 0)
            bits.append((first.logprobs, second.logprobs))
        assert bits[0] == bits[1]


def test_what_is_found(path):
    with use_backend("numpy"), read_gguf(path) as file, running(file) as runner:
        engine = TokenEngine(runner)
        assert cached(engine, STEM, new=1) == 0
        assert cached(engine, STEM, new=1) == len(STEM) - 1  # the last token is computed, for its logits
        assert cached(engine, STEM[: 2 * PAGE], new=1) == 2 * PAGE - 1
        assert cached(engine, [*STEM[:40], 1, 2, 3], new=1) == 40
        assert cached(engine, [*STEM[: PAGE + 1], 1, 2, 3], new=1) == PAGE  # a page is not copied for one token
        assert cached(engine, [1, *STEM], new=1) == 0
        statistics = engine.scheduler.prefixes.statistics
        assert (statistics.lookups, statistics.hits) == (6, 4)
        assert statistics.tokens_saved == len(STEM) - 1 + 2 * PAGE - 1 + 40 + PAGE
        engine.forget_prefixes()
        assert cached(engine, STEM) == 0


def test_a_window_needs_the_pages_that_it_sees(tmp_path):
    """Earlier ones were released, or taken by others."""
    path = write_case("mistral-window", tmp_path, "gguf")
    with use_backend("numpy"), read_gguf(path) as file, running(file, max_context=128, prefill_chunk=24) as runner:
        engine = TokenEngine(runner)
        text = [*STEM, *run(engine, STEM, 30).token_ids]
        assert cached(engine, [*text, 7]) == len(text) - 1


def test_a_beginning_is_shared_while_its_owner_runs(path):
    with use_backend("numpy"), read_gguf(path) as file, running(file, num_seqs=3) as runner:
        engine = TokenEngine(runner)
        first = Sequence(Request(STEM, 20, SamplingParams()))
        engine.add(first)
        engine.step()
        free = runner.cache.pool.num_free
        second = Sequence(Request(STEM, 20, SamplingParams()))
        engine.add(second)
        engine.step()
        assert second.timings.cached_tokens == len(STEM) - 1
        assert free - runner.cache.pool.num_free == 1  # the copy of the last page
        shared = set(runner.cache.pages(first.cache_id)) & set(runner.cache.pages(second.cache_id))
        assert len(shared) == 3
        while engine.has_work:
            engine.step()
        assert first.token_ids == second.token_ids


def test_requests_that_come_together_share_too(path):
    """The second begins a step later than the first, and not at all later if they have less than a page in common."""
    with use_backend("numpy"), read_gguf(path) as file, running(file, num_seqs=3) as runner:
        engine = TokenEngine(runner)
        alike = [Sequence(Request([*STEM, last], 2, SamplingParams())) for last in (1, 2, 3)]
        other = Sequence(Request([4, *STEM[:20]], 2, SamplingParams()))
        for sequence in (*alike, other):
            engine.add(sequence)
        engine.step()
        assert [len(sequence.token_ids) for sequence in (*alike, other)] == [1, 0, 0, 0]
        engine.step()
        assert [len(sequence.token_ids) for sequence in (*alike, other)] == [2, 1, 1, 1]
        assert [sequence.timings.cached_tokens for sequence in (*alike, other)] == [0, len(STEM), len(STEM), 0]


def test_the_least_recently_used_is_taken_first(path):
    """Six pages: two texts of two pages, of which the older is used again; a third of three takes the other's."""
    with use_backend("numpy"), read_gguf(path) as file, running(file) as runner:
        engine = TokenEngine(runner)
        one, two, three = (random_tokens(length, 200, seed) for length, seed in ((32, 1), (32, 2), (48, 3)))
        for prompt in (one, two, one):
            run(engine, prompt, 1)
        run(engine, three, 1)
        assert cached(engine, one, 1) == 31
        assert cached(engine, two, 1) < 31
        assert engine.scheduler.prefixes.statistics.pages_taken > 0


@pytest.mark.parametrize(
    ("longrope", "shared"), [("auto", False), ("long", True)], ids=["two factor sets", "one factor set"]
)
def test_a_rotation_is_part_of_the_identity(tmp_path, longrope, shared):
    """LongRoPE: the planned length decides which list of frequencies a sequence's keys are rotated with."""
    path = write_case("phi3-128k", tmp_path, "gguf")
    with use_backend("numpy"), read_gguf(path) as file, running(file, max_context=96, longrope=longrope) as runner:
        engine = TokenEngine(runner)
        short, long = 2, ORIGINAL
        prompt = random_tokens(ORIGINAL - 8, 90)
        run(engine, prompt, short)
        assert cached(engine, prompt, short) == len(prompt) - 1
        assert cached(engine, prompt, long) == (len(prompt) - 1 if shared else 0)


def test_swapped_kernels_share_nothing(path):
    with use_backend("numpy"), read_gguf(path) as file, running(file, num_seqs=3, fused=False) as runner:
        engine = TokenEngine(runner)
        run(engine, STEM)
        with swap(rms_norm=lambda *args: rms_norm(*args)):
            assert cached(engine, STEM) == 0
            assert cached(engine, STEM) == 0
        assert cached(engine, STEM) == len(STEM) - 1


def test_a_chat_continues_from_its_history(path):
    """And ``prefix_cache=False`` computes it again, to the same text."""
    texts = []
    for prefix_cache in (True, False):
        with (
            use_backend("numpy"),
            rooflama.load(path, device="cpu", prefix_cache=prefix_cache, progress=False) as model,
        ):
            messages = [{"role": "user", "content": "ab ab a"}]
            first = model.chat(messages, max_new_tokens=6)
            messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "b"}]
            second = model.chat(messages, max_new_tokens=6)
            texts.append((first.text, second.text))
            asked = model.tokenizer.encode_chat(messages[:1], add_generation_prompt=True)
            assert (second.timings.cached_tokens >= len(asked) - 1) == prefix_cache
    assert texts[0] == texts[1]
