"""What a memory plan says would fit: it does, as the words say it, and no more would."""

import io
import re
from fractions import Fraction
from functools import cache
from itertools import product
from math import ceil, floor

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import rooflama
from model_shapes import config_of, type_rule
from rooflama import plan_memory
from rooflama.kernels import use_backend
from rooflama.loaders.device import DeviceOutOfMemory
from rooflama.loaders.device import raw as device_raw
from rooflama.models import MemoryPlan
from rooflama.models.memory.amounts import parse_bytes, size
from small_checkpoint import write_small

GIB, MIB = 2**30, 2**20
PAGE = 64
GPU = "cuda:127"  # not here, so that the plan is the same everywhere


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("fit") / "small.gguf")


@pytest.fixture
def tight(small):
    """A limit that 64 of the model's 128 tokens just meet."""
    with use_backend("triton"):
        return plan_memory(small, context=64, device="cpu").total_bytes


def test_a_plan_that_does_not_fit_allocates_nothing(small, tight, monkeypatch):
    made = []
    monkeypatch.setattr(device_raw, "before_operation", lambda *what: made.append(what))
    with use_backend("triton"), pytest.raises(DeviceOutOfMemory, match="a context of 64 tokens would fit") as caught:
        rooflama.load(small, device="cpu", max_context=128, memory_limit=tight, progress=False)
    assert made == []
    error = caught.value
    assert error.limit == tight < error.asked
    assert error.held == 0 < error.free <= error.total
    with use_backend("triton"):
        rooflama.load(small, device="cpu", max_context=64, memory_limit=tight, progress=False).close()


@pytest.mark.parametrize("max_context", [None, 128])
def test_a_refused_load_says_what_limits_would_do(small, max_context):
    with pytest.raises(DeviceOutOfMemory, match=r"no context fits") as caught:
        rooflama.load(small, device="cpu", max_context=max_context, memory_limit=1000, progress=False)
    for limit, context in re.findall(r"a limit of ([\d.]+ [KMG]iB) would hold (1 token|all of it)", str(caught.value)):
        tokens = 1 if context == "1 token" else 128
        load = dict(device="cpu", max_context=tokens, progress=False)
        rooflama.load(small, memory_limit=parse_bytes(limit), **load).close()


@pytest.mark.parametrize(("context", "said"), [(64, "64 tokens"), (1, "1 token")])
def test_without_a_wish_the_context_shrinks_with_a_warning(small, context, said):
    with use_backend("triton"):
        limit = plan_memory(small, context=context, device="cpu").total_bytes
        with (
            pytest.warns(UserWarning, match=f"the context is {said}, not the model's 128: "),
            rooflama.load(small, device="cpu", memory_limit=limit, progress=False) as model,
        ):
            assert model.max_context == context


# Plans of one model, within and between the steps of what fits.


@cache
def llama(device: str, kv_dtype: str) -> MemoryPlan:
    """Llama-3.2-1B with short contexts, so that each can be tried."""
    config, rule = config_of("Llama-3.2-1B", context_length=4096), type_rule("Llama-3.2-1B", "Q4_K_M")
    with use_backend("numpy"):
        plan = plan_memory(config, context=64, kv_dtype=kv_dtype, device=device, weight_types=rule)
    return plan.but(free_bytes=None)


def bounded(plan: MemoryPlan, context: int, sequences: int, edge: tuple[int, int], off: int, bound: str) -> MemoryPlan:
    """A plan within bounds that one of other tokens and sequences, ``edge``, about meets."""
    there = plan.but(context=edge[0], sequences=edge[1]).total_bytes + off
    bounds = {
        "limit": {"limit": there},
        "free_bytes": {"free_bytes": there},
        "both": {"limit": there, "free_bytes": there - plan.target.context_bytes},
    }
    return plan.but(context=context, sequences=sequences, **bounds[bound])


DEVICES = st.sampled_from([GPU, "cpu"])
BOUNDED_PLANS = st.builds(
    bounded,
    st.builds(llama, DEVICES, st.sampled_from(["float16", "fp8", "int8"])),
    context=st.integers(1, 4096),
    sequences=st.integers(1, 70),
    edge=st.tuples(st.sampled_from([1, 2, 63, 64, 65, 2048]) | st.integers(1, 4096), st.integers(1, 70)),
    off=st.sampled_from([0, -1]) | st.integers(-20 * MIB, 20 * MIB),
    bound=st.sampled_from(["limit", "free_bytes", "both"]),
)


def gap(**step: int) -> MemoryPlan:
    """A plan that does not fit its limit, though one that is larger by ``step`` does."""
    ((name, count),) = step.items()
    for plan in (llama(GPU, "int8").but(context=c, sequences=s) for s in range(1, 40) for c in range(1024, 4096, 64)):
        limit = plan.but(**{name: getattr(plan, name) + count}).total_bytes
        if limit < plan.total_bytes:
            return plan.but(limit=limit)
    raise AssertionError("the allocator's rounding no longer shrinks")


@given(plan=BOUNDED_PLANS)
@example(plan=gap(context=PAGE))
def test_what_is_said_to_fit_fits_and_no_more(plan):
    longest, most = plan.largest_context(), plan.most_sequences()
    assert longest == 0 or plan.but(context=longest).fits
    assert longest == 4096 or not plan.but(context=longest + 1).fits
    assert not any(plan.but(context=more).fits for more in range((longest // PAGE + 1) * PAGE, 4097, PAGE))
    assert most == 0 or plan.but(sequences=most).fits
    assert not any(plan.but(sequences=more).fits for more in range(most + 1, most + 100))


def test_more_may_take_less_and_is_found():
    plan = gap(context=PAGE)
    assert not plan.fits
    assert plan.largest_context() == max(n for n in range(PAGE, 4097, PAGE) if plan.but(context=n).fits) > plan.context
    plan = gap(sequences=1)
    assert not plan.fits
    assert plan.most_sequences() == max(n for n in range(1, 100) if plan.but(sequences=n).fits) > plan.sequences


@given(
    plan=st.builds(llama, DEVICES, st.sampled_from(["float16", "int8"])),
    context=st.integers(1, 4095),
    sequences=st.integers(1, 65534),
)
def test_all_but_the_rounding_grows(plan, context, sequences):
    """Which the search for what fits rests on."""

    def asked(**changes):
        made = plan.but(**{"context": context, "sequences": sequences, **changes})
        return made.total_bytes - sum(line.nbytes for line in made.lines if line.name == "allocator rounding")

    assert asked() <= asked(context=context + 1)
    assert asked() <= asked(sequences=sequences + 1)


def followed(plan: MemoryPlan, remedy: str) -> MemoryPlan:
    """The plan with what a remedy says, to the letter."""
    changes = {}
    if found := re.search(r"a context of (\d+) token", remedy):
        changes["context"] = int(found[1])
    if found := re.match(r"(\d+) sequence", remedy):
        changes["sequences"] = int(found[1])
    if "keys and values in int8" in remedy:
        changes["kv_dtype"] = torch.int8
    if "hold 1 token" in remedy:
        changes |= {"context": 1, "sequences": 1}
    for name, pattern in (("limit", "a limit of ([0-9.]+ [KMG]?i?B)"), ("free_bytes", "([0-9.]+ [KMG]?i?B) free")):
        if found := re.search(pattern, remedy):
            changes[name] = parse_bytes(found[1])
    assert changes, remedy
    return plan.but(**changes)


@given(plan=BOUNDED_PLANS)
@example(plan=gap(context=PAGE))
def test_every_remedy_followed_to_the_letter_fits(plan):
    remedies = plan.remedies()
    assert plan.fits == (remedies == [])
    assert all(followed(plan, remedy).fits for remedy in remedies)
    assert len(set(remedies)) == len(remedies)
    for remedy in remedies:
        if "no context fits" in remedy:
            for sequences, kv_dtype in product((1, plan.sequences), (plan.kv_dtype, torch.int8)):
                assert plan.but(sequences=sequences, kv_dtype=kv_dtype).largest_context() == 0


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        ({"sequences": 3}, ["a context of 3520 tokens", "keys and values in int8", "3 sequences"]),
        (
            {"sequences": 1, "context": 100},
            [
                "a context of 20 tokens",
                "a context of 24 tokens with keys and values in int8",
                "1 sequence with a context of 100 tokens",
                "1 sequence with a context of 109 tokens with keys and values in int8",
            ],
        ),
        (
            {"sequences": 1, "context": 1, "kv_dtype": torch.int8},
            ["1 sequence with a context of 1 token with keys and values in int8"],
        ),
    ],
)
def test_all_that_would_fit_is_offered(edge, expected):
    """To four sequences of 4,096 tokens, within what a plan of less takes."""
    plan = llama("cpu", "float16").but(context=4096, sequences=4)
    *offered, room = plan.but(limit=plan.but(**edge).total_bytes).remedies()
    assert offered == [f"{what} would fit" for what in expected]
    assert room == f"a limit of {size(plan.total_bytes, ceil)} would hold all of it"


@given(nbytes=st.integers(1, 2**60) | st.integers(1, 2**22), rounded=st.sampled_from([ceil, floor]))
def test_amounts_are_rounded_to_the_safe_side(nbytes, rounded):
    """By less than a hundredth of the unit, and an amount that is read shows as it was written."""
    text = size(nbytes, rounded)
    number, unit = text.split()
    hundredth = Fraction(parse_bytes(f"1{unit}"), 1 if unit == "B" else 100)
    excess = Fraction(number) * parse_bytes(f"1{unit}") - nbytes
    assert (0 <= excess < hundredth) if rounded is ceil else (0 <= -excess < hundredth)
    assert parse_bytes(text) >= nbytes or rounded is floor
    assert size(parse_bytes(text), floor) == text or number == "1024.00"


def test_one_token_that_fits_is_offered_and_nothing_is_said_not_to_fit(small):
    with use_backend("triton"):
        plan = plan_memory(small, context=64, kv_dtype="int8", device="cpu").but(free_bytes=None)
    said = plan.but(limit=plan.but(context=1).total_bytes).remedies()
    assert said == ["a context of 1 token would fit", f"a limit of {size(plan.total_bytes, ceil)} would hold all of it"]


def test_a_limit_on_a_device_with_too_little_free():
    plan = llama(GPU, "int8").but(context=2048, limit=GIB, free_bytes=900 * MIB)
    assert plan.remedies()[-1] == "a limit of 1.96 GiB on a device with 1.22 GiB free would hold all of it"


def test_the_end_of_the_search_is_not_an_answer():
    plan = llama(GPU, "int8").but(context=8, limit=900 * GIB)
    shown = plan.to_dict()
    assert (shown["most_sequences"], shown["more_sequences_may_fit"]) == (65535, True)
    console = Console(width=160, file=io.StringIO())
    console.print(plan)
    assert re.search(r"most sequences of 8 tokens +65,535 or more", console.file.getvalue())
    shown = plan.but(limit=4 * GIB).to_dict()
    assert 0 < shown["most_sequences"] < 65535
    assert not shown["more_sequences_may_fit"]
