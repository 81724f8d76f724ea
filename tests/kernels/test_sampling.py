"""Sampling against its definition, transformers' filters and exact distributions, and the laws it keeps."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assertions import assert_bit_equal
from rooflama.kernels import KernelInputError, reference, sample, sampling, use_backend
from rooflama.kernels.reference.sampling import allowed_tokens, philox_4x32, relative, uniforms
from rooflama.kernels.sampling_filters import raise_floor
from strategies import DEVICE, beyond_int32, dtypes, exact, normal, seeds

# A search takes some twenty launches of each chunk, at milliseconds each under the interpreter.
few_if_interpreted = settings(max_examples=3) if DEVICE.type == "cpu" else lambda test: test


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens a program, so that a small vocabulary has several chunks."""
    monkeypatch.setattr(sampling, "CHUNK", 16)


def column(values, dtype):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def randomness(rng, num_seqs):
    return {
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, num_seqs)).to(DEVICE),
        "steps": torch.from_numpy(rng.integers(0, 2**40, num_seqs)).to(DEVICE),
    }


def random_parameters(rng, num_seqs, vocab):
    """A mixture of greedy and drawing rows, each filter on for about half of them."""

    def mixed(values, off):
        return np.where(rng.random(num_seqs) < 0.5, values, off)

    return {
        "temperature": column(
            mixed(rng.uniform(0.3, 2.0, num_seqs), 0.8) * (rng.random(num_seqs) < 0.8), torch.float32
        ),
        "top_k": column(mixed(rng.integers(1, vocab + 3, num_seqs), 0), torch.int32),
        "top_p": column(mixed(rng.uniform(0.05, 1.0, num_seqs), 1.0), torch.float32),
        "min_p": column(mixed(rng.uniform(0.0, 0.5, num_seqs), 0.0), torch.float32),
        "penalty": column(mixed(rng.uniform(0.7, 1.5, num_seqs), 1.0), torch.float32),
        "seen": torch.from_numpy(rng.random((num_seqs, vocab)) < 0.3).to(DEVICE),
        **randomness(rng, num_seqs),
    }


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


# ---- the filters


def warped_by_transformers(logits, temperature, top_k, top_p, min_p, penalty=1.0, seen=()):
    """Which tokens transformers keeps, in the order in which its generate applies its processors."""
    from transformers.generation import logits_process as processors

    scores = torch.from_numpy(logits)[None]
    if len(seen):
        scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(seen)[None], scores)
    scores = processors.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = processors.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = processors.MinPLogitsWarper(min_p)(None, scores)
    return scores[0].numpy()


@given(
    vocab=st.integers(1, 300), temperature=st.floats(0.2, 3), top_k=st.integers(0, 310), top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7]), spread=st.floats(0.1, 5), seed=seeds,
)  # fmt: skip
@example(vocab=100, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, spread=1.0, seed=0)
def test_definition_keeps_the_tokens_that_transformers_keeps(vocab, temperature, top_k, top_p, min_p, spread, seed):
    logits = np.random.default_rng(seed).standard_normal(vocab) * spread
    kept = allowed_tokens(logits, temperature, top_k, top_p, min_p)
    scores = warped_by_transformers(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_array_equal(kept, np.isfinite(scores), err_msg=f"{vocab=} {seed=}")
    weights = np.where(kept, np.exp(relative(logits, temperature)), 0)
    want = torch.from_numpy(scores).softmax(-1).numpy()
    np.testing.assert_allclose(weights / weights.sum(), want, rtol=1e-9, atol=1e-15)


def test_ties_with_the_last_token_kept_are_kept():
    """As transformers' top-k does; its top-p drops some of the ties, by the order of its sort."""
    logits = np.log(np.array([0.1, 0.2, 0.2, 0.3, 0.2]))
    assert allowed_tokens(logits, 1.0, 2, 1.0, 0.0).tolist() == [False, True, True, True, True]
    assert allowed_tokens(logits, 1.0, 0, 0.45, 0.0).tolist() == [False, True, True, True, True]
    assert allowed_tokens(logits, 1.0, 0, 0.25, 0.0).tolist() == [False, False, False, True, False]
    np.testing.assert_array_equal(
        allowed_tokens(logits, 1.0, 2, 1.0, 0.0), np.isfinite(warped_by_transformers(logits, 1.0, 2, 1.0, 0.0))
    )


def kernel_floor(logits, top_k, top_p, temperature):
    """The image of the smallest logit that the kernels' search keeps, as [num_seqs] uint32."""
    num_seqs, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, sampling.CHUNK)
    padded = torch.nn.functional.pad(logits.float(), (0, num_chunks * sampling.CHUNK - vocab), value=-torch.inf)
    maxima = padded.unflatten(1, (num_chunks, -1)).amax(-1).contiguous()
    floor = torch.zeros(num_seqs, dtype=torch.int32, device=DEVICE)
    sizes = {"CHUNK": sampling.CHUNK, "BLOCK_CHUNKS": triton.next_power_of_2(num_chunks)}
    for limit, weighted in ((top_k, False), (top_p, True)):
        raise_floor(limit, weighted, (logits, None, None), maxima, temperature, floor, (vocab, 0, vocab), False, sizes)
    return floor.cpu().numpy().view(np.uint32)


def image(logits):
    bits = (logits + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | 0x80000000)


@pytest.mark.usefixtures("small_chunks")
@few_if_interpreted
@given(vocab=st.integers(1, 40), dtype=dtypes, spread=st.sampled_from([0.01, 1.0, 30.0]), seed=seeds)
@example(vocab=33, dtype=torch.float32, spread=1.0, seed=0)
def test_kernel_keeps_the_tokens_that_the_definition_keeps(vocab, dtype, spread, seed):
    rng = np.random.default_rng(seed)
    logits = normal(rng, 2, vocab, dtype=dtype, scale=spread)
    logits[1, rng.integers(0, vocab, vocab // 2)] = logits[1, 0].item()  # ties
    parameters = random_parameters(rng, 2, vocab)
    temperature = parameters["temperature"].clamp(min=0.3)
    floor = kernel_floor(logits, parameters["top_k"], parameters["top_p"], temperature)
    for row, z in enumerate(logits.float().cpu().numpy()):
        limits = [float(parameters[name][row]) for name in ("top_k", "top_p")]
        want = allowed_tokens(z.astype(np.float64), float(temperature[row]), int(limits[0]), limits[1], 0.0)
        context = f"{vocab=} {dtype} {spread=} {limits=} {seed=}"
        np.testing.assert_array_equal(image(z) >= floor[row], want, err_msg=context)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("top_k", [1, 2, 15, 16, 17, 39, 40, 41])
def test_top_k_keeps_k(top_k):
    logits = torch.from_numpy(np.random.default_rng(top_k).permutation(40).astype(np.float32) - 20)[None].to(DEVICE)
    one = column([1.0], torch.float32)
    floor = kernel_floor(logits, column([top_k], torch.int32), one, one)
    assert (image(logits[0].cpu().numpy()) >= floor[0]).sum() == min(top_k, 40)


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


@pytest.mark.parametrize("names", [(), ("top_k",), ("top_p",), ("min_p",), ("penalty", "seen"), ("top_k", "min_p")])
def test_each_parameter_may_be_left_out(names):
    """As when it is off for every sequence."""
    rng = np.random.default_rng(0)
    logits = normal(rng, 2, 20, scale=2.0)
    parameters = random_parameters(rng, 2, 20)
    given_ones = {name: parameters[name] for name in ("temperature", "seeds", "steps", *names)}
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "penalty": 1}
    others = {name: torch.full_like(parameters[name], value) for name, value in off.items()}
    assert_bit_equal(
        sample(logits, **given_ones), sample(logits, **({"seen": parameters["seen"]} | others | given_ones))
    )


def chi_square(counts, probabilities):
    """The statistic, less its mean and in its standard deviations: about standard normal. inf for the impossible."""
    possible = probabilities > 0
    if counts[~possible].any():
        return np.inf
    expected = probabilities[possible] * counts.sum()
    freedom = possible.sum() - 1
    return (np.sum((counts[possible] - expected) ** 2 / expected) - freedom) / np.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.25), (1.5, 7, 0.9, 0.1)],
)
def test_drawn_tokens_have_the_exact_distribution(temperature, top_k, top_p, min_p):
    """On a GPU the kernel draws; on the CPU the definition, which the kernel equals token for token.

    8,000 draws with fixed seeds. The power is asserted as well: one token more or less in top-k, or a temperature off
    by a sixth, would be seen.
    """
    draws, vocab = 8_000, 12
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32)

    def probabilities(temperature, top_k):
        scores = warped_by_transformers(logits.astype(np.float64), temperature, top_k, top_p, min_p)
        return torch.from_numpy(scores).softmax(-1).numpy()

    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    integers = {"top_k": torch.int32}
    columns = {name: column([v] * draws, integers.get(name, torch.float32)) for name, v in parameters.items()}
    half = torch.arange(draws, device=DEVICE)
    columns |= {"seeds": half // 2, "steps": half % 2}  # both seeds and steps vary
    with use_backend("triton" if DEVICE.type == "cuda" else "numpy"):
        tokens = sample(torch.from_numpy(logits).to(DEVICE).expand(draws, -1), **columns)
    counts = np.bincount(tokens.cpu().numpy(), minlength=vocab)
    assert chi_square(counts, probabilities(temperature, top_k)) < 4
    assert chi_square(counts, probabilities(temperature * 1.2, top_k)) > 10
    if top_k == 5:
        assert chi_square(counts, probabilities(temperature, top_k - 1)) > 10
        assert chi_square(counts, probabilities(temperature, top_k + 1)) > 10


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


@few_if_interpreted
@given(seed=seeds)
def test_filters_that_leave_one_token_are_greedy(seed):
    rng = np.random.default_rng(seed)
    logits = normal(rng, 2, 30)
    hot = {"temperature": torch.full((2,), 5.0, device=DEVICE), **randomness(rng, 2)}
    for filters in (
        {"top_k": column([1, 1], torch.int32)},
        {"top_p": column([0.0, 1e-6], torch.float32)},
        {"min_p": column([1.0, 1.0], torch.float32)},
    ):
        assert_bit_equal(sample(logits, **hot, **filters), sample(logits))


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


@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_min_p_on_either_side(backend):
    """Of tokens a hundredth above and below the bound, the former are drawn and the latter never."""
    logits = torch.zeros(24, 32, device=DEVICE)
    logits[:, 1:16], logits[:, 16:] = float(np.log(0.5)) + 0.01, float(np.log(0.5)) - 0.01
    hot = {"temperature": torch.ones(24, device=DEVICE), **randomness(np.random.default_rng(0), 24)}
    with use_backend(backend):
        drawn = sample(logits, **hot, min_p=column([0.5] * 24, torch.float32)).tolist()
        assert max(drawn) < 16
        assert len(set(drawn)) > 5
        assert max(sample(logits, **hot).tolist()) >= 16


def test_penalty_is_that_of_transformers():
    rng = np.random.default_rng(0)
    logits = normal(rng, 8, 30)
    seen_tokens = np.stack([rng.choice(30, 12, replace=False) for _ in range(8)])
    seen = torch.zeros(8, 30, dtype=torch.uint8)
    seen.scatter_(1, torch.from_numpy(seen_tokens), 1)
    penalty = rng.uniform(0.5, 3.0, 8).astype(np.float32)
    got = sample(logits, penalty=torch.from_numpy(penalty).to(DEVICE), seen=seen.to(DEVICE))
    rows = zip(logits.cpu().numpy(), penalty, seen_tokens, strict=True)
    assert got.tolist() == [warped_by_transformers(z, 1.0, 0, 1.0, 0.0, float(p), t).argmax() for z, p, t in rows]
    assert got.tolist() != sample(logits).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_offsets_beyond_int32():
    rng = np.random.default_rng(0)
    logits = normal(rng, 3, 16, dtype=torch.float16)
    seen = torch.from_numpy(rng.integers(0, 2, (3, 16), dtype=np.uint8)).to(DEVICE)
    near = {
        "temperature": torch.ones(3, device=DEVICE),
        "top_p": column([0.5, 0.6, 0.7], torch.float32),
        "penalty": column([1.5] * 3, torch.float32),
        "seen": seen,
        **randomness(rng, 3),
    }
    assert_bit_equal(sample(beyond_int32(logits), **near | {"seen": beyond_int32(seen)}), sample(logits, **near))


def test_opcheck():
    logits = torch.randn(2, 30, device=DEVICE)
    parameters = random_parameters(np.random.default_rng(0), 2, 30)
    torch.library.opcheck(torch.ops.rooflama.sample, (logits,), parameters)
    torch.library.opcheck(torch.ops.rooflama.sample, (logits,), {"vocab_size": 20})


def test_compiles_into_one_graph():
    logits = torch.randn(2, 30, device=DEVICE)
    compiled = torch.compile(lambda logits: sample(logits * 2) + 1, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(logits), sample(logits) + 1)


LOGITS = torch.zeros(2, 8)
FLOAT, INT32, INT64 = torch.ones(2), torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "parameters", "message"),
    [
        (torch.zeros(8), {}, r"logits must have shape \[any, any\]"),
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
        (LOGITS, {"penalty": FLOAT}, "penalty without seen"),
        (LOGITS, {"penalty": FLOAT, "seen": LOGITS}, "seen is torch.float32"),
        (LOGITS, {"penalty": FLOAT, "seen": LOGITS[:, :7].bool()}, r"seen must have shape \[2, 8\]"),
    ],
)
def test_bad_input_is_refused_before_a_launch(logits, parameters, message):
    parameters = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in parameters.items()
    }
    with pytest.raises(KernelInputError, match=message):
        sample(logits.to(DEVICE), **parameters)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
        sample(LOGITS.bfloat16())
