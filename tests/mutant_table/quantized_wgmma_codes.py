"""Bugs of ``kernels/quantized_wgmma_codes.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    ("wgmma: the zero of codes not subtracted", "base = power + zero * 0x00010001", "base = power", _PRODUCT),
    ("wgmma: the top bit of eight ignored", "0x00800080, 0x43804380", "0x00000000, 0x43804380", _PRODUCT),
    ("wgmma: both groups of a high word take the first's bits", "half + 4 * odd", "half + 0 * odd", _PRODUCT),
    (
        "wgmma: lanes of Q6_K take each other's high bits",
        "8 * (lane & 1) + 4 * (lane >> 1)",
        "8 * (lane >> 1) + 4 * (lane & 1)",
        _PRODUCT,
    ),
    ("wgmma: table values of another pair", '"a", f"w{half}", 8 * step', '"a", f"w{step}", 8 * half', _PRODUCT),
]
