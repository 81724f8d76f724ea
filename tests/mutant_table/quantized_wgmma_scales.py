"""Bugs of ``kernels/quantized_wgmma_scales.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    ("wgmma: signed scales read as unsigned", "word ^= -0x7F7F7F80", "word ^= 0", _PRODUCT),
    ("wgmma: minima added instead of subtracted", "* -SUMS_UNIT", "* SUMS_UNIT", _PRODUCT),
    ("wgmma: minima of a pair of groups swapped", "pairs = gl.join(even, odd)", "pairs = gl.join(odd, even)", _PRODUCT),
    ("wgmma: packed minima are the scales", "even >> 4, odd >> 4", "even & 15, odd & 15", _PRODUCT),
]
