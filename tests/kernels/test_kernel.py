"""What ``@kernel`` makes of a body, on a kernel of this file: arguments, what is remembered per signature, tracing."""

import copy
import inspect
import pickle
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from replaying import replay_on_the_cpu
from rooflama.kernels import KernelInputError, use_backend
from rooflama.kernels import kernel as module
from rooflama.kernels import launch as configurations
from rooflama.kernels.backend import INTERPRETED
from rooflama.kernels.bound import scratch
from rooflama.kernels.checks import check
from rooflama.kernels.kernel import KERNELS, Launch, kernel, launch, like, swap
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.strategies import DEVICE

X = torch.arange(10.0, device=DEVICE)
checked = []  # arguments, of each call
count = Counter()


@triton.jit
def _scale_kernel(x_ptr, out_ptr, size, factor, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0)
    tl.store(out_ptr + offs, x * factor + shift, mask=offs < size)


def _check(**arguments: object) -> None:
    checked.append(arguments)
    check(arguments["factor"] != 0, "factor 0", "a factor is not 0", "Pass another")


def _definition(x, factor, shift):
    return x * factor + shift


@kernel(checks=_check, output=like("x"), definition=_definition)
def scaled(out: Tensor, x: Tensor, factor: float, *, shift: float = 0.5) -> Launch:
    """x * factor + shift."""
    count["bodies"] += 1
    scratch(3, dtype=torch.float32, device=x.device)
    return launch(_scale_kernel, (triton.cdiv(len(x), 4),), x, out, len(x), factor, shift, BLOCK=4)


@kernel(checks=_check, output=like("x"), definition=_definition)
def scaled_by_torch(out: Tensor, x: Tensor, factor: float, *, shift: float = 0.5) -> None:
    count["bodies"] += 1
    torch.add(x * factor, shift, out=out)


@kernel(checks=_check, output=like("x"), definition=_definition)
def scaled_without_end(out: Tensor, x: Tensor, factor: float, *, shift: float = 0.5) -> Launch:
    scratch(3, dtype=torch.float32, device=x.device)
    raise MemoryError


for one in (scaled, scaled_by_torch, scaled_without_end):
    del KERNELS[one.name]  # no other test is to meet them


@pytest.fixture(autouse=True)
def fresh():
    checked.clear()
    count.clear()
    scaled.forget()
    scaled_by_torch.forget()


@pytest.fixture
def replaying(monkeypatch):
    """Calls are bound and replayed on the CPU too."""
    if DEVICE.type == "cpu":
        replay_on_the_cpu(monkeypatch)


# ---- arguments


def type_error(call):
    """The message of the TypeError that a call raises, if any."""
    try:
        call()
    except TypeError as error:
        return str(error)
    return None


@given(
    positional=st.integers(0, 4),
    keywords=st.dictionaries(st.sampled_from(["x", "factor", "shift", "factr", "out"]), st.integers(1, 3)),
)
def test_arguments_are_taken_and_refused_as_by_a_function(positional, keywords):
    """Defaults filled in; the same TypeError, which names the argument that is wrong."""
    checked.clear()
    scaled.forget()  # on a GPU, an earlier example may have bound the same call
    args = (X, 2.0, 3.0, 4.0)[:positional]
    keywords = {name: X if name == "x" else value for name, value in keywords.items()}
    signature = inspect.signature(scaled)
    refusal = type_error(lambda: signature.bind(*args, **keywords))
    if refusal is None:
        wanted = signature.bind(*args, **keywords)
        wanted.apply_defaults()
        assert_bit_equal(scaled(*args, **keywords), X * wanted.arguments["factor"] + wanted.arguments["shift"])
        assert checked == [wanted.arguments]
    else:
        assert type_error(lambda: scaled(*args, **keywords)) == refusal
        assert not checked


def test_a_kernel_looks_like_the_function_without_its_result():
    assert str(inspect.signature(scaled)) == "(x: torch.Tensor, factor: float, *, shift: float = 0.5) -> torch.Tensor"
    assert (scaled.name, scaled.__name__, scaled.__doc__) == ("scaled", "scaled", "x * factor + shift.")
    assert inspect.unwrap(scaled) is scaled.body
    assert repr(scaled).startswith("<kernel scaled(x: ")


def test_the_definition_takes_the_arguments_by_name():
    with use_backend("numpy"):
        assert_bit_equal(scaled(X, 2.0), 2 * X + 0.5)
    assert not count


def test_nothing_is_launched_for_no_elements(monkeypatch):
    monkeypatch.setattr(module, "run", None)
    assert scaled(X[:0], 2.0).shape == (0,)


def test_scratch_is_let_go():
    scaled(X, 2.0)
    assert scratch.taken == []
    with pytest.raises(MemoryError):
        scaled_without_end(X, 2.0)
    assert scratch.taken == []


def test_what_is_no_tensor_is_refused():
    for array in (X.cpu().numpy(), None):
        with pytest.raises(KernelInputError, match="scaled of no tensor: kernels take tensors"):
            scaled(array, 2.0)


@pytest.mark.skipif(not INTERPRETED, reason="Triton is compiled")
def test_the_interpreter_neither_replays_nor_overlaps():
    """On a GPU's tensors neither: it compiles nothing, and it knows no instruction to wait."""
    assert not module.replays(torch.device("cuda"))
    assert not configurations.overlaps(torch.device("cuda"))


def test_a_kernel_is_copied_and_pickled_by_name():
    for one in KERNELS.values():
        assert copy.deepcopy([one])[0] is one
        assert pickle.loads(pickle.dumps(one)) is one


# ---- what is remembered


@pytest.mark.usefixtures("replaying")
def test_checks_and_body_run_once_per_signature(monkeypatch):
    def assert_calls(number, *args, **kwargs):
        for _ in range(2):
            result = scaled(*args, **kwargs)
            assert (len(checked), count["bodies"]) == (number, number)
            assert_bit_equal(result, args[0] * args[1] + kwargs.get("shift", 0.5))

    assert_calls(1, X, 2.0)
    assert_calls(1, torch.zeros_like(X), 2.0, shift=0.5)
    assert_calls(2, X[:4], 2.0)
    assert_calls(3, X, 3.0)
    assert_calls(4, X, 2.0, shift=1.5)
    assert_calls(4, X, 2.0)
    scaled.forget()
    assert_calls(5, X, 2.0)
    monkeypatch.setattr(configurations, "version", configurations.version + 1)
    assert_calls(6, X, 2.0)


@pytest.mark.usefixtures("replaying")
def test_a_body_that_calls_torch_runs_each_time_and_is_checked_once():
    for number in (1, 2, 3):
        assert_bit_equal(scaled_by_torch(X * number, 2.0), X * number * 2 + 0.5)
        assert (len(checked), count["bodies"]) == (1, number)


@pytest.mark.usefixtures("replaying")
def test_what_was_refused_is_refused_again():
    for _ in range(2):
        with pytest.raises(KernelInputError, match="factor 0: a factor is not 0"):
            scaled(X, 0.0)
    assert len(checked) == 2
    assert not count


@pytest.mark.usefixtures("replaying")
def test_no_more_signatures_are_kept_than_the_most(monkeypatch):
    monkeypatch.setattr(module, "MOST_BOUND", 2)
    for factor in (1.0, 2.0, 3.0, 3.0, 1.0, 3.0):
        scaled(X, factor)
        assert len(scaled._bound) <= 2
    assert count["bodies"] == 4  # 3.0 drops all before it; then 3.0 and 1.0 are kept


# ---- tracing


def shifted_thrice(x, factor, shift):
    """Takes the place of ``scaled`` below."""
    return scaled(x, factor, shift=3 * shift)


def work(x):
    return scaled(x * 2, 3.0, shift=1.0) + 1


@pytest.mark.parametrize(
    "trace",
    [lambda: make_fx(work)(X), lambda: torch.compile(work, fullgraph=True, backend="aot_eager")],
    ids=["make_fx", "compile"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_traced_runs_what_is_swapped_when_it_runs(trace, inside, monkeypatch):
    """Wherever it was traced."""
    monkeypatch.setitem(KERNELS, "scaled", scaled)
    plain, swapped = X * 6 + 2, X * 6 + 4
    if inside:
        with swap(scaled=shifted_thrice):
            traced = trace()
            assert_bit_equal(traced(X), swapped)
    else:
        traced = trace()
    assert_bit_equal(traced(X), plain)
    with swap(rms_norm=lambda *arguments: None):  # another kernel
        assert_bit_equal(traced(X), plain)
    with swap(scaled=shifted_thrice):
        assert_bit_equal(traced(X), swapped)
    assert_bit_equal(traced(X), plain)
