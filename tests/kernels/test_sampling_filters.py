"""What top-k, top-p and min-p keep: against transformers, the definition and exact distributions."""

import math

import numpy as np
import pytest
import torch
import triton
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import reference, sample, sampling, use_backend
from rooflama.kernels.kernel import run
from rooflama.kernels.reference.sampling import allowed_tokens, relative
from rooflama.kernels.sampling_filters import LEVELS, Search, _raise_floor_kernel, raise_floor, search_memory
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.sampling import column, random_parameters, randomness
from rooflama.testing.strategies import DEVICE, dtypes, exact, guarded, normal, seeds
from sampling_cases import chunks_of, few_if_interpreted, warped_by_transformers


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens per program, so that a small vocabulary has several chunks."""
    yield from chunks_of(16, monkeypatch)


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
    search = search_memory(num_seqs, num_chunks, DEVICE)
    for limit, weighted in ((top_k, False), (top_p, True)):
        rest = (maxima, temperature, floor, search, sampling.CHUNK)
        for one in raise_floor(limit, weighted, logits, vocab, *rest):
            run(one)
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
def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-1.0, -0.0, 1.0, 0.0, -2.0]], device=DEVICE)
    one = column([1.0], torch.float32)
    floor = kernel_floor(logits, column([2], torch.int32), one, one)
    assert (image(logits[0].cpu().numpy()) >= floor[0]).tolist() == [False, True, True, True, False]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("top_k", [1, 16, 17, 19, 20, 39, 40, 41])
def test_top_k_keeps_k(top_k):
    """Of -20 to 19: also where 1 and 0 are the least that is kept."""
    logits = torch.from_numpy(np.random.default_rng(top_k).permutation(40).astype(np.float32) - 20)[None].to(DEVICE)
    one = column([1.0], torch.float32)
    floor = kernel_floor(logits, column([top_k], torch.int32), one, one)
    assert (image(logits[0].cpu().numpy()) >= floor[0]).sum() == min(top_k, 40)


def test_what_is_off_keeps_every_token():
    """Also tokens whose probability underflows; in a greedy row both limits are off."""
    logits = torch.tensor([[0.0, -200.0, 1.0, -torch.inf]] * 3, device=DEVICE)
    temperature = column([0.5, 0.5, 0.0], torch.float32)
    floor = kernel_floor(logits, column([0, 0, 1], torch.int32), column([1.0, 2.0, 0.5], torch.float32), temperature)
    assert floor.tolist() == [0, 0, 0]


def zeros_without_memory(*shape, dtype):
    """On the CPU no page of it takes memory before it is written."""
    numel = math.prod(shape)
    if DEVICE.type == "cpu":
        zeros = np.memmap("/dev/zero", dtype=np.uint8, mode="c", shape=(numel * dtype.itemsize,))
        return torch.from_numpy(zeros).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def test_sums_beyond_int32():
    """The last digit of a search: row 0 of more sequences than a call takes, all of one chunk."""
    num_seqs = 2**31 // (7 * 16) + 1
    sums = zeros_without_memory(LEVELS, num_seqs, 1, 16, dtype=torch.float32)
    search = Search(
        sums,
        zeros_without_memory(LEVELS, num_seqs, dtype=torch.int32),
        *(zeros_without_memory(LEVELS, num_seqs, dtype=torch.float32) for _ in range(2)),
    )
    sums[7, 0, 0, :6] = 1.0
    search.prefix[7, 0], search.bound[7, 0] = 0x7123456, 3.0
    floor, one = column([0], torch.int32), column([1.0], torch.float32)
    _raise_floor_kernel[(1,)](
        one, column([3], torch.int32), floor, search, num_seqs, 1, WEIGHTED=False, LEVELS=LEVELS, BLOCK_CHUNKS=1
    )
    assert floor.item() == 0x71234563  # the largest three of digits 0 to 5 are 5, 4 and 3


# ---- tokens


MIXED_ROWS, MIXED_VOCAB, MIXED_WIDTH = 40, 40, 44


def mixed_rows():
    """Logits and parameters of rows that mix all filters, with poison around each tensor; and the buffers.

    Temperatures that matter, top-p under top-k in about half of the rows, and a min-p that most draws would miss.
    """
    rng = np.random.default_rng(11)

    def on(probability, values, off):
        return np.where(rng.random(MIXED_ROWS) < probability, values, off)

    logits = normal(rng, MIXED_ROWS, MIXED_WIDTH, scale=2.0)
    logits[:, MIXED_VOCAB:] = torch.inf
    columns = {
        "temperature": on(0.9, rng.choice([0.4, 1.0, 2.5], MIXED_ROWS), 0.0),
        "top_k": on(0.7, rng.integers(1, MIXED_VOCAB + 3, MIXED_ROWS), 0),
        "top_p": on(0.7, rng.uniform(0.05, 0.95, MIXED_ROWS), 1.0),
        "min_p": on(0.4, rng.uniform(0.1, 0.9, MIXED_ROWS), 0.0),
    }
    parameters = {
        name: column(values, torch.int32 if name == "top_k" else torch.float32) for name, values in columns.items()
    }
    parameters |= randomness(rng, MIXED_ROWS)
    pairs = {name: guarded(tensor) for name, tensor in {"logits": logits, **parameters}.items()}
    return {name: view for name, (view, _) in pairs.items()}, [buffer for _, buffer in pairs.values()]


def test_a_mixture_of_rows_keeps_and_draws_what_the_definition_does(monkeypatch):
    """Floors and tokens, each row with filters of its own; in float64, from which float32 sums are not told apart."""
    floors = []

    def record(limit, weighted, logits, vocab_size, maxima, temperature, floor, *rest):
        floors.append(floor)
        return raise_floor(limit, weighted, logits, vocab_size, maxima, temperature, floor, *rest)

    monkeypatch.setattr(sampling, "raise_floor", record)
    monkeypatch.setattr(sampling, "CHUNK", 32)
    tensors, buffers = mixed_rows()
    sample.forget()
    got = sample(**tensors, vocab_size=MIXED_VOCAB)
    sample.forget()
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    want = reference.sample(**arrays | {"logits": exact(tensors["logits"])}, vocab_size=MIXED_VOCAB)
    floor = floors[-1].cpu().numpy().view(np.uint32)
    for row, temperature in enumerate(arrays["temperature"]):
        z = arrays["logits"][row, :MIXED_VOCAB]
        top_k, top_p = int(arrays["top_k"][row]), float(arrays["top_p"][row])
        kept = np.ones(MIXED_VOCAB, bool)
        if temperature > 0:
            kept = allowed_tokens(z.astype(np.float64), float(temperature), top_k, top_p, 0.0)
        np.testing.assert_array_equal(image(z) >= floor[row], kept, err_msg=f"{row=} {temperature=} {top_k=} {top_p=}")
    assert got.tolist() == want.tolist()
    for buffer in buffers:
        assert_guards_intact(buffer)


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
