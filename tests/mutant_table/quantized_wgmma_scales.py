"""Bugs of ``kernels/quantized_wgmma_scales.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    ("wgmma: signed scales read as unsigned", "word ^= -0x7F7F7F80", "word ^= 0", _PRODUCT),
    ("wgmma: minima added instead of subtracted", "factor = -times", "factor = times", _PRODUCT),
    (
        "wgmma: float16 minima rounded to bfloat16",
        "even -= even.to(gl.bfloat16).to(gl.float32)",
        "even -= even",
        _PRODUCT,
    ),
    ("wgmma: packed minima are the scales", "even >> 4, odd >> 4", "even & 15, odd & 15", _PRODUCT),
]
