"""Penalties against their definition, transformers and the formulas of OpenAI's API, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, penalise, penalties, reference, use_backend
from rooflama.testing.assertions import assert_bit_equal, assert_guards_intact
from rooflama.testing.sampling import column
from rooflama.testing.strategies import DEVICE, beyond_int32, exact, guarded, normal, seeds
from sampling_cases import warped_by_transformers


@pytest.fixture
def small_blocks(monkeypatch):
    """Sixteen tokens a program, so that a small vocabulary has several blocks; on a GPU, in no launch bound before."""
    monkeypatch.setattr(penalties, "BLOCK", 16)
    penalise.forget()
    yield
    penalise.forget()


def random_state(rng, num_seqs, vocab):
    """(seen, repetition, frequency, presence); each penalty is off for about a third of the rows."""

    def mixed(values, off):
        return column(np.where(rng.random(num_seqs) < 0.7, values, off), torch.float32)

    seen = rng.integers(0, 6, (num_seqs, vocab)) * (rng.random((num_seqs, vocab)) < 0.6)
    return (
        torch.from_numpy(seen.astype(np.int32)).to(DEVICE),
        mixed(rng.uniform(0.6, 1.8, num_seqs), 1.0),
        mixed(rng.uniform(-2.0, 2.0, num_seqs), 0.0),
        mixed(rng.uniform(-2.0, 2.0, num_seqs), 0.0),
    )


def penalised(logits, *state):
    out = logits.clone()
    penalise(out, *state)
    return out


@pytest.mark.usefixtures("small_blocks")
@given(num_seqs=st.integers(0, 3), vocab=st.integers(1, 50), seed=seeds)
@example(num_seqs=3, vocab=32, seed=1)
@example(num_seqs=2, vocab=33, seed=2)
def test_kernel_equals_definition(num_seqs, vocab, seed):
    """To the rounding of four operations, and nothing beside the logits is written."""
    rng = np.random.default_rng(seed)
    logits = normal(rng, num_seqs, vocab, scale=3.0)
    state = random_state(rng, num_seqs, vocab)
    view, buffer = guarded(logits)
    wide = torch.nn.functional.pad(state[0], (0, 3), value=7)  # rows of another stride than those of the logits
    penalise(view, wide[:, :vocab], *state[1:])
    want = reference.penalise(exact(logits), *(tensor.cpu().numpy() for tensor in state))
    np.testing.assert_allclose(exact(view), want, rtol=2**-22, atol=2**-20, err_msg=f"{num_seqs=} {vocab=} {seed=}")
    assert_guards_intact(buffer)
    with use_backend("numpy"):
        np.testing.assert_allclose(exact(penalised(logits, *state)), want, rtol=2**-22, atol=2**-20)


@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_each_penalty_on_a_row_worked_out_by_hand(backend):
    """Tokens: new, in the prompt, drawn once, drawn twice, and drawn once and in the prompt."""
    logits = column([[2.0, 2.0, 2.0, -2.0, -2.0]] * 4, torch.float32)
    seen = column([[0, 1, 2, 4, 3]] * 4, torch.int32)
    repetition, frequency, presence = (
        column(values, torch.float32) for values in ([1.0, 2.0, 1.0, 1.0], [0, 0, 0.5, 0], [0, 0, 0, 0.25])
    )
    with use_backend(backend):
        penalise(logits, seen, repetition, frequency, presence)
    assert logits.tolist() == [
        [2.0, 2.0, 2.0, -2.0, -2.0],
        [2.0, 1.0, 1.0, -4.0, -4.0],
        [2.0, 2.0, 1.5, -3.0, -2.5],
        [2.0, 2.0, 1.75, -2.25, -2.25],
    ]


@given(seed=seeds)
def test_repetition_is_that_of_transformers(seed):
    rng = np.random.default_rng(seed)
    logits = normal(rng, 1, 30)
    tokens = rng.integers(0, 30, 12)
    penalty = float(np.float32(rng.uniform(0.5, 3.0)))
    seen = torch.zeros(1, 30, dtype=torch.int32)
    seen[0, tokens] = 2
    off = column([0.0], torch.float32)
    got = penalised(logits, seen.to(DEVICE), column([penalty], torch.float32), off, off)
    want = warped_by_transformers(logits[0].cpu().numpy(), 1.0, 0, 1.0, 0.0, penalty, tokens)
    np.testing.assert_allclose(got[0].cpu().numpy(), want, rtol=2**-22)


@pytest.mark.usefixtures("small_blocks")
@given(seed=seeds)
def test_what_is_off_changes_no_bit_and_rows_do_not_mix(seed):
    rng = np.random.default_rng(seed)
    logits = normal(rng, 3, 20)
    state = random_state(rng, 3, 20)
    one, off = column([1.0] * 3, torch.float32), column([0.0] * 3, torch.float32)
    assert_bit_equal(penalised(logits, state[0], one, off, off), logits)
    together = penalised(logits, *state)
    for row in range(3):
        alone = penalised(logits[row : row + 1], *(tensor[row : row + 1] for tensor in state))
        assert_bit_equal(alone, together[row : row + 1])


@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_what_is_not_finite_stays(backend):
    logits = column([[torch.inf, -torch.inf, torch.nan]], torch.float32)
    seen = column([[3, 3, 3]], torch.int32)
    with use_backend(backend):
        penalise(logits, seen, *(column([value], torch.float32) for value in (1.5, 1.0, 1.0)))
    assert logits[0, :2].tolist() == [torch.inf, -torch.inf]
    assert logits[0, 2].isnan()


@pytest.mark.usefixtures("small_blocks")
def test_offsets_beyond_int32():
    rng = np.random.default_rng(0)
    logits = normal(rng, 3, 16)
    state = random_state(rng, 3, 16)
    far = beyond_int32(logits)
    penalise(far, beyond_int32(state[0]), *state[1:])
    assert_bit_equal(far, penalised(logits, *state))


def test_opcheck():
    rng = np.random.default_rng(0)
    torch.library.opcheck(torch.ops.rooflama.penalise, (normal(rng, 2, 30), *random_state(rng, 2, 30)))


def test_compiles_into_one_graph():
    rng = np.random.default_rng(0)
    logits, state = normal(rng, 2, 30), random_state(rng, 2, 30)

    def work(logits):
        doubled = logits * 2
        penalise(doubled, *state)
        return doubled + 1

    assert_bit_equal(torch.compile(work, fullgraph=True, backend="aot_eager")(logits), work(logits))


ONES, SEEN = torch.ones(2), torch.zeros(2, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(8)}, r"logits must have shape \[any, any\]"),
        ({"logits": torch.zeros(2, 8).half()}, "logits is torch.float16"),
        ({"logits": torch.zeros(8, 2).T}, "last dimension of logits must be contiguous"),
        ({"seen": SEEN[:, :7]}, r"seen must have shape \[2, 8\]"),
        ({"seen": SEEN.bool()}, "seen is torch.bool"),
        ({"repetition": ONES[:1]}, r"repetition must have shape \[2\]"),
        ({"frequency": ONES.double()}, "frequency is torch.float64"),
        ({"presence": ONES.to("meta")}, "all tensors of one call live on one device"),
    ],
)
def test_bad_input_is_refused_before_a_launch(changes, message):
    given_ones = {"logits": torch.zeros(2, 8), "seen": SEEN, "repetition": ONES, "frequency": ONES, "presence": ONES}
    tensors = {
        name: tensor if tensor.device.type == "meta" else tensor.to(DEVICE)
        for name, tensor in (given_ones | changes).items()
    }
    with pytest.raises(KernelInputError, match=message):
        penalise(**tensors)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the parameters are not looked at")
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_repetition_penalty_that_is_none_is_refused_on_a_cpu(value):
    with pytest.raises(KernelInputError, match=f"repetition {value}: repetition must be positive"):
        penalise(torch.zeros(2, 8), SEEN, torch.tensor([1.0, value]), ONES, ONES)
