"""Bugs of ``kernels/quantized_wgmma_codes.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"
_EXACT = "tests/kernels/test_quantized_wgmma.py::test_products_of_scales_and_values_are_exact"

MUTANTS = [
    ("wgmma: the zero of codes not subtracted", "bit_length() - 10", "bit_length() - 11", _PRODUCT),
    ("wgmma: the zero of scaled codes not subtracted", "(0x8000 + zero)", "(0x8000 + 0 * zero)", _EXACT),
    ("wgmma: the higher of two codes not divided", "{_power(-low)}; mul", "{_power(0)}; mul", _EXACT),
    ("wgmma: signed scales 128 too large", '"0xf880f880" if', '"0xf800f800" if', _EXACT),
    ("wgmma: the rest of a product dropped", "fma.rn.f16x2 {rest}, a, scale, b;", "and.b32 {rest}, b, 0;", _EXACT),
    ("wgmma: every group scaled as the first", "{0x0400 + 0x0101 * byte:#x}", "0x0400", _EXACT),
    ("wgmma: both rows of a lane scaled as the first", "{{row{row}, row{row}}}", "{{row0, row0}}", _EXACT),
    ("wgmma: both groups of a high word take the first's bits", "half + 4 * odd", "half + 0 * odd", _PRODUCT),
    (
        "wgmma: lanes of Q6_K take each other's high bits",
        "8 * (lane & 1) + 4 * (lane >> 1)",
        "8 * (lane >> 1) + 4 * (lane & 1)",
        _PRODUCT,
    ),
    ("wgmma: table values of another pair", "(half, step) if layout.table", "(step, half) if layout.table", _PRODUCT),
]
