"""Operators on tensors without memory have the shapes and dtypes of the same on the CPU."""

import pytest
import torch

from rooflama.models.shapes_only import RULES, ShapesOnly, shapes_only

OPERATIONS = {
    "mm": lambda x, i: torch.mm(x, x.T, out=x.new_empty(4, 4)),
    "addmm": lambda x, i: torch.addmm(x[0, :4], x, x.T, out=x.new_empty(4, 4)),
    "add_": lambda x, i: x.add_(1),
    "cat": lambda x, i: torch.cat([x, x[:2], x[1:1]]),
    "cat of columns": lambda x, i: torch.cat([x, x], dim=1),
    "cat of last": lambda x, i: torch.cat([x, x], -1),
    "__getitem__": lambda x, i: x[i],
    "__getitem__ of rows": lambda x, i: x[i.unsqueeze(1)],
    "add": lambda x, i: x + i.unsqueeze(1),
    "mul": lambda x, i: i * i.double(),
    "cos": lambda x, i: torch.cos(x),
    "sin": lambda x, i: x.sin(),
    "arange": lambda x, i: torch.arange(5, dtype=torch.int32, device=i.device),
    "empty_like": lambda x, i: torch.empty_like(i, dtype=torch.float16),
}


def test_each_rule_is_tested():
    assert {name.partition(" ")[0] for name in OPERATIONS} == set(RULES)


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_and_dtypes_are_those_of_the_cpu(name):
    def run(device):
        return OPERATIONS[name](torch.zeros(4, 6, device=device), torch.zeros(4, dtype=torch.int64, device=device))

    want = run("cpu")
    with ShapesOnly():
        for device in ("cpu", "meta"):
            found = run(device)
            assert (found.shape, found.dtype, found.device.type) == (want.shape, want.dtype, device)
            assert device == "meta" or name.startswith("empty") or torch.equal(found, want)


def test_slices_are_views_and_keep_their_place():
    with ShapesOnly():
        part = torch.empty(4, 6, device="meta")[1:, 2]
    assert (part.storage_offset(), part.stride(), part._base is None) == (8, (6,), False)


def test_tensors_are_made_without_memory():
    with shapes_only():
        assert torch.zeros(2).is_meta
    assert not torch.zeros(2).is_meta
