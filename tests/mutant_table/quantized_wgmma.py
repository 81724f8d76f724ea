"""Bugs of ``kernels/quantized_wgmma.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    (
        "wgmma: every split begins at the first block",
        "first = gl.program_id(1) * blocks_per_split",
        "first = gl.program_id(1) * 0",
        _PRODUCT,
    ),
    (
        "wgmma: scales of the block behind",
        "scale_of(scales_now, own * PART + group",
        "scale_of(scales, own * PART + group",
        _PRODUCT,
    ),
    (
        "wgmma: the second part of a block scaled as the first",
        "scale_of(scales_now, own * PART + group",
        "scale_of(scales_now, group",
        _PRODUCT,
    ),
    (
        "wgmma: sums of another block",
        "sums_shared.index((block - first) % SUMS)",
        "sums_shared.index((block - first + 1) % SUMS)",
        _PRODUCT,
    ),
    (
        "wgmma: a product of each part left behind",
        "for left in gl.static_range(FLIGHT):",
        "for left in gl.static_range(FLIGHT - 1):",
        _PRODUCT,
    ),
]
