"""Sampling against its definition, and the laws it keeps; the filters have test_sampling_filters.py."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st

from replaying import replay_on_the_cpu
from rooflama.kernels import KernelInputError, reference, sample, sampling, use_backend
from rooflama.kernels.reference.sampling import philox_4x32, uniforms
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.sampling import column, random_parameters, randomness
from rooflama.testing.strategies import DEVICE, beyond_int32, dtypes, exact, normal, seeds
from sampling_cases import chunks_of, few_if_interpreted


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens per program, so that a small vocabulary has several chunks."""
    yield from chunks_of(16, monkeypatch)


# ---- random numbers


def test_philox_known_answers():
    """The test vectors that Random123 publishes for philox4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, want in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(word) for word in philox_4x32(counter, key)) == want


@triton.jit
def _noise_kernel(seed_ptr, step_ptr, words_ptr, exponentials_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    counter = offs.to(tl.uint32)
    low, high = (step & 0xFFFFFFFF).to(tl.uint32), ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, counter, counter * 0 + low, counter * 0 + high, counter * 0)
    tl.store(words_ptr + offs, word.to(tl.int64))
    tl.store(exponentials_ptr + offs, sampling._exponential(seed, step, offs))


@given(seed=st.integers(-(2**63), 2**63 - 1), step=st.integers(0, 2**63 - 1))
@example(seed=-1, step=2**32)
@example(seed=0, step=2349)  # token 2582 gets 2^32 - 55, whose u would round to 1
@example(seed=0, step=28711)  # token 1829 gets 12: 1 - u rounds to 1
def test_random_numbers_equal_definition(seed, step):
    """The integers bit for bit, the exponential variates to float32 rounding, near 0 as well."""
    words = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    exponentials = torch.empty(4096, device=DEVICE)
    _noise_kernel[(1,)](column([seed], torch.int64), column([step], torch.int64), words, exponentials, BLOCK=4096)
    tokens = np.arange(4096)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    want = philox_4x32((tokens, step & 0xFFFFFFFF, step >> 32, 0), (low, high))[0]
    np.testing.assert_array_equal(words.cpu().numpy(), want)
    u = uniforms(seed, step, tokens)
    np.testing.assert_allclose(u, (want + 0.5) / 2**32, rtol=2**-23)
    np.testing.assert_allclose(exact(exponentials), -np.log1p(-u.astype(np.float64)), rtol=2e-6)


# ---- tokens


@pytest.mark.usefixtures("small_chunks")
@few_if_interpreted
@given(num_seqs=st.integers(0, 3), vocab=st.integers(1, 50), dtype=dtypes, seed=seeds)
@example(num_seqs=3, vocab=40, dtype=torch.float32, seed=1)
def test_kernel_draws_what_the_definition_draws(num_seqs, vocab, dtype, seed):
    """Token for token; the scores of two tokens are rarely equal to float32 rounding."""
    rng = np.random.default_rng(seed)
    logits = normal(rng, num_seqs, vocab, dtype=dtype, scale=2.0)
    parameters = random_parameters(rng, num_seqs, vocab)
    got = sample(logits, **parameters)
    assert got.dtype == torch.int32
    want = reference.sample(exact(logits), **{name: t.cpu().numpy() for name, t in parameters.items()})
    assert got.tolist() == want.tolist(), f"{num_seqs=} {vocab=} {dtype} {seed=}"
    with use_backend("numpy"):
        assert sample(logits, **parameters).tolist() == want.tolist()


@pytest.mark.parametrize("names", [(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "min_p")])
def test_each_parameter_may_be_left_out(names):
    """As when it is off for every sequence."""
    rng = np.random.default_rng(0)
    logits = normal(rng, 2, 20, scale=2.0)
    parameters = random_parameters(rng, 2, 20)
    given_ones = {name: parameters[name] for name in ("temperature", "seeds", "steps", *names)}
    off = {"top_k": 0, "top_p": 1, "min_p": 0}
    others = {name: torch.full_like(parameters[name], value) for name, value in off.items()}
    assert_bit_equal(sample(logits, **given_ones), sample(logits, **others | given_ones))


@pytest.mark.usefixtures("small_chunks")
@few_if_interpreted
@given(num_seqs=st.integers(2, 3), dtype=dtypes, seed=seeds)
def test_batch_invariance_and_reproducibility(num_seqs, dtype, seed):
    """A sequence's token depends on its own row alone, and the same call gives it again."""
    rng = np.random.default_rng(seed)
    logits = normal(rng, num_seqs, 20, dtype=dtype)
    parameters = random_parameters(rng, num_seqs, 20)
    together = sample(logits, **parameters)
    for i in range(num_seqs):
        alone = {name: tensor[i : i + 1] for name, tensor in parameters.items()}
        assert_bit_equal(sample(logits[i : i + 1], **alone), together[i : i + 1])
    assert_bit_equal(sample(logits, **parameters), together)


@pytest.mark.usefixtures("small_chunks")
def test_a_replayed_call_draws_what_the_definition_draws(monkeypatch):
    """Nothing that a launch reads is left from the first call: memory between launches is new and poisoned."""
    if DEVICE.type == "cpu":
        replay_on_the_cpu(monkeypatch)
    rng = np.random.default_rng(0)
    calls = [{"logits": normal(rng, 3, 40, scale=2.0) - 10, **random_parameters(rng, 3, 40)} for _ in range(3)]
    for names in (("logits",), ("logits", "temperature", "seeds", "steps"), tuple(calls[0])):
        for number, call in enumerate(calls):
            arguments = {name: call[name] for name in names}
            arrays = {name: tensor.cpu().numpy() for name, tensor in arguments.items()}
            want = reference.sample(**arrays | {"logits": exact(call["logits"])})
            with monkeypatch.context() as patch:
                if number > 0:
                    patch.setattr(sample, "body", None)
                assert sample(**arguments).tolist() == want.tolist()


def test_seeds_and_steps_change_the_draw():
    logits = torch.zeros(12, 64, device=DEVICE)
    hot, zeros, counting = (
        torch.ones(12, device=DEVICE),
        torch.zeros(12, dtype=torch.int64, device=DEVICE),
        torch.arange(12, device=DEVICE),
    )
    variants = ((counting, zeros), (zeros, counting), (counting << 32, zeros), (zeros, counting << 32))
    for seeds_, steps in variants:
        assert sample(logits, hot, seeds=seeds_, steps=steps).unique().numel() > 6
    assert sample(logits, hot, seeds=zeros, steps=zeros).unique().numel() == 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_greedy_takes_the_lowest_of_equal_tokens(backend):
    logits = torch.zeros(4, 40, device=DEVICE)
    logits[0, [7, 9]] = 1.0  # in one chunk
    logits[1, [17, 39]] = 1.0  # in two
    logits[2] = -torch.inf
    logits[3, [5, 20]] = torch.inf
    with use_backend(backend):
        assert sample(logits).tolist() == [7, 17, 0, 5]
        cold = {"temperature": torch.zeros(4, device=DEVICE), **randomness(np.random.default_rng(0), 4)}
        assert sample(logits, **cold).tolist() == [7, 17, 0, 5]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_what_is_not_finite(backend):
    """-inf is never drawn, +inf always, a NaN makes -1 wherever it stands; beyond vocab_size nothing is looked at."""
    logits = torch.zeros(4, 24, device=DEVICE)
    logits[0, :23] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, 5], logits[2, 20] = torch.nan, 1e3
    logits[3, 18:20] = torch.tensor([torch.inf, torch.nan])
    hot = {"temperature": torch.ones(4, device=DEVICE), **randomness(np.random.default_rng(0), 4)}
    filters = {"top_k": column([3] * 4, torch.int32), "top_p": column([0.9] * 4, torch.float32)}
    with use_backend(backend):
        for options in ({}, hot, hot | filters):
            assert sample(logits, **options).tolist()[:3] == [23, 3, -1]
            assert 0 <= sample(logits, **options, vocab_size=18)[3] < 18


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["triton", "numpy"])
@pytest.mark.parametrize("vocab", [1, 2, 16, 17])
def test_a_row_of_minus_infinities_draws_a_token_of_the_vocabulary(vocab, backend):
    """What pads the last chunk is as large, and never drawn; each token is, the first and the last too."""
    logits = torch.full((24, vocab + 3), -torch.inf, device=DEVICE)
    hot = {"temperature": torch.ones(24, device=DEVICE), **randomness(np.random.default_rng(1), 24)}
    with use_backend(backend):
        drawn = sample(logits, **hot, vocab_size=vocab).tolist()
    assert min(drawn) >= 0
    assert max(drawn) < vocab
    assert len(set(drawn)) > min(vocab - 1, 6)


@pytest.mark.usefixtures("small_chunks")
def test_offsets_beyond_int32():
    rng = np.random.default_rng(0)
    logits = normal(rng, 3, 16, dtype=torch.float16)
    parameters = {
        "temperature": torch.ones(3, device=DEVICE),
        "top_p": column([0.5, 0.6, 0.7], torch.float32),
        **randomness(rng, 3),
    }
    assert_bit_equal(sample(beyond_int32(logits), **parameters), sample(logits, **parameters))


def test_opcheck():
    logits = torch.randn(2, 30, device=DEVICE)
    parameters = random_parameters(np.random.default_rng(0), 2, 30)
    torch.library.opcheck(torch.ops.rooflama.sample, (logits,), parameters)
    torch.library.opcheck(torch.ops.rooflama.sample, (logits,), {"vocab_size": 20})


def test_compiles_into_one_graph():
    logits = torch.randn(2, 30, device=DEVICE)
    compiled = torch.compile(lambda logits: sample(logits * 2) + 1, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(logits), sample(logits) + 1)


OUT_OF_RANGE = [
    ("temperature", -1.0, "finite and at least 0"),
    ("temperature", np.nan, "finite and at least 0"),
    ("top_k", -3, "at least 0; 0 is off"),
    ("top_p", -0.5, "between 0 and 1; 1 is off"),
    ("top_p", 1.5, "between 0 and 1; 1 is off"),
    ("top_p", np.nan, "between 0 and 1; 1 is off"),
    ("min_p", -0.5, "between 0 and 1; 0 is off"),
    ("min_p", 1.5, "between 0 and 1; 0 is off"),
    ("min_p", np.nan, "between 0 and 1; 0 is off"),
]


def out_of_range(name, value):
    """Parameters for three rows; the one named is out of range in the second."""
    rng = np.random.default_rng(0)
    parameters = {"temperature": torch.ones(3, device=DEVICE), **randomness(rng, 3)}
    harmless = {"temperature": 1, "top_k": 5, "top_p": 0.7, "min_p": 0.1}[name]
    parameters[name] = column([harmless, value, harmless], torch.int32 if name == "top_k" else torch.float32)
    return parameters


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE)
def test_out_of_range_where_it_is_not_seen(name, value, rule, monkeypatch):
    """As on a GPU, where nobody looks at the parameters: the kernel does what the definition does."""
    monkeypatch.setattr(sampling, "_check_ranges", lambda *_: None)
    logits = normal(np.random.default_rng(1), 3, 20, scale=2.0)
    parameters = out_of_range(name, value)
    arrays = {name: tensor.cpu().numpy() for name, tensor in parameters.items()}
    assert sample(logits, **parameters).tolist() == reference.sample(exact(logits), **arrays).tolist()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the parameters are not looked at")
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [*OUT_OF_RANGE, ("temperature", np.inf, "finite and at least 0")],
)
def test_out_of_range_is_refused_on_a_cpu(name, value, rule):
    with pytest.raises(KernelInputError, match=f"{name} {value}: {name} must be {rule}"):
        sample(torch.zeros(3, 20), **out_of_range(name, value))


LOGITS = torch.zeros(2, 8)
FLOAT, INT32, INT64 = torch.ones(2), torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "parameters", "message"),
    [
        (torch.zeros(8), {}, r"logits must have shape \[any, any\]"),
        (torch.tensor(0.0), {}, r"logits must have shape \[any, any\]"),
        (LOGITS.double(), {}, "logits is torch.float64"),
        (torch.zeros(8, 2).T, {}, "last dimension of logits must be contiguous"),
        (LOGITS, {"vocab_size": 9}, "vocab_size is 9"),
        (LOGITS, {"vocab_size": 0}, "vocab_size is 0"),
        (torch.zeros(1, 2**24), {}, "must be below 2"),
        (LOGITS, {"temperature": FLOAT}, "temperature without seeds"),
        (LOGITS, {"temperature": FLOAT, "seeds": INT64}, "temperature without steps"),
        (LOGITS, {"temperature": INT32, "seeds": INT64, "steps": INT64}, "temperature is torch.int32"),
        (LOGITS, {"top_k": INT64}, "top_k is torch.int64"),
        (LOGITS, {"top_p": FLOAT[:1]}, r"top_p must have shape \[2\]"),
        (LOGITS, {"min_p": FLOAT.half()}, "min_p is torch.float16"),
        (LOGITS, {"top_p": torch.ones(4, device=DEVICE)[::2]}, "last dimension of top_p must be contiguous"),
    ],
)
def test_bad_input_is_refused_before_a_launch(logits, parameters, message):
    parameters = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in parameters.items()
    }
    with pytest.raises(KernelInputError, match=message):
        sample(logits.to(DEVICE), **parameters)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(KernelInputError, match="top_k on meta: all tensors of one call live on one device"):
        sample(LOGITS.to(DEVICE), top_k=INT32.to("meta"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        sample(LOGITS.bfloat16())
