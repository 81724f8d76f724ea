"""Activations in 16-bit fixed point, as the fixed-point regime of ``quantized_matmul`` multiplies them."""

import numpy as np

X_GROUP = 32  # columns that share a step


def fixed_point(x) -> np.ndarray:
    """x [num_tokens, columns], columns a multiple of 32, rounded to whole steps: the same shape, float64.

    step = 2^(e - 14) per token and 32 columns, e the least whole number with max |x| < (2 - 2^-14) 2^e, and at least
    2^-126; so no number is more than 2^15 - 1 steps. Ties go to even. x is first rounded to float32. A group with a
    number that is not finite, or at least (2 - 2^-14) 2^127, becomes NaN.
    """
    groups = np.asarray(x, np.float32).reshape(len(x), -1, X_GROUP)
    bits = np.abs(groups).view(np.int32).max(axis=2, keepdims=True, initial=0)
    bits = np.minimum(bits, 0x7F800000)  # any NaN is an infinity here
    exponent = np.maximum((bits + 0x200) >> 23, 15) - 127
    with np.errstate(invalid="ignore"):
        steps = np.rint(groups.astype(np.float64) * 2.0 ** (14 - exponent))
        out = np.where(exponent == 128, np.nan, steps * 2.0 ** (exponent - 14))
    return out.reshape(np.shape(x))
