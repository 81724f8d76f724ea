"""What a memory plan says would fit: it does, as the words say it, and no more would."""

import io
import re
from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import rooflama
from model_shapes import config_of, type_rule
from rooflama import plan_memory
from rooflama.kernels import use_backend
from rooflama.loaders import device_raw
from rooflama.loaders.device import DeviceOutOfMemory
from rooflama.models import MemoryPlan
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
    with use_backend("triton"), pytest.raises(DeviceOutOfMemory, match="max_context=64 would fit") as caught:
        rooflama.load(small, device="cpu", max_context=128, memory_limit=tight, progress=False)
    assert made == []
    assert caught.value.limit == tight < caught.value.asked
    with use_backend("triton"):
        rooflama.load(small, device="cpu", max_context=64, memory_limit=tight, progress=False).close()


def test_weights_that_fit_nowhere_say_what_would_hold_them(small):
    with pytest.raises(DeviceOutOfMemory, match=r"no context fits: a device or limit of .* KiB and more would"):
        rooflama.load(small, device="cpu", memory_limit=1000, progress=False)


def test_without_a_wish_the_context_shrinks_with_a_warning(small, tight):
    with (
        use_backend("triton"),
        pytest.warns(UserWarning, match="the context is 64 tokens, not the model's 128"),
        rooflama.load(small, device="cpu", memory_limit=tight, progress=False) as model,
    ):
        assert model.max_context == 64


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


def gap() -> MemoryPlan:
    """A limit that 2,112 tokens meet and 2,048 do not."""
    plan = llama(GPU, "int8")
    limit = plan.but(context=2112).total_bytes
    assert limit < plan.but(context=2048).total_bytes
    return plan.but(context=2048, limit=limit)


@given(plan=BOUNDED_PLANS)
@example(plan=gap())
def test_what_is_said_to_fit_fits_and_no_more(plan):
    longest, most = plan.largest_context(), plan.most_sequences()
    assert longest == 0 or plan.but(context=longest).fits
    assert longest == 4096 or not plan.but(context=longest + 1).fits
    assert not any(plan.but(context=more).fits for more in range((longest // PAGE + 1) * PAGE, 4097, PAGE))
    assert most == 0 or plan.but(sequences=most).fits
    assert not any(plan.but(sequences=more).fits for more in range(most + 1, most + 100))


def test_more_may_take_less_and_is_found():
    plan = gap()
    assert not plan.fits
    assert plan.largest_context() == 2688 == max(n for n in range(PAGE, 4097, PAGE) if plan.but(context=n).fits)
    fewer = llama(GPU, "int8").but(context=4096, sequences=4)
    limit = fewer.but(sequences=5).total_bytes
    assert fewer.total_bytes > limit
    fewer = fewer.but(limit=limit)
    assert fewer.most_sequences() == max(n for n in range(1, 100) if fewer.but(sequences=n).fits)


@given(
    plan=st.builds(llama, DEVICES, st.sampled_from(["float16", "int8"])),
    context=st.integers(1, 4095),
    sequences=st.integers(1, 65535),
)
def test_all_but_the_rounding_grows(plan, context, sequences):
    """Which the search for what fits rests on."""

    def asked(**changes):
        made = plan.but(**{"context": context, "sequences": sequences, **changes})
        return made.total_bytes - sum(line.nbytes for line in made.lines if line.name == "allocator rounding")

    assert asked() <= asked(context=context + 1)
    assert asked() <= asked(sequences=sequences + 1)


@given(plan=BOUNDED_PLANS)
@example(plan=gap())
def test_every_remedy_fits(plan):
    assert plan.fits == (plan.remedies() == [])
    for remedy in plan.remedies():
        changed = {}
        if context_given := re.search(r"max_context=(\d+)", remedy):
            changed["context"] = int(context_given[1])
        if "int8" in remedy:
            changed["kv_dtype"] = torch.int8
        if sequences_given := re.match(r"(\d+) sequence", remedy):
            changed["sequences"] = int(sequences_given[1])
        assert bool(changed) == ("no context fits" not in remedy)
        assert not changed or plan.but(**changed).fits


def test_the_end_of_the_search_is_not_an_answer():
    plan = llama(GPU, "int8").but(context=8, limit=900 * GIB)
    shown = plan.to_dict()
    assert (shown["most_sequences"], shown["more_sequences_may_fit"]) == (65536, True)
    console = Console(width=160, file=io.StringIO())
    console.print(plan)
    assert re.search(r"most sequences of 8 tokens +65,536 or more", console.file.getvalue())
    shown = plan.but(limit=4 * GIB).to_dict()
    assert 0 < shown["most_sequences"] < 65536
    assert not shown["more_sequences_may_fit"]
