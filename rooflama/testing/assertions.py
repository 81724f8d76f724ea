"""What the property tests assert, with tolerances derived from rounding and messages that name the worst element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .strategies import GUARD, exact

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_within_rounding(
    actual: Tensor, reference: np.ndarray, same_dtype: Tensor | None = None, *, c: float = 4.0, context: str = ""
) -> None:
    """|actual - reference| <= 2 |same_dtype - reference| + c eps max|reference|, element by element.

    Args:
        actual: the kernel's result.
        reference: the NumPy definition in float64, [same shape].
        same_dtype: the same formula in plain torch, in the dtype of ``actual``: the error of rounding alone.
        c: units in the last place of the largest value that are allowed in addition.
        context: the drawn shape and seed, for the message.

    NaN never passes unless the reference has NaN there too; infinities must be equal.
    """
    if same_dtype is not None:
        assert actual.dtype == same_dtype.dtype, f"{actual.dtype}, expected {same_dtype.dtype}; {context}"
    got = exact(actual)
    assert got.shape == reference.shape, f"shape {got.shape}, expected {reference.shape}; {context}"
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(got[~finite], reference[~finite], err_msg=f"non-finite values differ; {context}")
    if not finite.any():
        return
    bound = np.full(reference.shape, c * torch.finfo(actual.dtype).eps * np.abs(reference[finite]).max())
    if same_dtype is not None:
        rounding = np.abs(exact(same_dtype) - np.where(finite, reference, 0.0))
        bound += 2.0 * np.nan_to_num(rounding, nan=0.0, posinf=0.0)
    error = np.where(finite, np.abs(got - np.where(finite, reference, 0.0)), 0.0)
    bad = ~(error <= bound)  # so that NaN is bad
    if bad.any():
        excess = np.where(bad, np.nan_to_num(error, nan=np.inf) / np.maximum(bound, 1e-300), -1.0)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements are off; worst at {tuple(int(i) for i in worst)}: "
            f"got {got[worst]!r}, expected {reference[worst]!r}, error {error[worst]:.3e}, "
            f"allowed {bound[worst]:.3e}; {actual.dtype}; {context}"
        )


def assert_bit_equal(actual: Tensor, expected: Tensor, *, signed_zeros: bool = True, context: str = "") -> None:
    """The same dtype and bits, except for NaN payloads. Without ``signed_zeros`` both zeros are equal too."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}; {context}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}; {context}"
    bits = _BITS[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
        if not signed_zeros:
            same |= actual == expected
    if not bool(same.all()):
        worst = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"first difference at {worst}: {actual[worst]!r} against {expected[worst]!r}; {context}")


def assert_guards_intact(buffer: Tensor, *, context: str = "") -> None:
    """Nothing wrote outside the view that ``strategies.guarded`` returned."""
    for name, guard in (("before", buffer[:GUARD]), ("after", buffer[-GUARD:])):
        intact = guard.isnan() if buffer.is_floating_point() else guard == torch.iinfo(buffer.dtype).min
        assert bool(intact.all()), f"wrote {name} the buffer at {int((~intact).nonzero()[0])}; {context}"
