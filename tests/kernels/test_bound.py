"""Bound launches, with a compiled kernel that writes down what it is run with: which addresses a replay passes."""

import copy
import pickle
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rooflama.kernels import Weight, attention_prefill_hopper, bound
from rooflama.kernels.bound import (
    Bindable,
    BoundLaunches,
    addresses_of,
    constant,
    launch,
    scratch,
    signature_of,
    tensors_in,
)
from rooflama.testing.strategies import DEVICE


class Pair(NamedTuple):
    first: Tensor | None
    rest: object


class Compiled:
    """Stands for a compiled kernel: ``runs`` holds (grid, arguments) of each launch."""

    def __init__(self):
        self.runs = []

    def __getitem__(self, grid):
        return lambda *args: self.runs.append((grid, args))


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


X, BOTH = empty(8), empty(2, 8)


def bind(values, *args, out=None, scratches=(), grid=(2,), **options):
    """(what was bound, the compiled kernel) of one launch whose parameters are called a, b, c, ..."""
    names = [chr(ord("a") + i) for i in range(len(args))] + [name for name in options if name != "num_warps"]
    compiled = Compiled()
    one = launch(SimpleNamespace(arg_names=names), grid, *args, **options)
    return BoundLaunches.bind(values, out, list(scratches), [one], [compiled]), compiled


@pytest.fixture
def allocated(monkeypatch):
    """The tensors that ``torch.empty`` gave since the test emptied the list."""
    tensors, plain = [], torch.empty

    def recorded(*args, **kwargs):
        tensors.append(plain(*args, **kwargs))
        return tensors[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    return tensors


def test_a_replay_takes_the_addresses_of_its_own_call(allocated):
    """Of arguments in tuples, results, scratch, and views of each; everything else stays what and where it was."""

    def arguments():
        return (empty(4, 8), 3, Pair(empty(5), [empty(6, dtype=torch.int64)]), None)

    def launched(values, out, taken):
        x, number, pair, nothing = values
        return (
            *(x, x[2:], x.view(torch.int32), number, pair.first, pair.rest[0]),
            *(Pair(pair.first[1:], (7, x, nothing)), nothing, out[0], out[1][3:], taken, taken[1]),
        )

    def addresses(args):
        plain = [tuple(addresses(arg)) if isinstance(arg, tuple) else arg for arg in args]
        return [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in plain]

    values, out, taken = arguments(), (empty(2), empty(7, dtype=torch.float16)), empty(2, 3)
    args = launched(values, out, taken)
    bound, compiled = bind(values, *args, out=out, scratches=[taken], grid=(2, 5), BLOCK=16, num_warps=8)
    for _ in range(2):
        fresh = arguments()
        allocated.clear()
        results = bound(fresh)
        *made, taken = allocated
        assert all(result is one for result, one in zip(results, made, strict=True))
        assert [(t.shape, t.dtype) for t in results] == [((2,), torch.float32), ((7,), torch.float16)]
        assert (taken.shape, taken.dtype) == ((2, 3), torch.float32)
        assert compiled.runs.pop() == ((2, 5, 1), (*addresses(launched(fresh, results, taken)), 16))
    assert not compiled.runs


def test_launches_run_in_order_and_the_result_is_as_the_body_has_it():
    x, out = empty(3), empty(3)
    runs = []
    compiled = [{(n, 1, 1): lambda *args, n=n: runs.append((n, *args))} for n in (1, 2)]
    one = SimpleNamespace(arg_names=["a"])
    launches = [launch(one, (1,), x), launch(one, (2,), x)]
    for given, shape in ((out, out.shape), (None, None)):
        result = BoundLaunches.bind((x,), given, [], launches, compiled)((x,))
        assert (None if result is None else result.shape) == shape
    assert runs == [(1, x.data_ptr()), (2, x.data_ptr())] * 2


def test_a_replay_writes_into_the_result_that_it_is_given(allocated):
    x, one, two = empty(3), empty(3), (empty(4), empty(5))
    for out in (one, two):
        bound, compiled = bind((x,), x, *(out if out is two else [out]), out=out)
        given = (empty(4), empty(5)) if out is two else empty(3)
        allocated.clear()
        result = bound((x,), given)
        assert not allocated
        for tensor, wanted in zip(tensors_in([result]), tensors_in([given]), strict=True):
            assert tensor is wanted
        assert compiled.runs == [((2, 1, 1), tuple(t.data_ptr() for t in tensors_in([x, given])))]


class Kept(Pair, Bindable):
    """A record as a weight is one."""


def test_what_is_remembered_of_a_record_is_what_it_is():
    values = (X, Kept(X[1:], ("Q4_0", [X[2:]])), 3)
    plain = tuple(Pair(*value) if isinstance(value, Kept) else value for value in values)
    for _ in range(2):
        assert signature_of(values) == signature_of(plain)
        assert addresses_of(values) == addresses_of(plain) == [X.data_ptr() + 4 * i for i in range(3)]
    bound, compiled = bind((Kept(X, 1), BOTH), X, BOTH)
    bound((Kept(BOTH, 1), X))
    assert compiled.runs == [((2, 1, 1), (BOTH.data_ptr(), X.data_ptr()))]


def test_two_arguments_in_one_storage_are_told_apart():
    """Replayed for arguments in two storages, each launch argument comes from its own."""
    values = tuple(empty(2, 8))
    bound, compiled = bind(values, *values)
    apart = (empty(8), empty(8))
    bound(apart)
    assert compiled.runs == [((2, 1, 1), tuple(t.data_ptr() for t in apart))]


@pytest.mark.parametrize(
    ("values", "arg"),
    [
        ((X, X), X),
        ((X, (1, [X])), X),
        ((BOTH[0], BOTH[1]), BOTH[0, 2:]),
        ((BOTH, BOTH[1]), BOTH[1:]),  # begins where another argument begins
        ((X,), empty(8)),
        ((X,), (3, (X, empty(8)))),
        ((3,), X),
    ],
    ids=[
        "twice",
        "twice in tuples",
        "one of two",
        "a view at an argument",
        "the body's own",
        "in a tuple",
        "no source",
    ],
)
def test_an_address_of_two_sources_or_none_is_not_bound(values, arg):
    assert bind(values, arg)[0] is None


def test_an_argument_that_is_not_launched_may_be_there_twice():
    bound, compiled = bind((X, BOTH, X), BOTH)
    bound((empty(8), BOTH, empty(8)))
    assert compiled.runs == [((2, 1, 1), (BOTH.data_ptr(),))]


def test_constants_keep_their_address():
    table = constant((1.0, 2.5), DEVICE)
    assert constant((1.0, 2.5), DEVICE) is table
    assert table.tolist() == [1.0, 2.5]
    bound, compiled = bind((X,), table, (table, X))
    bound((BOTH,))
    assert compiled.runs == [((2, 1, 1), (table.data_ptr(), (table.data_ptr(), BOTH.data_ptr())))]


def test_scratch_is_noted():
    scratch.taken = []
    taken = scratch(3, 4, dtype=torch.int32, device=DEVICE)
    assert (taken.shape, taken.dtype, taken.device.type) == ((3, 4), torch.int32, DEVICE.type)
    assert scratch.taken == [taken]
    scratch.taken = []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda weight: pickle.loads(pickle.dumps(weight))])
def test_what_a_weight_remembers_is_of_its_own_planes(copied):
    """Not of those that it was copied from, which may be freed."""
    weight = Weight.make("F32", (empty(4, 8),), (4, 8))
    values = (weight, empty(2))
    for _ in range(2):
        assert addresses_of(values) == [weight.planes[0].data_ptr(), values[1].data_ptr()]
        signature = signature_of(values)
    other = copied(weight)
    assert addresses_of((other,)) == [other.planes[0].data_ptr()]
    half = weight.slice_rows(2, 4)
    assert addresses_of((half,)) == [weight.planes[0].data_ptr() + 2 * 8 * 4]
    assert signature_of((half, values[1])) != signature


def test_tensors_are_found_in_order():
    tensors = [empty(1) for _ in range(4)]
    found = list(tensors_in((tensors[0], 1, [tensors[1], (tensors[2],)], None, "q", Pair(None, tensors[3]))))
    assert [id(tensor) for tensor in found] == list(map(id, tensors))


def test_a_signature_tells_launches_apart_and_holds_for_other_tensors_of_the_kind():
    buffer = torch.zeros(64, device=DEVICE)
    square = buffer[:16].view(4, 4)
    unlike = [
        (square, 1),
        (square, 2),
        (square, None),
        (square, True, 1),
        (buffer[:16].view(2, 8), 1),  # shape
        (square.T, 1),  # strides
        (buffer[:32].view(4, 8)[:, :4], 1),
        (square.view(torch.int32), 1),  # dtype
        (square.to("meta"), 1),  # device
        (buffer[1:17].view(4, 4), 1),  # alignment
        ((square,), 1),  # nesting
        ((square, 2), 1),
        ([square, 3], 1),
        ("Q4_0", square),
        ("Q4_1", square),
    ]
    signatures = [signature_of(values) for values in unlike]
    assert len(set(signatures)) == len(unlike)
    assert signature_of((buffer[32:48].view(4, 4), 1)) == signatures[0]  # 128 bytes on: as aligned
    assert signature_of((Pair(square, 2), 1)) == signatures[11]


def test_descriptors_get_the_address_of_the_call():
    """A descriptor of the host holds an address. A bound launch encodes one for the pages that it is given."""
    pages = torch.zeros(3, 16, 2, 64, dtype=torch.float16)
    boxes = attention_prefill_hopper._boxes(pages[1:], 16, 64)
    template = bound._templated((boxes,), [torch.zeros(1), pages])
    (made,) = bound._filled(template, [0, 4096])
    assert made.base.data_ptr() == 4096 + pages[0].nbytes
    assert (made.shape, made.strides, made.block_shape) == (boxes.shape, boxes.strides, boxes.block_shape)
    assert boxes.base.data_ptr() == pages[1].data_ptr()
