"""Bugs of ``kernels/quantized_wgmma_ends.py``."""

_ARRANGE = "tests/kernels/test_quantized_wgmma.py::test_arrange_equals_numpy"
_GATHER = "tests/kernels/test_quantized_wgmma.py::test_gather_equals_numpy"

MUTANTS = [
    ("wgmma: halves of a step swapped with steps", "((k >> 3) & 1) * 2", "((k >> 3) & 1) * 4", _ARRANGE),
    (
        "wgmma: tokens that there are not",
        "own = offs < tl.where(token < num_tokens, columns, 0)",
        "own = offs < columns",
        _ARRANGE,
    ),
    (
        "wgmma: the rest of x is x",
        "rounded = tl.where(place < padded, rounded, rest)",
        "rounded = tl.where(place < padded, rounded, rounded)",
        _ARRANGE,
    ),
    (
        "wgmma: the rest of a sum dropped",
        "low = _bfloat16_bits(sums - high.to(tl.float32, bitcast=True))",
        "low = high * 0",
        _ARRANGE,
    ),
    ("wgmma: the first split again and again", "(split * padded + token)[:, None]", "token[:, None]", _GATHER),
]
