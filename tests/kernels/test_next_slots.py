"""Positions and slots of the next tokens: the definition, what is written, and slots beyond 32 bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rooflama.kernels import KernelInputError, next_slots, reference, use_backend
from rooflama.testing.assertions import assert_guards_intact
from rooflama.testing.calls import calls
from rooflama.testing.strategies import DEVICE


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", ["triton", "numpy"])
@given(data=st.data())
def test_kernel_equals_definition(backend, data):
    """In every bit; ``lengths`` is written and nothing beside it; tables of other strides."""
    call = data.draw(calls("next_slots", num_tokens=st.integers(1, 70)))
    arguments = dict(call.arguments)
    arrays = {name: v.cpu().numpy().copy() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    arguments["block_table"] = torch.nn.functional.pad(arguments["block_table"], (0, 3), value=-7)[:, :-3]
    with use_backend(backend):
        positions, slots = next_slots(**arguments)
    wanted = reference.next_slots(**arrays)
    assert (positions.dtype, slots.dtype) == (torch.int32, torch.int64)
    assert (positions.tolist(), slots.tolist()) == tuple(array.tolist() for array in wanted), call.numbers
    assert arguments["lengths"].tolist() == arrays["lengths"].tolist()
    for buffer in call.buffers.values():
        assert_guards_intact(buffer)


@pytest.mark.parametrize("backend", ["triton", "numpy"])
def test_rows_worked_out_by_hand(backend):
    """The first token; one at the end of a page; a sequence at its limit; an idle row; one at the last position."""
    lengths, limits = ints(0, 31, 32, 0, 48), ints(48, 48, 32, 0, 64)
    table = ints([5, -1, -1], [7, 2, -1], [3, 4, -1], [-1, -1, -1], [1, 8, 9])
    with use_backend(backend):
        positions, slots = next_slots(lengths, limits, table, 16, 48)
    assert positions.tolist() == [0, 31, 32, 0, 47]
    assert slots.tolist() == [80, 47, -1, -1, 159]
    assert lengths.tolist() == [1, 32, 32, 0, 49]


def test_slots_beyond_int32():
    _, slots = next_slots(ints(3), ints(9), ints([2**31 - 1]), 256, 16)
    assert slots.tolist() == [(2**31 - 1) * 256 + 3]


def test_no_sequence():
    positions, slots = next_slots(ints(), ints(), ints().view(0, 4), 16, 64)
    assert positions.shape == slots.shape == (0,)


def test_opcheck():
    arguments = (ints(3, 4), ints(9, 4), ints([1, 0], [2, 3]), 16, 32)
    torch.library.opcheck(torch.ops.rooflama.next_slots, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ints(1, 2).float()}, "lengths is torch.float32"),
        ({"lengths": ints(1)}, r"lengths must have shape \[2\]"),
        ({"limits": ints(1)}, r"limits must have shape \[2\]"),
        ({"limits": ints(1, 2).float()}, "limits is torch.float32"),
        ({"block_table": ints(1, 2)}, r"block_table must have shape \[any, any\]"),
        ({"page_size": -16}, "page_size is -16"),
        ({"most_positions": 0}, r"0 positions: a sequence has 1 to 32 \(2 pages of 16\)"),
        ({"most_positions": 33}, "33 positions"),
        ({"limits": torch.zeros(2, dtype=torch.int32, device="meta")}, "all tensors of one call live on one device"),
    ],
)
def test_bad_input_is_refused_before_a_launch(changes, message):
    given_right = {"lengths": ints(1, 2), "limits": ints(3, 3), "block_table": ints([1, 0], [2, 3])}
    arguments = given_right | {"page_size": 16, "most_positions": 32} | changes
    with pytest.raises(KernelInputError, match=message):
        next_slots(**arguments)
    assert given_right["lengths"].tolist() == [1, 2]


def test_numbers_of_the_definition():
    lengths = np.array([5])
    assert [x.tolist() for x in reference.next_slots(lengths, np.array([6]), np.array([[4, 9]]), 4, 8)] == [[5], [37]]
    assert lengths.tolist() == [6]
