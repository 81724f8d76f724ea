"""Bugs of ``kernels/quantized_wgmma_scales.py``."""

_EQUALS = "tests/kernels/test_quantized_wgmma.py::test_equals_float64"

HOPPER_MUTANTS = [
    ("wgmma: signed scales read as unsigned", "word ^= -0x7F7F7F80", "word ^= 0", _EQUALS),
    ("wgmma: minima added instead of subtracted", "factor = -times", "factor = times", _EQUALS),
    (
        "wgmma: float16 minima rounded to bfloat16",
        "even -= even.to(gl.bfloat16).to(gl.float32)",
        "even -= even",
        _EQUALS,
    ),
    ("wgmma: packed minima are the scales", "even >> 4, odd >> 4", "even & 15, odd & 15", _EQUALS),
]
